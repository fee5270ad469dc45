// The contracts of sparse_decode (include/flash_mla/sparse.h), on every backend.

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "base/element.h"
#include "flash_mla/error.h"
#include "flash_mla/reference.h"
#include "kv/format.h"
#include "sparse_problem.h"

namespace flash_mla::conformance {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

class SparseDecode : public ::testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {
 protected:
  BackendUnderTest& backend() { return *GetParam(); }

  bool supports(const SparseShape& s) {
    return backend().supports(Operation::kSparseDecode, s.keys.format, s.dtype) &&
           (!s.has_extra || backend().supports(Operation::kSparseDecode, s.extra.format, s.dtype));
  }

  void expect_matches(const SparseShape& s, const SparseDecodeOptions& options = {}) {
    if (!supports(s)) return;
    const SparseProblem p(s);
    EXPECT_EQ(p.difference(p.run(backend(), options), 4, 5, options), "")
        << "b " << s.b << " s_q " << s.s_q << " h_q " << s.h_q << " " << kv_format_name(s.keys.format)
        << " topk " << s.keys.topk << " page " << s.keys.page_size << " extra "
        << (s.has_extra ? kv_format_name(s.extra.format) : "none") << " sink " << s.sink << " seed "
        << s.seed;
  }
};

INSTANTIATE_TEST_SUITE_P(Backends, SparseDecode, ::testing::ValuesIn(backends_under_test()),
                         [](const auto& b) { return b.param->name(); });

// Upstream's grid: every value of every dimension, in combinations drawn at random.
TEST_P(SparseDecode, NumericsOverTheGrid) {
  constexpr std::array kHeads{1, 8, 16, 64, 100, 128};
  struct Lengths {
    int tokens, topk;
    std::array<int, 3> pages;
  };
  constexpr std::array kLengths{Lengths{512, 64, {2, 64, 69}}, Lengths{1024, 576, {2, 61, 61}},
                                Lengths{2046, 2048, {2, 64, 576}}};
  std::mt19937 rng(5);
  const auto draw = [&](int n) {
    return static_cast<std::size_t>(std::uniform_int_distribution<int>(0, n - 1)(rng));
  };
  for (unsigned seed = 0; seed < 48; ++seed) {
    SparseShape s;
    s.seed = seed;
    // The large batch has short lists and few heads: what it adds is its size.
    const bool large = seed % 12 == 11;
    s.b = large ? 74 : 4;
    s.s_q = draw(2) == 0 ? 1 : 3;
    s.h_q = large ? 8 : kHeads[seed % kHeads.size()];
    s.d_qk = seed % 2 == 0 ? 576 : 512;
    const auto fill = [&](PoolShape& pool) {
      const Lengths& l = kLengths[large ? 0 : draw(3)];
      pool.format = s.d_qk == 576 ? KvFormat::kFp8V32 : KvFormat::kFp8V4;
      pool.tokens = l.tokens;
      pool.topk = l.topk;
      pool.page_size = l.pages[draw(3)];
      pool.lengths = draw(2) == 0;
      pool.page_gap = draw(2) == 0 ? 0 : 656;
    };
    fill(s.keys);
    s.has_extra = draw(2) == 0;
    if (s.has_extra) fill(s.extra);
    s.sink = draw(2) == 0;
    s.lists = std::array{Lists::kRandom, Lists::kRandom, Lists::kClustered, Lists::kDuplicates}[draw(4)];
    s.strided = draw(4) == 0;
    expect_matches(s);
  }
}

TEST_P(SparseDecode, NumericsOverFormats) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const KvFormat rows = dtype == DType::kBFloat16 ? KvFormat::kBFloat16 : KvFormat::kFloat16;
    for (const KvFormat format : {rows, KvFormat::kFp8V32, KvFormat::kFp8V4, KvFormat::kFp8Tensor}) {
      const int d_qk = format == KvFormat::kFp8V4 ? 512 : 576;
      const PoolShape pool{.format = format, .tokens = 300, .page_size = 61, .topk = 130};
      for (const Fp8Recipe recipe : {Fp8Recipe::kFlashMla, Fp8Recipe::kVllm, Fp8Recipe::kSglang}) {
        if (recipe != Fp8Recipe::kFlashMla && format != KvFormat::kFp8V32) continue;
        SparseShape s{.h_q = 24, .d_qk = d_qk, .keys = pool, .dtype = dtype};
        s.keys.recipe = recipe;
        expect_matches(s);
        expect_matches(s, {.softmax_scale = 0.3f});
        // Two caches, one of rows.
        s.has_extra = true;
        s.extra = {.format = rows, .tokens = 100, .page_size = 7, .topk = 70, .lengths = true};
        expect_matches(s);
        std::swap(s.keys, s.extra);
        expect_matches(s, {.softmax_scale = 0.3f});
      }
    }
    expect_matches({.d_qk = 512, .keys = {.format = rows, .topk = 100}, .dtype = dtype});
  }
}

