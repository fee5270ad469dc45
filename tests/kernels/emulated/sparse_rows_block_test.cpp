// Sparse decode over 656-byte rows: the Hopper kernel's own code, thread by thread, on the CPU, over the problems of the
// conformance suite.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numbers>
#include <vector>

#include "combine.h"
#include "conformance/sparse_problem.h"
#include "flash_mla/schedule.h"
#include "kernels/attention/sparse_decode/sm90/rows_kernel.cuh"

namespace flash_mla::sm90::sparse {

// The kernel's dynamic shared memory.
alignas(1024) std::byte dynamic_smem[227 << 10];

namespace {

using conformance::Lists;
using conformance::PoolShape;
using conformance::SparseProblem;
using conformance::SparseResult;
using conformance::SparseShape;

ListedKeys listed(const SparseKeys& keys) {
  ListedKeys k{};
  if (!keys.defined()) return k;
  const kv::Pool pool = kv::make_pool(keys.cache);
  k.cache = pool.data;
  k.page_units = static_cast<std::uint32_t>(pool.page_stride / 16);
  k.token_units = static_cast<std::uint32_t>(pool.token_stride / 16);
  set_page_size(k, static_cast<int>(pool.page_size));
  k.topk = static_cast<int>(keys.indices.size(2));
  k.indices = keys.indices.ptr<const std::int32_t>();
  k.indices_stride_b = keys.indices.stride(0);
  k.indices_stride_s = keys.indices.stride(1);
  if (keys.topk_length.defined()) k.topk_length = keys.topk_length.ptr<const std::int32_t>();
  return k;
}

struct Run {
  int num_parts = 2, fixed_split_blocks = 0;
  unsigned seed = 1;
};

template <class Format, int kHeads, bool kBf16>
void launch(const SparseDecodeParams& p, const QueryView& q, unsigned seed) {
  static_assert(sizeof(raw_rows::Smem<Format, kHeads>) + 1024 <= sizeof(dynamic_smem));
  for (int z = 0; z < p.num_parts; ++z) {
    for (int x = 0; x < p.blocks.count(); ++x) {
      std::fill(std::begin(dynamic_smem), std::end(dynamic_smem), std::byte{0xFF});
      emulated::Block block(raw_rows::kThreads, dynamic_smem, sizeof(dynamic_smem),
                            seed + static_cast<unsigned>(100 * z + x));
      block.block_index = {static_cast<unsigned>(x), 0, static_cast<unsigned>(z)};
      block.run([&] { sparse_decode_rows_kernel<Format, kHeads, kBf16>(q, p); });
    }
  }
}

template <class Format, bool kBf16>
SparseResult decode(const SparseProblem& problem, const Run& run) {
  const SparseShape& s = problem.shape();
  SparseDecodeArgs a = problem.host_args();
  SparseDecodeParams p{};
  const int heads = std::min(s.h_q, kTileRows);
  p.blocks = {1, heads, (s.h_q + heads - 1) / heads, s.s_q};
  p.batch = s.b;
  p.s_q = s.s_q;
  p.h_q = p.group = s.h_q;
  p.num_parts = run.num_parts;
  p.split_tiles = run.fixed_split_blocks;
  p.scale_log2 = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(s.d_qk));
  p.keys[0] = listed(a.keys);
  p.keys[1] = listed(a.extra);
  if (s.sink) p.attn_sink = a.attn_sink.ptr<const float>();
  std::vector<std::int32_t> tokens;
  for (int r = 0; r < s.b; ++r) {
    int tiles = 0;
    for (const ListedKeys& k : p.keys) tiles += tiles_of(list_length(k, r));
    tokens.push_back(tiles * kTileTokens);
  }
  const auto plan = DecodeSchedule::build(
      tokens, {.num_parts = run.num_parts, .fixed_split_blocks = run.fixed_split_blocks});
  p.parts = reinterpret_cast<const std::int32_t*>(plan.parts().data());
  p.num_splits = plan.num_splits().data();

  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const auto rows = static_cast<std::size_t>(s.b * s.s_q * s.h_q);
  std::vector<std::uint16_t> out(rows * 512, 0xFFFF);
  SparseResult result;
  result.lse.assign(rows, kNan);
  p.out = out.data();
  p.out_stride_h = 512;
  p.out_stride_s = s.h_q * p.out_stride_h;
  p.out_stride_b = s.s_q * p.out_stride_s;
  p.lse = result.lse.data();
  p.lse_stride_s = 1;
  p.lse_stride_h = s.s_q;
  p.lse_stride_b = s.h_q * p.lse_stride_h;
  const auto slots = std::max<std::size_t>(2 * static_cast<std::size_t>(run.num_parts),
                                           static_cast<std::size_t>(plan.num_splits().back()));
  const std::size_t partial_rows =
      slots * static_cast<std::size_t>(p.blocks.count() * row_groups(p.blocks)) * 16;
  std::vector<float> partial_out(partial_rows * 512, kNan), partial_stats(partial_rows * 2, kNan);
  p.partial_out = partial_out.data();
  p.partial_stats = partial_stats.data();

