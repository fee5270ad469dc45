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
#include "sparse_problem.h"

namespace flash_mla::conformance {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

/// How entries name tokens.
enum class Naming { kSlots, kFlat, kPaged };

struct PrefillShape {
  std::vector<int> queries{9};  ///< of each request; one request for kSlots
  int h_q = 16, d_qk = 576;
  PoolShape pool{.tokens = 300, .topk = 100};
  Naming naming = Naming::kSlots;
  bool sink = false;
  DType dtype = DType::kBFloat16;
  unsigned seed = 1;
};

class PrefillProblem {
 public:
  explicit PrefillProblem(PrefillShape shape) : s(std::move(shape)) {
    n = std::accumulate(s.queries.begin(), s.queries.end(), 0);
    std::mt19937 rng(s.seed);
    std::normal_distribution<float> normal;
    const auto below = [&](int limit) { return std::uniform_int_distribution<int>(0, limit - 1)(rng); };
    for (int i = 0; i < n * s.h_q * s.d_qk; ++i) {
      const float x = normal(rng) / 2;
      std::uint16_t bits = s.dtype == DType::kBFloat16 ? to_bf16(x).bits : to_fp16(x).bits;
      q.push_back(bits);
    }
    pool = TestPool(s.pool, s.d_qk, s.dtype, s.seed + 7);
    if (s.sink) {
      for (int h = 0; h < s.h_q; ++h) sink.push_back(normal(rng) + 3);
    }
    starts_q.push_back(0);
    for (const int count : s.queries) starts_q.push_back(starts_q.back() + count);
    const auto slots = static_cast<int>(pool.num_pages) * s.pool.page_size;
    name_tokens(slots);
    for (std::size_t r = 0; r < s.queries.size(); ++r) {
      // Positions whose tokens are there.
      std::vector<std::int32_t> there;
      for (int x = 0; x < limit(r, slots); ++x) {
        const std::int64_t slot = slot_of(r, x);
        if (std::find(pool.live.begin(), pool.live.end(), slot) != pool.live.end()) there.push_back(x);
      }
      for (int i = 0; i < s.queries[r]; ++i) {
        lengths.push_back(s.pool.lengths ? (i % 3 == 0 ? 0 : below(s.pool.topk + 1)) : s.pool.topk);
        for (int j = 0; j < s.pool.topk; ++j) {
          const int kind = below(10);
          std::int32_t entry =
              there.empty() ? -1 : there[static_cast<std::size_t>(below(static_cast<int>(there.size())))];
          if (kind == 0) entry = -1;
          if (kind == 1) entry = limit(r, slots) + below(3) * 100'000'000;  // beyond the tokens: none
          if (j >= lengths.back()) entry = j % 2 == 0 ? 0 : 2147480000;
          indices.push_back(entry);
        }
      }
    }
  }

  SparsePrefillArgs host_args() {
    SparsePrefillArgs a;
    a.q = TensorView::contiguous(q.data(), s.dtype, {n, s.h_q, s.d_qk});
    a.cache = pool.host_view();
    a.indices = TensorView::contiguous(indices.data(), DType::kInt32, {n, s.pool.topk});
    if (s.pool.lengths) a.topk_length = TensorView::contiguous(lengths.data(), DType::kInt32, {n});
    if (s.sink) a.attn_sink = TensorView::contiguous(sink.data(), DType::kFloat32, {s.h_q});
    const auto b = static_cast<std::int64_t>(s.queries.size());
    if (s.naming != Naming::kSlots)
      a.cu_seqlens_q = TensorView::contiguous(starts_q.data(), DType::kInt32, {b + 1});
    if (s.naming == Naming::kFlat)
      a.cu_seqlens_k = TensorView::contiguous(starts_k.data(), DType::kInt32, {b + 1});
    if (s.naming == Naming::kPaged) {
      a.block_table = TensorView::contiguous(table.data(), DType::kInt32, {b, max_blocks});
      a.cache_seqlens = TensorView::contiguous(seqlens.data(), DType::kInt32, {b});
    }
    return a;
  }