TEST_P(SparseDecode, NumericsOverTwoFormats) {
  const PoolShape v32{
      .format = KvFormat::kFp8V32, .tokens = 700, .page_size = 61, .topk = 300, .lengths = true},
      v4{.format = KvFormat::kFp8V4, .tokens = 700, .topk = 260},
      rows{.format = KvFormat::kBFloat16, .tokens = 300, .page_size = 7, .topk = 190},
      one{.format = KvFormat::kFp8Tensor, .tokens = 500, .topk = 129},
      other{.format = KvFormat::kFp8Tensor,
            .tokens = 90,
            .page_size = 2,
            .topk = 70,
            .lengths = true,
            .scale = 1.0f / 64};
  for (const int h_q : {8, 64, 100, 128}) {
    for (const int fixed : {0, 2}) {
      SparseShape s{.b = 4, .s_q = 2, .h_q = h_q, .has_extra = true, .sink = true};
      for (const auto& [first, second] : {std::pair(v32, rows), {rows, v32}, {one, other}, {v32, one}}) {
        s.keys = first;
        s.extra = second;
        expect_matches(s, {.fixed_split_blocks = fixed});
      }
      s.d_qk = 512;
      s.keys = rows;
      s.extra = v4;
      expect_matches(s, {.fixed_split_blocks = fixed});
      std::swap(s.keys, s.extra);
      s.sink = false;
      expect_matches(s, {.fixed_split_blocks = fixed});
    }
  }
  // A list of nothing beside one, more requests than workers, none at all.
  SparseShape s{.b = 74, .h_q = 8, .keys = v32, .has_extra = true, .extra = rows};
  expect_matches(s);
  s.keys.topk = 0;
  expect_matches(s);
  s.keys = v32;
  s.extra.topk = 0;
  expect_matches(s);
  s.lists = Lists::kInvalid;
  s.sink = true;
  expect_matches(s);
}

TEST_P(SparseDecode, NumericsOverListLengths) {
  for (const int topk : {0, 1, 2, 63, 65, 127, 129, 300}) {
    expect_matches({.h_q = 5, .keys = {.tokens = 400, .topk = topk}});
    expect_matches({.h_q = 5,
                    .d_qk = 512,
                    .keys = {.format = KvFormat::kFp8V4, .topk = 40, .lengths = true},
                    .has_extra = true,
                    .extra = {.format = KvFormat::kFp8V4, .page_size = 2, .topk = topk}});
  }
  expect_matches({.h_q = 130, .keys = {.topk = 70}, .sink = true});
  expect_matches({.h_q = 16, .keys = {.topk = 70}, .sink = true, .lse = false});
}

TEST_P(SparseDecode, NumericsOverSplits) {
  SparseShape s{
      .b = 1, .s_q = 2, .h_q = 9, .keys = {.tokens = 2000, .topk = 1500, .lengths = true}, .sink = true};
  s.has_extra = true;
  s.extra = {.tokens = 500, .topk = 200};
  for (const int threads : {1, 2, 3, 8}) {
    expect_matches(s, {.num_threads = threads});
    for (const int blocks : {1, 3, 100})
      expect_matches(s, {.fixed_split_blocks = blocks, .num_threads = threads});
  }
}

