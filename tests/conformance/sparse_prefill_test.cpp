// The contracts of sparse_prefill (include/flash_mla/sparse.h), on every backend.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "base/element.h"
#include "flash_mla/error.h"
#include "guarded.h"
#include "prefill_problem.h"

namespace flash_mla::conformance {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

class SparsePrefill : public ::testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {
 protected:
  BackendUnderTest& backend() { return *GetParam(); }
  bool supports(const PrefillShape& s) {
    return backend().supports(Operation::kSparsePrefill, s.pool.format, s.dtype);
  }
  void expect_matches(const PrefillShape& s) {
    if (!supports(s)) return;
    PrefillProblem p(s);
    EXPECT_EQ(p.difference(p.run(backend())), "")
        << "h_q " << s.h_q << " " << kv_format_name(s.pool.format) << " topk " << s.pool.topk << " page "
        << s.pool.page_size << " naming " << static_cast<int>(s.naming) << " seed " << s.seed;
  }
};

INSTANTIATE_TEST_SUITE_P(Backends, SparsePrefill, ::testing::ValuesIn(backends_under_test()),
                         [](const auto& b) { return b.param->name(); });

TEST_P(SparsePrefill, NumericsOverShapes) {
  unsigned seed = 1;
  for (const int h_q : {1, 8, 16, 64, 100, 128}) {
    for (const int topk : {0, 128, 300}) {
      PrefillShape s{.queries = {7}, .h_q = h_q, .seed = seed++};
      // Flat tokens, as upstream has them: one page.
      s.pool = {.format = KvFormat::kBFloat16, .tokens = 400, .page_size = 400, .topk = topk};
      s.sink = seed % 2 == 0;
      s.pool.lengths = seed % 3 == 0;
      expect_matches(s);
      s.d_qk = 512;
      expect_matches(s);
    }
  }
}

TEST_P(SparsePrefill, NumericsOverFormatsAndNaming) {
  unsigned seed = 100;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const KvFormat rows = dtype == DType::kBFloat16 ? KvFormat::kBFloat16 : KvFormat::kFloat16;
    for (const KvFormat format : {rows, KvFormat::kFp8V32, KvFormat::kFp8V4, KvFormat::kFp8Tensor}) {
      for (const Naming naming : {Naming::kSlots, Naming::kFlat, Naming::kPaged}) {
        for (const int page_size : {2, 64}) {
          PrefillShape s{
              .h_q = 10, .d_qk = format == KvFormat::kFp8V4 ? 512 : 576, .naming = naming, .dtype = dtype};
          if (naming != Naming::kSlots) s.queries = {3, 0, 5, 1};
          s.pool = {
              .format = format, .tokens = 500, .page_size = page_size, .topk = 150, .lengths = seed % 2 == 0};
          s.sink = seed % 3 == 0;
          s.seed = seed++;
          expect_matches(s);
        }
      }
    }
  }
}

TEST_P(SparsePrefill, AnEmptySelection) {
  PrefillShape s{.queries = {4}, .h_q = 3, .sink = true};
  if (!supports(s)) return;
  PrefillProblem p(s);
  std::fill(p.indices.begin() + 100, p.indices.begin() + 200, -1);
  std::fill(p.indices.begin() + 200, p.indices.begin() + 300, 2000000000);
  const SparseResult r = p.run(backend());
  for (std::size_t i = 3; i < 9; ++i) {
    EXPECT_EQ(r.lse[i], kInf);
    EXPECT_EQ(r.max_logits[i], -kInf);
    for (std::size_t d = 0; d < 512; ++d) ASSERT_EQ(r.out[i * 512 + d], 0.0f);
  }
  EXPECT_EQ(p.difference(r), "");
}

TEST_P(SparsePrefill, RepeatsAreBitEqualWhateverTheNumberOfThreads) {
  const PrefillShape s{.queries = {20}};
  if (!supports(s)) return;
  PrefillProblem p(s);
  const SparseResult first = p.run(backend());
  for (int i = 0; i < 20; ++i) ASSERT_EQ(p.run(backend(), 1 + i % 4).bits, first.bits);
}

class BadPrefillInput : public ::testing::Test {
 protected:
  PrefillProblem p{{.queries = {3, 2}, .h_q = 2, .naming = Naming::kPaged, .sink = true}};
  std::vector<Bf16> out = std::vector<Bf16>(5 * 2 * 512);
  std::vector<float> max_logits = std::vector<float>(10), lse = std::vector<float>(10);
  SparsePrefillArgs a = args();
  SparsePrefillOptions options;

  SparsePrefillArgs args() {
    SparsePrefillArgs fresh = p.host_args();
    fresh.out = TensorView::contiguous(out.data(), DType::kBFloat16, {5, 2, 512});
    fresh.max_logits = TensorView::contiguous(max_logits.data(), DType::kFloat32, {5, 2});
    fresh.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {5, 2});
    return fresh;
  }

  void expect_refused(const std::string& part) {
    try {
      std::vector<std::uint8_t> memory(1 << 23);
      void* workspace = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64);
      sparse_prefill(a, workspace, memory.size() - 64, options);
      ADD_FAILURE() << "accepted, expected a message with \"" << part << "\"";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
    EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](Bf16 x) { return x.bits == 0; }));
    a = args();
    options = {};
  }
};

TEST_F(BadPrefillInput, IsNamedAndNothingIsWritten) {
  a.q.rank = 4;
  expect_refused("q is");
  a.indices.shape[0] = 4;
  expect_refused("indices.shape[0] is 4");
  a.topk_length = a.cache_seqlens;
  expect_refused("topk_length.shape[0] is 2, expected q.shape[0] (n) = 5");
  a.cu_seqlens_q = {};
  expect_refused("block_table is given without cu_seqlens_q");
  a.block_table = {};
  expect_refused("cu_seqlens_k is (none) and block_table is (none)");
  a.cache_seqlens = {};
  expect_refused("cache_seqlens is (none), expected both");
  a.max_logits.shape[1] = 3;
  expect_refused("max_logits.shape[1] is 3");
  p.starts_q = {0, 6, 5};
  expect_refused("cu_seqlens_q[2] is 5, expected at least the 6 before it");
  p.starts_q = {0, 3, 4};
  expect_refused("cu_seqlens_q[2] is 4, expected q.shape[0] = 5");
  p.starts_q = {1, 3, 5};
  expect_refused("cu_seqlens_q[0] is 1, expected 0");
  p.starts_q = {0, 3, 5};
  p.seqlens[1] = 100000;
  expect_refused("cache_seqlens[1] is 100000");
  p.seqlens[1] = 60;
  p.table[static_cast<std::size_t>(p.max_blocks)] = 77;
  std::fill(p.indices.begin(), p.indices.end(), 0);
  expect_refused("block_table[1][0] is 77");
  a.block_table = {};
  a.cache_seqlens = {};
  std::vector<std::int32_t> k{0, 5, 1000000};
  a.cu_seqlens_k = TensorView::contiguous(k.data(), DType::kInt32, {3});
  expect_refused("cu_seqlens_k[2] is 1000000, expected at most the cache's slots");
}

}  // namespace
}  // namespace flash_mla::conformance