  SparseResult run(BackendUnderTest& backend, int num_threads = 2) {
    SparsePrefillArgs a = host_args();
    std::vector<std::unique_ptr<Guarded>> memory;
    const auto upload = [&](TensorView& v, std::size_t bytes, const void* from) {
      memory.push_back(std::make_unique<Guarded>(backend, bytes));
      memory.back()->upload(from);
      v.data = memory.back()->data();
      v.device = backend.device();
      return memory.back().get();
    };
    for (TensorView* v : {&a.q, &a.indices, &a.topk_length, &a.attn_sink, &a.cu_seqlens_q, &a.cu_seqlens_k,
                          &a.block_table, &a.cache_seqlens}) {
      if (v->defined()) upload(*v, static_cast<std::size_t>(v->numel()) * dtype_size(v->dtype), v->data);
    }
    upload(a.cache.data, pool.bytes.size(), pool.bytes.data());
    std::vector<std::uint8_t> out_fill(static_cast<std::size_t>(n * s.h_q * 512) * 2, 0xFF);
    std::vector<float> fill(static_cast<std::size_t>(n * s.h_q), std::numeric_limits<float>::quiet_NaN());
    a.out = TensorView::contiguous(nullptr, s.dtype, {n, s.h_q, 512});
    a.max_logits = a.lse = TensorView::contiguous(nullptr, DType::kFloat32, {n, s.h_q});
    const Guarded* out = upload(a.out, out_fill.size(), out_fill.data());
    const Guarded* max_logits = upload(a.max_logits, fill.size() * 4, fill.data());
    const Guarded* lse = upload(a.lse, fill.size() * 4, fill.data());
    const SparsePrefillOptions options{.num_threads = num_threads};
    const std::size_t bytes = sparse_prefill_workspace_size(a, options);
    Guarded workspace(backend, bytes);
    const std::vector<std::uint8_t> poison(bytes, 0xFF);
    workspace.upload(poison.data());
    sparse_prefill(a, workspace.data(), bytes, options);
    workspace.download();
    SparseResult r;
    r.bits = out->download();
    for (std::size_t i = 0; i < r.bits.size(); i += 2) {
      std::uint16_t bits = 0;
      std::memcpy(&bits, &r.bits[i], 2);
      r.out.push_back(s.dtype == DType::kBFloat16 ? to_float(Bf16{bits}) : to_float(Fp16{bits}));
    }
    const auto floats = [&](const Guarded* from, std::vector<float>& to) {
      const std::vector<std::uint8_t> raw = from->download();
      to.resize(raw.size() / 4);
      std::memcpy(to.data(), raw.data(), raw.size());
      r.bits.insert(r.bits.end(), raw.begin(), raw.end());
    };
    floats(max_logits, r.max_logits);
    floats(lse, r.lse);
    return r;
  }

  std::string difference(const SparseResult& got) {
    SparsePrefillArgs a = host_args();
    std::vector<float> out(got.out.size()), max_logits(got.lse.size()), lse(got.lse.size());
    a.out = TensorView::contiguous(out.data(), DType::kFloat32, {n, s.h_q, 512});
    a.max_logits = TensorView::contiguous(max_logits.data(), DType::kFloat32, {n, s.h_q});
    a.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {n, s.h_q});
    reference::sparse_prefill(a);
    std::string text = compare("out", got.out, out, 8e-4, 3.01 / 128, 7e-6);
    if (text.empty()) text = compare("max_logits", got.max_logits, max_logits, 1e-6, 2.01 / 65536, 0);
    return text.empty() ? compare("lse", got.lse, lse, 1e-6, 2.01 / 65536, 0) : text;
  }

  PrefillShape s;
  int n = 0;
  std::vector<std::uint16_t> q;
  TestPool pool;
  std::vector<float> sink;
  std::vector<std::int32_t> indices, lengths, starts_q, starts_k, table, seqlens;
  std::int64_t max_blocks = 0;

 private:
  // The tokens of each request: all slots, a run of slots, or some of the pages in any order.
  void name_tokens(int slots) {
    const auto b = static_cast<int>(s.queries.size());
    std::mt19937 rng(s.seed + 1);
    for (int r = 0; r <= b; ++r) starts_k.push_back(3 + (slots - 5) * r / b);
    std::vector<std::int32_t> pages(static_cast<std::size_t>(pool.num_pages));
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), rng);
    max_blocks = pool.num_pages / b + 1;
    table.assign(static_cast<std::size_t>(b * max_blocks), 2147480000);
    std::size_t next = 0;
    for (int r = 0; r < b; ++r) {
      const std::int64_t blocks = pool.num_pages / b;
      for (std::int64_t j = 0; j < blocks; ++j)
        table[static_cast<std::size_t>(r * max_blocks + j)] = pages[next++];
      seqlens.push_back(static_cast<std::int32_t>(std::max<std::int64_t>(blocks * s.pool.page_size - r, 0)));
    }
  }

  std::int32_t limit(std::size_t r, int slots) const {
    return s.naming == Naming::kSlots  ? slots
           : s.naming == Naming::kFlat ? starts_k[r + 1] - starts_k[r]
                                       : seqlens[r];
  }

  std::int64_t slot_of(std::size_t r, int position) const {
    if (s.naming == Naming::kSlots) return position;
    if (s.naming == Naming::kFlat) return starts_k[r] + position;
    const auto block =
        static_cast<std::size_t>(static_cast<std::int64_t>(r) * max_blocks + position / s.pool.page_size);
    return std::int64_t{table[block]} * s.pool.page_size + position % s.pool.page_size;
  }
};

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