TEST_P(SparseDecode, AnEmptySelectionIsZeroAndInfiniteWhateverTheSink) {
  for (const int fixed : {0, 1}) {
    for (const bool by_length : {false, true}) {
      SparseShape s{.b = 4, .s_q = 3, .h_q = 6, .keys = {.topk = 256}, .sink = true};
      s.lists = by_length ? Lists::kRandom : Lists::kInvalid;
      s.keys.lengths = by_length;
      if (!supports(s)) return;
      SparseProblem p(s);
      if (by_length) p.lengths = {0, 256, 0, 5};
      const SparseResult r = p.run(backend(), {.fixed_split_blocks = fixed});
      for (const std::int64_t request : {0, 2}) {
        for (int h = 0; h < 6; ++h) {
          ASSERT_EQ(r.lse[p.lse_at(request, 1, h)], kInf);
          for (std::size_t d = 0; d < 512; ++d) ASSERT_EQ(r.out[p.out_row(request, 1, h) + d], 0.0f);
        }
      }
      EXPECT_EQ(p.difference(r, 12), "");
    }
  }
}

TEST_P(SparseDecode, TheSinkChangesOutAndNotLse) {
  SparseShape s{.h_q = 8, .keys = {.topk = 100}, .sink = true};
  if (!supports(s)) return;
  SparseProblem with(s);
  s.sink = false;
  const SparseProblem without(s);
  const SparseResult a = with.run(backend()), b = without.run(backend());
  EXPECT_EQ(a.lse, b.lse);
  for (int h = 0; h < 8; ++h) {
    const std::size_t at = with.out_row(0, 0, h);
    const float lse = a.lse[with.lse_at(0, 0, h)], sink = with.sink[static_cast<std::size_t>(h)];
    const float expected = b.out[at] / (1 + std::exp(sink - lse));  // 0 and 1 for infinite sinks
    EXPECT_NEAR(a.out[at], expected, std::abs(expected) / 64) << sink;
  }
  EXPECT_EQ(with.sink[1], kInf);
  EXPECT_EQ(a.out[with.out_row(0, 0, 1) + 5], 0.0f);
  EXPECT_EQ(a.out[with.out_row(0, 0, 2) + 5], b.out[with.out_row(0, 0, 2) + 5]);
}

TEST_P(SparseDecode, NanReachesTheRowsThatSelectItAndNoOther) {
  for (const KvFormat format : {KvFormat::kFp8V32, KvFormat::kFp8V4, KvFormat::kBFloat16}) {
    SparseShape s{.b = 2, .s_q = 2, .h_q = 3, .d_qk = format == KvFormat::kFp8V4 ? 512 : 576};
    s.keys = {.format = format, .topk = 200};
    if (!supports(s)) continue;
    SparseProblem p(s);
    p.indices[200 + 77] = 0;  // request 0, query 1: a slot of nothing but NaN
    const SparseResult r = p.run(backend());
    for (int h = 0; h < 3; ++h) {
      for (const auto& [request, i] : {std::pair{0, 0}, {0, 1}, {1, 0}, {1, 1}}) {
        const bool expected = request == 0 && i == 1;
        EXPECT_EQ(std::isnan(r.out[p.out_row(request, i, h)]), expected);
        EXPECT_EQ(std::isnan(r.lse[p.lse_at(request, i, h)]), expected);
      }
    }
  }
}

TEST_P(SparseDecode, ScoresOfMinusInfinityAreNan) {
  const SparseShape s{.b = 1, .h_q = 2, .keys = {.format = KvFormat::kBFloat16, .topk = 300}, .sink = true};
  if (!supports(s)) return;
  SparseProblem p(s);
  // The last element of every key is -inf, and that of the first query 1.
  const kv::Pool pool = kv::make_pool(p.pool.host_view());
  for (const std::int32_t slot : p.pool.live) {
    const Bf16 x = to_bf16(-kInf);
    std::memcpy(kv::locate(pool, slot).latent + 2 * 575, &x, sizeof(x));
  }
  for (std::size_t h = 0; h < 2; ++h) {
    const Bf16 x = to_bf16(1);
    std::memcpy(&p.q[(h * 576 + 575) * 2], &x, sizeof(x));
  }
  for (const int fixed : {0, 1}) {
    const SparseResult r = p.run(backend(), {.fixed_split_blocks = fixed});
    EXPECT_TRUE(std::isnan(r.out[0]) && std::isnan(r.lse[0]));
    EXPECT_EQ(p.difference(r), "");
  }
}