  const QueryView q{a.q.ptr<const std::uint16_t>(), a.q.stride(0), a.q.stride(1), a.q.stride(2)};
  if (heads <= 16) {
    launch<Format, 16, kBf16>(p, q, run.seed);
  } else if (heads <= 32) {
    launch<Format, 32, kBf16>(p, q, run.seed);
  } else {
    launch<Format, 64, kBf16>(p, q, run.seed);
  }
  emulated::combine(p, s.b, kBf16, p.attn_sink);
  for (const std::uint16_t x : out)
    result.out.push_back(kBf16 ? emulated::Block::bf16_to_float(x) : emulated::Block::half_to_float(x));
  return result;
}

template <class Format, bool kBf16>
void expect_right_over(const SparseShape& shape, const Run& run) {
  const SparseProblem problem(shape);
  EXPECT_EQ(problem.difference(decode<Format, kBf16>(problem, run), 100, 128), "");
}

void expect_right(const SparseShape& shape, const Run& run = {}) {
  using namespace raw_rows;
  const bool bf16 = shape.dtype == DType::kBFloat16;
  const auto over = [&]<class Format>(Format) {
    bf16 ? expect_right_over<Format, true>(shape, run) : expect_right_over<Format, false>(shape, run);
  };
  if (shape.keys.format == KvFormat::kFp8V32) return over(V32Rows{});
  if (shape.keys.format == KvFormat::kFp8V4) return over(V4Rows{});
  shape.d_qk == 576 ? over(WideRows<576>{}) : over(WideRows<512>{});
}

TEST(SparseRowsBlock, OneTile) { expect_right({.b = 1, .keys = {.topk = 64}}, {.num_parts = 1}); }
TEST(SparseRowsBlock, Heads64) { expect_right({.b = 1, .h_q = 64, .keys = {.topk = 200}}, {.num_parts = 1}); }
TEST(SparseRowsBlock, Heads32) { expect_right({.b = 1, .h_q = 32, .keys = {.topk = 200}}, {.num_parts = 1}); }
TEST(SparseRowsBlock, BlocksOf100Heads) {
  expect_right({.b = 1, .s_q = 2, .h_q = 100, .keys = {.topk = 70}}, {.num_parts = 1});
}
TEST(SparseRowsBlock, FewHeads) { expect_right({.b = 2, .h_q = 5, .keys = {.topk = 130}}); }
TEST(SparseRowsBlock, AnyOrderOfThreads) {
  for (unsigned seed = 1; seed <= 6; ++seed) {
    expect_right({.b = 3, .keys = {.topk = 450, .lengths = true}, .seed = seed},
                 {.num_parts = 2, .seed = seed});
  }
}
TEST(SparseRowsBlock, ListsOfAllKinds) {
  for (const Lists lists : {Lists::kInvalid, Lists::kDuplicates, Lists::kClustered}) {
    expect_right({.b = 2, .sink = true, .lists = lists});
  }
}
TEST(SparseRowsBlock, TwoCaches) {
  expect_right({.b = 3,
                .s_q = 2,
                .keys = {.page_size = 2, .topk = 100, .lengths = true, .page_gap = 32},
                .has_extra = true,
                .extra = {.tokens = 1024, .page_size = 61, .topk = 200, .lengths = true},
                .sink = true},
               {.num_parts = 3});
}
TEST(SparseRowsBlock, FixedSplits) {
  expect_right({.b = 3, .h_q = 20, .keys = {.topk = 576, .lengths = true}, .sink = true},
               {.num_parts = 3, .fixed_split_blocks = 2});
}
TEST(SparseRowsBlock, V4) {
  constexpr PoolShape kPool{.format = KvFormat::kFp8V4, .page_size = 61, .topk = 200, .page_gap = 32};
  for (const int h_q : {16, 32, 64, 100})
    expect_right({.b = 1, .h_q = h_q, .d_qk = 512, .keys = kPool}, {.num_parts = 1});
  expect_right(
      {.b = 3,
       .s_q = 2,
       .d_qk = 512,
       .keys = kPool,
       .has_extra = true,
       .extra = {.format = KvFormat::kFp8V4, .tokens = 700, .page_size = 2, .topk = 130, .lengths = true},
       .sink = true},
      {.num_parts = 3});
  expect_right({.b = 1, .h_q = 20, .d_qk = 512, .keys = kPool, .dtype = DType::kFloat16});
}
TEST(SparseRowsBlock, WideRows) {
  for (const int d_qk : {576, 512}) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      const KvFormat format = dtype == DType::kBFloat16 ? KvFormat::kBFloat16 : KvFormat::kFloat16;
      for (const int h_q : {16, 20, 64}) {
        expect_right(
            {.b = 2,
             .h_q = h_q,
             .d_qk = d_qk,
             .keys = {.format = format, .page_size = 61, .topk = 150, .lengths = true, .page_gap = 32},
             .sink = true,
             .dtype = dtype});
      }
    }
  }
}
TEST(SparseRowsBlock, Float16Queries) {
  expect_right({.b = 2, .h_q = 64, .keys = {.topk = 150}, .dtype = DType::kFloat16});
}
// Padding of a caller's heads may hold anything.
TEST(SparseRowsBlock, AHeadsSizeIsItsOwn) {
  SparseProblem problem({.b = 1, .h_q = 32, .keys = {.topk = 130}});
  SparseResult plain = decode<raw_rows::V32Rows, true>(problem, {.num_parts = 1});
  for (std::size_t i = 3 * 576; i < 4 * 576; ++i) {
    const std::uint16_t bits = i % 2 == 0 ? 0x7149 : 0xFFFF;  // 1e30, NaN
    std::memcpy(&problem.q[2 * i], &bits, 2);
  }
  SparseResult got = decode<raw_rows::V32Rows, true>(problem, {.num_parts = 1});
  std::fill_n(plain.out.begin() + 3 * 512, 512, 0.0f);
  std::fill_n(got.out.begin() + 3 * 512, 512, 0.0f);
  plain.lse[3] = got.lse[3] = 0.0f;
  EXPECT_EQ(conformance::compare("out", got.out, plain.out, 1e-4, 1.01 / 128, 1e-6), "");
  EXPECT_EQ(conformance::compare("lse", got.lse, plain.lse, 1e-5, 1e-6, 0), "");
}
TEST(SparseRowsBlock, Recipes) {
  for (const Fp8Recipe recipe : {Fp8Recipe::kVllm, Fp8Recipe::kSglang}) {
    expect_right({.b = 1, .keys = {.topk = 140, .recipe = recipe}}, {.num_parts = 1});
  }
}

}  // namespace
}  // namespace flash_mla::sm90::sparse
