// gqa_attention with many queries: the Hopper kernel's own code, thread by thread, on the CPU, over the problems of the
// conformance suite.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "conformance/gqa_problem.h"
#include "cuda_stand_in.h"
#include "kernels/attention/dense_prefill/sm90/grouped_kernel.cuh"

namespace flash_mla::sm90::prefill {

// The kernel's dynamic shared memory.
alignas(1024) std::byte grouped_smem[227 << 10];

namespace {

using conformance::GqaLengths;
using conformance::GqaProblem;
using conformance::GqaResult;
using conformance::GqaShape;
using conformance::KeyLayout;

CUtensorMap map_of(const TensorView& t, int tokens, bool chunks) {
  const int head = t.rank - 2, count = static_cast<int>(t.size(t.rank - 1)) / 64;
  const bool pages = t.rank == 4;
  return {static_cast<const std::byte*>(t.data),
          {64, t.size(pages ? 1 : 0), count, t.size(head), pages ? t.size(0) : 1},
          {2, t.stride(pages ? 1 : 0) * 2, 128, t.stride(head) * 2, t.stride(0) * 2},
          {64, tokens, chunks ? count : 1, 1, 1}};
}

CUtensorMap map_of_queries(const TensorView& q, int pack_log2) {
  const int pack = 1 << pack_log2, chunks = static_cast<int>(q.size(2)) / 64;
  return {static_cast<const std::byte*>(q.data),
          {64, pack, q.size(0), chunks, q.size(1) / pack},
          {2, q.stride(1) * 2, q.stride(0) * 2, 128, q.stride(1) * 2 * pack},
          {64, pack, kTileRows / pack, chunks, 1}};
}

template <class C, bool kBf16>
void run_kernel(const GqaArgs& a, GroupedParams p, int copy_keys, unsigned ctas, unsigned seed) {
  static_assert(sizeof(Smem<C, ptx::Element<kBf16>>) + 1024 <= sizeof(grouped_smem));
  const bool whole = copy_keys == C::kTileKeys;
  const CUtensorMap q = map_of_queries(a.q, p.pack_log2), k = map_of(a.k, copy_keys, whole),
                    v = map_of(a.v, copy_keys, whole);
  std::int32_t taken = 0;
  p.taken = &taken;
  for (unsigned x = 0; x < ctas; ++x) {
    std::fill(std::begin(grouped_smem), std::end(grouped_smem), std::byte{0xFF});
    emulated::Block block(kThreads, grouped_smem, sizeof(grouped_smem), seed + x);
    block.block_index = {x, 0, 0};
    block.grid_size = {ctas, 1, 1};
    block.run([&] { grouped_prefill_kernel<C, kBf16>(q, k, v, p); });
  }
  for (unsigned x = 0; x < 2 && C::kSplits; ++x) {
    emulated::Block block(kCombineThreads, grouped_smem, 1024, seed + x);
    block.block_index = {x, 0, 0};
    block.grid_size = {2, 1, 1};
    block.run([&] { grouped_combine<C, kBf16>(p); });
  }
}

std::string difference(const GqaShape& shape, unsigned ctas, int splits) {
  GqaProblem problem(shape);
  GqaArgs a = problem.host_args();
  std::vector<std::uint16_t> out(static_cast<std::size_t>(problem.total_q * shape.h_q * shape.d_v), 0xFFFF);
  GqaResult r;
  r.lse.assign(static_cast<std::size_t>(problem.total_q * shape.h_q),
               std::numeric_limits<float>::quiet_NaN());
  a.out = TensorView::contiguous(out.data(), shape.dtype, {problem.total_q, shape.h_q, shape.d_v});
  a.lse = TensorView::contiguous(r.lse.data(), DType::kFloat32, {shape.h_q, problem.total_q});
  const float scale = shape.options.softmax_scale.value_or(1.0f / std::sqrt(static_cast<float>(shape.d_qk)));
  const bool pages = shape.layout == KeyLayout::kTable || shape.layout == KeyLayout::kCsr;
  const auto run_as = [&]<int kDqk, int kDv, bool kSplits>() {
    using C = GroupedHeads<kDqk, kDv, kSplits>;
    const int copy_keys = pages ? std::min(shape.page_size, C::kTileKeys) : C::kTileKeys;
    GroupedParams p = grouped_params(flash_mla::gqa::problem_of(a, shape.options, scale), copy_keys);
    p.splits = splits;
    p.total_q = problem.total_q;
    const auto rows = static_cast<std::size_t>(splits * problem.total_q * shape.h_q);
    std::vector<float> partial_out(rows * kDv, std::numeric_limits<float>::quiet_NaN()), partial_lse(rows);
    p.partial_out = partial_out.data();
    p.partial_lse = partial_lse.data();
    if (shape.dtype == DType::kBFloat16) {
      run_kernel<C, true>(a, p, copy_keys, ctas, shape.seed);
    } else {
      run_kernel<C, false>(a, p, copy_keys, ctas, shape.seed);
    }
  };
  const auto run = [&]<int kDqk, int kDv>() {
    if (splits > 1) return run_as.template operator()<kDqk, kDv, true>();
    run_as.template operator()<kDqk, kDv, false>();
  };
  if (shape.d_qk == 64) run.template operator()<64, 64>();
  if (shape.d_qk == 128) run.template operator()<128, 128>();
  if (shape.d_qk == 192) run.template operator()<192, 128>();
  if (shape.d_qk == 256) run.template operator()<256, 256>();
  for (const std::uint16_t bits : out) {
    r.out.push_back(shape.dtype == DType::kBFloat16 ? to_float(Bf16{bits}) : to_float(Fp16{bits}));
  }
  return problem.difference(r);
}

void expect_right(const GqaShape& shape, unsigned ctas = 2, int splits = 1) {
  try {
    EXPECT_EQ(difference(shape, ctas, splits), "") << shape.text();
  } catch (const emulated::DeadlockError& error) {
    ADD_FAILURE() << error.what() << ": " << shape.text();
  }
}

const std::vector<GqaLengths> kMixed{{130, 300}, {1, 140}, {0, 50}, {20, 3}, {40, 0}, {129, 129}};

TEST(GroupedPrefillBlock, HeadDimensions) {
  unsigned seed = 1;
  for (const auto& [d_qk, d_v] :
       {std::pair{64, 64}, std::pair{128, 128}, std::pair{192, 128}, std::pair{256, 256}}) {
    expect_right({.seqs = kMixed,
                  .h_q = 2,
                  .h_kv = 1,
                  .d_qk = d_qk,
                  .d_v = d_v,
                  .dtype = d_qk == 128 ? DType::kFloat16 : DType::kBFloat16,
                  .layout = KeyLayout::kRagged,
                  .options = {.causal = true},
                  .seed = seed++});
  }
}

TEST(GroupedPrefillBlock, Layouts) {
  unsigned seed = 20;
  for (const KeyLayout layout : {KeyLayout::kStretch, KeyLayout::kTable, KeyLayout::kCsr}) {
    for (const int page : {8, 64, 128, 256}) {
      if (layout == KeyLayout::kStretch && page > 8) continue;
      expect_right({.seqs = {{140, 270}, {3, 9}},
                    .h_q = 3,
                    .h_kv = 3,
                    .d_qk = 64,
                    .d_v = 64,
                    .layout = layout,
                    .page_size = page,
                    .hnd = page == 64,
                    .options = {.causal = page != 128},
                    .seed = seed++});
    }
  }
}

TEST(GroupedPrefillBlock, WindowsCapsAndSinks) {
  unsigned seed = 40;
  for (const int left : {0, 30, 200}) {
    for (const int right : {0, 17}) {
      expect_right(
          {.seqs = {{200, 410}, {60, 30}, {150, 150}},
           .h_q = 2,
           .h_kv = 1,
           .d_qk = 64,
           .d_v = 64,
           .layout = KeyLayout::kTable,
           .page_size = 16,
           .sinks = left == 30,
           .options = {.window_left = left, .window_right = right, .soft_cap = right > 0 ? 20.0f : 0.0f},
           .seed = seed++});
    }
  }
  expect_right({.seqs = {{10, 700}},
                .h_q = 1,
                .h_kv = 1,
                .d_qk = 256,
                .d_v = 256,
                .layout = KeyLayout::kRagged,
                .sinks = true,
                .options = {.window_left = 100, .window_right = 5, .soft_cap = 5.0f},
                .seed = seed++});
}

TEST(GroupedPrefillBlock, HeadsOfAGroupShareATile) {
  unsigned seed = 80;
  for (const int group : {1, 3, 4, 16, 128}) {
    expect_right({.seqs = {{1, 300}, {7, 100}, {40, 40}, {0, 9}, {2, 1}},
                  .h_q = 2 * group,
                  .h_kv = 2,
                  .d_qk = 64,
                  .d_v = 64,
                  .layout = KeyLayout::kTable,
                  .page_size = 32,
                  .sinks = true,
                  .options = {.causal = group != 16, .window_left = group == 3 ? 50 : -1},
                  .seed = seed++});
  }
}

TEST(GroupedPrefillBlock, KeysInParts) {
  unsigned seed = 100;
  for (const int splits : {2, 5}) {
    for (const int left : {-1, 100}) {
      expect_right({.seqs = {{30, 700}, {1, 0}, {0, 20}, {7, 3}, {3, 260}},
                    .h_q = 4,
                    .h_kv = 2,
                    .d_qk = 64,
                    .d_v = 64,
                    .layout = splits == 2 ? KeyLayout::kRagged : KeyLayout::kTable,
                    .page_size = 64,
                    .sinks = left > 0,
                    .options = {.causal = true, .window_left = left},
                    .seed = seed++},
                   3, splits);
    }
  }
  expect_right({.seqs = {{10, 300}, {10, 200}},
                .h_q = 1,
                .h_kv = 1,
                .d_qk = 256,
                .d_v = 256,
                .uniform = true,
                .seed = seed},
               2, 3);
}

TEST(GroupedPrefillBlock, ManyItemsForFewBlocks) {
  for (unsigned seed = 60; seed < 63; ++seed) {
    expect_right({.seqs = std::vector<GqaLengths>(40, GqaLengths{5, 7}),
                  .h_q = 2,
                  .h_kv = 1,
                  .d_qk = 64,
                  .d_v = 64,
                  .layout = KeyLayout::kRagged,
                  .uniform = seed == 61,
                  .options = {.causal = true},
                  .seed = seed},
                 1);
  }
}

}  // namespace
}  // namespace flash_mla::sm90::prefill