TEST_P(SparseDecode, RepeatsAreBitEqual) {
  SparseShape s{
      .b = 3, .s_q = 2, .h_q = 16, .keys = {.tokens = 3000, .topk = 1200, .lengths = true}, .sink = true};
  s.has_extra = true;
  s.extra = {.page_size = 2, .topk = 128};
  if (!supports(s)) return;
  const SparseProblem p(s);
  const SparseResult first = p.run(backend());
  for (int i = 0; i < 20; ++i) ASSERT_EQ(p.run(backend()).bits, first.bits);
}

/// "" or where two results differ, by request, token, head and column of `out`.
std::string where_bits_differ(const SparseShape& s, const SparseResult& a, const SparseResult& b) {
  std::string where;
  int count = 0;
  for (std::size_t i = 0; i < a.out.size(); ++i) {
    if (a.out[i] == b.out[i] || (std::isnan(a.out[i]) && std::isnan(b.out[i]))) continue;
    if (++count > 8) continue;
    const std::size_t row = i / 512, h = row % static_cast<std::size_t>(s.h_q);
    where += " (row " + std::to_string(row / static_cast<std::size_t>(s.h_q)) + ", head " +
             std::to_string(h) + ", column " + std::to_string(i % 512) + ")";
  }
  return count == 0 ? "" : std::to_string(count) + " of " + std::to_string(a.out.size()) + where;
}

TEST_P(SparseDecode, RepeatsOverFormatsAreBitEqual) {
  const PoolShape rows{.format = KvFormat::kBFloat16, .tokens = 300, .page_size = 7, .topk = 190};
  std::vector<SparseShape> shapes;
  for (const int h_q : {16, 32, 64}) {
    SparseShape s{.b = 4, .s_q = 2, .h_q = h_q};
    for (const KvFormat format : {KvFormat::kBFloat16, KvFormat::kFp8V32, KvFormat::kFp8Tensor}) {
      s.keys = {.format = format, .tokens = 700, .topk = 190};
      shapes.push_back(s);
    }
    s.d_qk = 512;
    for (const KvFormat format : {KvFormat::kBFloat16, KvFormat::kFp8V4}) {
      s.keys = {.format = format, .tokens = 700, .topk = 260};
      shapes.push_back(s);
    }
    s.has_extra = true;
    s.extra = rows;
    shapes.push_back(s);
    std::swap(s.keys, s.extra);
    shapes.push_back(s);
  }
  for (const SparseShape& s : shapes) {
    if (!supports(s)) continue;
    const SparseProblem p(s);
    const SparseResult first = p.run(backend());
    for (int i = 0; i < 20; ++i) {
      const SparseResult next = p.run(backend());
      if (next.bits == first.bits) continue;
      ADD_FAILURE() << kv_format_name(s.keys.format) << " d_qk " << s.d_qk << " h_q " << s.h_q
                    << (s.has_extra ? " and another" : "") << ": " << where_bits_differ(s, next, first);
      break;
    }
  }
}

TEST_P(SparseDecode, BatchInvariantBitsDependOnTheRowsOwnListAlone) {
  SparseShape s{.b = 5, .s_q = 1, .h_q = 16, .keys = {.tokens = 2000, .topk = 900, .lengths = true}};
  if (!supports(s) || !backend().batch_invariant()) return;
  const SparseProblem all(s);
  const SparseDecodeOptions options{.fixed_split_blocks = 4};
  const SparseResult expected = all.run(backend(), options);
  for (const auto& requests : {std::vector<std::size_t>{3}, {4, 1}, {1, 2, 3, 1}}) {
    const SparseProblem some = all.selected(requests);
    const SparseResult got = some.run(backend(), options);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const auto from = static_cast<std::int64_t>(requests[i]), to = static_cast<std::int64_t>(i);
      ASSERT_TRUE(std::equal(got.out.begin() + static_cast<std::ptrdiff_t>(some.out_row(to, 0, 0)),
                             got.out.begin() + static_cast<std::ptrdiff_t>(some.out_row(to + 1, 0, 0)),
                             expected.out.begin() + static_cast<std::ptrdiff_t>(all.out_row(from, 0, 0))))
          << "request " << from;
    }
  }
}

TEST_P(SparseDecode, SelectingEverythingEqualsDenseDecode) {
  const SparseShape s{.b = 1, .h_q = 16, .keys = {.format = KvFormat::kBFloat16, .tokens = 400, .topk = 0}};
  if (!supports(s)) return;
  SparseProblem p(s);
  // The live slots as pages of one token each.
  std::vector<std::int32_t> tokens = p.pool.live;
  const auto n = static_cast<std::int32_t>(tokens.size());
  SparseShape every = s;
  every.keys.topk = n;
  SparseProblem sparse(every);
  sparse.indices = tokens;
  const SparseResult got = sparse.run(backend());
  DenseDecodeArgs dense;
  dense.q = TensorView::contiguous(p.q.data(), DType::kBFloat16, {1, 1, 16, 576});
  dense.k_cache = p.pool.host_view().data;
  dense.k_cache.shape = {p.pool.num_pages * 64, 1, 1, 576};
  dense.k_cache.strides = {576, 576, 576, 1};
  std::vector<std::int32_t> length{n};
  dense.block_table = TensorView::contiguous(tokens.data(), DType::kInt32, {1, n});
  dense.cache_seqlens = TensorView::contiguous(length.data(), DType::kInt32, {1});
  std::vector<float> out(16 * 512), lse(16);
  dense.out = TensorView::contiguous(out.data(), DType::kFloat32, {1, 1, 16, 512});
  dense.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {1, 16, 1});
  reference::dense_decode(dense);
  EXPECT_EQ(compare("out", got.out, out, 8e-4, 2.01 / 128, 5e-6), "");
  EXPECT_EQ(compare("lse", got.lse, lse, 1e-6, 8.01 / 65536, 0), "");
}

TEST_P(SparseDecode, OrderAndTheCutIntoTwoCachesChangeNothingButRounding) {
  const SparseShape s{.b = 2, .h_q = 16, .keys = {.tokens = 2000, .topk = 640}};
  if (!supports(s)) return;
  const SparseProblem p(s);
  const SparseResult expected = p.run(backend());
  const auto expect_close = [&](const SparseResult& got) {
    EXPECT_EQ(compare("out", got.out, expected.out, 1e-3, 1.01 / 128, 5e-6), "");
    EXPECT_EQ(compare("lse", got.lse, expected.lse, 1e-6, 8.01 / 65536, 0), "");
  };
  SparseProblem shuffled = p;
  std::mt19937 rng(3);
  std::shuffle(shuffled.indices.begin(), shuffled.indices.begin() + 640, rng);
  std::sort(shuffled.indices.begin() + 640, shuffled.indices.end());
  expect_close(shuffled.run(backend()));

  SparseShape two = s;
  two.has_extra = true;
  two.extra = two.keys;
  two.keys.topk = 440;
  two.extra.topk = 200;
  SparseProblem cut(two);
  cut.q = p.q;
  cut.pool = cut.extra_pool = p.pool;
  for (std::size_t r = 0; r < 2; ++r) {
    const auto list = p.indices.begin() + static_cast<std::ptrdiff_t>(r * 640);
    std::copy_n(list, 440, cut.indices.begin() + static_cast<std::ptrdiff_t>(r * 440));
    std::copy_n(list + 440, 200, cut.extra_indices.begin() + static_cast<std::ptrdiff_t>(r * 200));
  }
  expect_close(cut.run(backend()));
}

// What a CPU test of the whole address space needs: memory that is there only where it is touched.
TEST(SparseDecodeCpu, PoolsBeyondFourGigabytes) {
  constexpr std::int64_t kPages = 110'000, kPageBytes = 64 * 656;  // 4.6 GB
  const std::size_t bytes = static_cast<std::size_t>(kPages * kPageBytes);
  void* pool =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(pool, MAP_FAILED);
  SparseProblem p({.b = 1, .keys = {.topk = 100}});
  const SparseDecodeArgs small = p.host_args();
  std::vector<std::int32_t> moved = p.indices;
  std::mt19937_64 rng(1);
  for (std::int32_t& slot : moved) {
    if (slot < 0) continue;
    const std::byte* from = kv::locate(kv::make_pool(small.keys.cache), slot).latent;
    slot = static_cast<std::int32_t>(kPages * 64 - 1 - static_cast<std::int64_t>(rng() % 1000) * 5000);
    std::memcpy(static_cast<std::byte*>(pool) + std::int64_t{slot} * 656, from, 656);
  }
  // A token that was drawn twice holds what was written last: the reference reads the same pool.
  SparseDecodeArgs a = small;
  a.keys.cache.data = TensorView::contiguous(pool, DType::kUInt8, {kPages, 64, 1, 656});
  a.keys.indices.data = moved.data();
  std::vector<Bf16> out(16 * 512);
  std::vector<float> expected(16 * 512), got;
  a.out = TensorView::contiguous(expected.data(), DType::kFloat32, {1, 1, 16, 512});
  reference::sparse_decode(a);
  a.out = TensorView::contiguous(out.data(), DType::kBFloat16, {1, 1, 16, 512});
  const std::size_t workspace_bytes = sparse_decode_workspace_size(a);
  void* workspace = std::aligned_alloc(64, (workspace_bytes + 63) / 64 * 64);
  sparse_decode(a, workspace, workspace_bytes);
  std::free(workspace);
  munmap(pool, bytes);
  for (const Bf16 x : out) got.push_back(to_float(x));
  EXPECT_EQ(compare("out", got, expected, 1e-3, 2.01 / 128, 5e-6), "");
}

class BadSparseInput : public ::testing::Test {
 protected:
  SparseProblem p{{.b = 2,
                   .s_q = 2,
                   .h_q = 6,
                   .keys = {.tokens = 200, .topk = 70, .lengths = true},
                   .has_extra = true,
                   .extra = {.tokens = 100, .page_size = 16, .topk = 20, .lengths = true},
                   .sink = true}};
  std::vector<Bf16> out;
  std::vector<float> lse;
  SparseDecodeArgs a = args();
  SparseDecodeOptions options;
  std::vector<std::uint8_t> memory = std::vector<std::uint8_t>(sparse_decode_workspace_size(a) + 64);
  void* workspace = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64);
  std::size_t bytes = memory.size() - 64;

  SparseDecodeArgs args() {
    SparseDecodeArgs fresh = p.host_args();
    out.assign(2 * 2 * 6 * 512, Bf16{0x4242});
    lse.assign(2 * 2 * 6, 42.0f);
    fresh.out = TensorView::contiguous(out.data(), DType::kBFloat16, {2, 2, 6, 512});
    fresh.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {2, 6, 2});
    return fresh;
  }

  void expect_refused(const std::string& part) {
    try {
      sparse_decode(a, workspace, bytes, options);
      ADD_FAILURE() << "accepted, expected a message with \"" << part << "\"";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
    EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](Bf16 x) { return x.bits == 0x4242; }));
    EXPECT_TRUE(std::all_of(lse.begin(), lse.end(), [](float x) { return x == 42.0f; }));
    a = args();
    options = {};
  }
};

TEST_F(BadSparseInput, IsNamedAndNothingIsWritten) {
  sparse_decode(a, workspace, bytes, options);  // what it was before each change
  a = args();
  a.q.dtype = DType::kFloat32;
  expect_refused("q is float32");
  a.q.shape[3] = 575;
  expect_refused("q.shape[3] (d_qk) is 575");
  a.q.shape[1] = 0;
  expect_refused("out.shape[1] is 2");
  a.q.shape[2] = 0;
  expect_refused("q.shape[2] (h_q) is 0");
  a.out.shape[3] = 576;
  expect_refused("out.shape[3] is 576");
  a.out.dtype = DType::kFloat16;
  expect_refused("out is float16");
  a.keys.cache.data = {};
  expect_refused("keys.cache is (none)");
  a.keys.cache.data.dtype = DType::kBFloat16;
  expect_refused("keys.cache is bfloat16");
  a.keys.cache.format = KvFormat::kFp8V4;
  expect_refused("keys.cache.shape[3] is 656, expected bytes of a token = 584");
  a.keys.cache.format = static_cast<KvFormat>(9);
  expect_refused("keys.cache.format is 9");
  a.keys.cache.data.shape[2] = 2;
  expect_refused("keys.cache.shape[2] (h_kv) is 2");
  a.keys.cache.data.shape[1] = 0;
  expect_refused("keys.cache.shape[1] (page_size) is 0");
  a.keys.cache.data.strides[3] = 2;
  expect_refused("keys.cache.stride[3] is 2");
  a.keys.indices.dtype = DType::kInt64;
  expect_refused("keys.indices is int64");
  a.keys.indices.shape[0] = 1;
  expect_refused("keys.indices.shape[0] is 1");
  a.keys.indices.shape[1] = 3;
  expect_refused("keys.indices.shape[1] is 3");
  a.keys.topk_length.shape[0] = 3;
  expect_refused("keys.topk_length.shape[0] is 3");
  a.extra.cache.format = KvFormat::kBFloat16;
  expect_refused("extra.cache is uint8");
  a.extra.cache = {};
  expect_refused("extra.cache is not given, expected one beside extra.indices");
  a.attn_sink.shape[0] = 5;
  expect_refused("attn_sink.shape[0] is 5");
  a.attn_sink.dtype = DType::kBFloat16;
  expect_refused("attn_sink is bfloat16");
  a.lse.shape[1] = 2;
  expect_refused("lse.shape[1] is 2");
  a.keys.indices.device = {DeviceType::kCuda, 0};
  expect_refused("keys.indices is int32 (2, 2, 70) on cuda:0");
  options.softmax_scale = 0.0f;
  expect_refused("softmax_scale is 0");
  options.num_threads = -1;
  expect_refused("num_threads is -1");
  options.fixed_split_blocks = -1;
  expect_refused("fixed_split_blocks is -1");
  options.backend = Backend::kSm90;
  expect_refused("q is bfloat16 (2, 2, 6, 576) on cpu");
}

TEST_F(BadSparseInput, ValuesAndWorkspace) {
  const std::int32_t slots = static_cast<std::int32_t>(p.pool.num_pages) * 64;
  p.lengths = {70, 70};
  p.extra_lengths = {20, 20};
  for (auto* list : {&p.indices, &p.extra_indices}) {
    for (std::int32_t& x : *list) x = x < 100 ? std::max(x, -1) : -1;  // the garbage past the lengths
  }
  for (const std::int32_t bad : {-2, slots, 2147483647}) {
    p.indices[70 * 3 + 69] = bad;
    a = args();
    expect_refused("keys.indices[1][1][69] is");
    p.indices[70 * 3 + 69] = -1;
  }
  p.extra_indices[0] = 7 * 16 + 16;
  a = args();
  expect_refused("extra.indices[0][0][0] is 128");
  p.extra_indices[0] = -1;
  p.lengths[1] = 71;
  a = args();
  expect_refused("keys.topk_length[1] is 71, expected 0 to keys.indices.shape[2] (topk) = 70");
  p.lengths[1] = 70;
  p.extra_lengths[0] = -1;
  a = args();
  expect_refused("extra.topk_length[0] is -1");
  p.extra_lengths[0] = 20;
  --bytes;
  expect_refused("workspace_bytes is");
  ++bytes;
  workspace = static_cast<std::uint8_t*>(workspace) + 1;
  expect_refused("workspace is");
  workspace = nullptr;
  expect_refused("workspace is null");
}

}  // namespace
}  // namespace flash_mla::conformance
