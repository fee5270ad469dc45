// gqa_attention: the Hopper kernel's own code, thread by thread, on the CPU, over the problems of the conformance suite.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <vector>

#include "conformance/gqa_problem.h"
#include "kernels/attention/gqa/sm90/kernel.cuh"

namespace flash_mla::sm90::gqa {

// The kernels' dynamic shared memory.
alignas(1024) std::byte dynamic_smem[227 << 10];

namespace {

using conformance::GqaLengths;
using conformance::GqaProblem;
using conformance::GqaResult;
using conformance::GqaShape;
using conformance::KeyLayout;

template <class Kernel>
void launch(const Kernel& kernel, unsigned width, unsigned height, unsigned depth, std::size_t shared_bytes,
            unsigned seed) {
  for (unsigned z = 0; z < depth; ++z) {
    for (unsigned y = 0; y < height; ++y) {
      for (unsigned x = 0; x < width; ++x) {
        std::fill(std::begin(dynamic_smem), std::end(dynamic_smem), std::byte{0xFF});
        emulated::Block block(kThreads, dynamic_smem, shared_bytes, seed++);
        block.block_index = {x, y, z};
        block.grid_size = {width, height, depth};
        block.run(kernel);
      }
    }
  }
}

template <class T, int kDqk, int kDv>
void run_kernels(const Params& p, unsigned seed) {
  const auto rows = static_cast<unsigned>(p.max_queries * p.problem.group);
  const bool scheduled = p.parts != nullptr;
  launch([&] { attention_kernel<T, kDqk, kDv>(p); }, (rows + kTileRows - 1) / kTileRows,
         static_cast<unsigned>(p.problem.h_kv),
         static_cast<unsigned>(scheduled ? p.num_parts : p.problem.batch), Shape<kDqk, kDv>::kSmem, seed);
  if (!scheduled) return;
  launch([&] { combine_kernel<T, kDqk, kDv>(p); }, 3, static_cast<unsigned>(p.problem.batch), 1,
         kWarps * (kDv + 2) * sizeof(float), seed + 7);
}

std::string difference(const GqaShape& shape) {
  GqaProblem problem(shape);
  GqaArgs a = problem.host_args();
  std::vector<std::uint16_t> out(static_cast<std::size_t>(problem.total_q * shape.h_q * shape.d_v), 0xFFFF);
  GqaResult r;
  r.lse.assign(static_cast<std::size_t>(problem.total_q * shape.h_q),
               std::numeric_limits<float>::quiet_NaN());
  a.out = TensorView::contiguous(out.data(), shape.dtype, {problem.total_q, shape.h_q, shape.d_v});
  a.lse = TensorView::contiguous(r.lse.data(), DType::kFloat32, {shape.h_q, problem.total_q});
  Params p{};
  const float scale = shape.options.softmax_scale.value_or(1.0f / std::sqrt(static_cast<float>(shape.d_qk)));
  p.problem = flash_mla::gqa::problem_of(a, shape.options, scale);
  for (const GqaLengths& l : shape.seqs) p.max_queries = std::max(p.max_queries, l.q);
  p.scale_log2 = scale * std::numbers::log2e_v<float>;
  std::vector<float> partial_out, partial_lse;
  if (shape.num_parts > 0) {
    p.parts = reinterpret_cast<const std::int32_t*>(problem.schedule.parts().data());
    p.num_splits = problem.schedule.num_splits().data();
    p.num_parts = shape.num_parts;
    p.split_blocks = shape.fixed_split_blocks;
    const auto slots = static_cast<std::size_t>(std::max(2 * shape.num_parts, p.num_splits[problem.b]));
    const auto rows = slots * static_cast<std::size_t>(p.max_queries * shape.h_q);
    partial_out.assign(rows * static_cast<std::size_t>(shape.d_v), std::numeric_limits<float>::quiet_NaN());
    partial_lse.assign(rows, std::numeric_limits<float>::quiet_NaN());
    p.partial_out = partial_out.data();
    p.partial_lse = partial_lse.data();
  }
  const auto run = [&]<int kDqk, int kDv>() {
    if (shape.dtype == DType::kBFloat16) {
      run_kernels<Bf16, kDqk, kDv>(p, shape.seed);
    } else {
      run_kernels<Fp16, kDqk, kDv>(p, shape.seed);
    }
  };
  if (shape.d_qk == 64) run.template operator()<64, 64>();
  if (shape.d_qk == 96) run.template operator()<96, 96>();
  if (shape.d_qk == 128) run.template operator()<128, 128>();
  if (shape.d_qk == 192) run.template operator()<192, 128>();
  if (shape.d_qk == 256) run.template operator()<256, 256>();
  for (const std::uint16_t bits : out) {
    r.out.push_back(shape.dtype == DType::kBFloat16 ? to_float(Bf16{bits}) : to_float(Fp16{bits}));
  }
  return problem.difference(r);
}

void expect_right(const GqaShape& shape) { EXPECT_EQ(difference(shape), "") << shape.text(); }

const std::vector<GqaLengths> kDecodes{{1, 1}, {1, 0}, {1, 129}, {1, 500}};
const std::vector<GqaLengths> kMixed{{1, 200}, {20, 20}, {5, 133}, {0, 50}, {3, 2}, {3, 0}, {7, 90}};

TEST(GqaBlock, Decodes) {
  unsigned seed = 1;
  for (const int group : {1, 8, 20}) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      expect_right(
          {.seqs = kDecodes, .h_q = group, .h_kv = 1, .dtype = dtype, .uniform = true, .seed = seed++});
      expect_right({.seqs = kDecodes,
                    .h_q = group,
                    .h_kv = 1,
                    .dtype = dtype,
                    .uniform = true,
                    .num_parts = 3,
                    .seed = seed++});
    }
  }
}

TEST(GqaBlock, HeadDimensions) {
  unsigned seed = 30;
  for (const auto& [d_qk, d_v] :
       {std::pair{64, 64}, std::pair{96, 96}, std::pair{192, 128}, std::pair{256, 256}}) {
    expect_right({.seqs = kMixed,
                  .h_q = 4,
                  .h_kv = 2,
                  .d_qk = d_qk,
                  .d_v = d_v,
                  .num_parts = 2,
                  .options = {.causal = true},
                  .seed = seed++});
  }
}

TEST(GqaBlock, LayoutsAndRules) {
  unsigned seed = 60;
  for (const KeyLayout layout :
       {KeyLayout::kRagged, KeyLayout::kStretch, KeyLayout::kTable, KeyLayout::kCsr}) {
    expect_right({.seqs = kMixed,
                  .h_q = 3,
                  .h_kv = 1,
                  .d_qk = 64,
                  .d_v = 64,
                  .layout = layout,
                  .page_size = 5,
                  .options = {.causal = true, .window_left = 30},
                  .seed = seed++});
    expect_right({.seqs = kMixed,
                  .h_q = 2,
                  .h_kv = 1,
                  .d_qk = 64,
                  .d_v = 64,
                  .layout = layout,
                  .page_size = 16,
                  .hnd = layout != KeyLayout::kRagged,
                  .sinks = true,
                  .alibi = true,
                  .mask = true,
                  .num_parts = 3,
                  .options = {.soft_cap = 20.0f},
                  .seed = seed++});
  }
}

TEST(GqaBlock, FixedSplits) {
  expect_right({.seqs = kDecodes,
                .h_q = 4,
                .h_kv = 1,
                .uniform = true,
                .num_parts = 3,
                .fixed_split_blocks = 2,
                .seed = 90});
}

}  // namespace
}  // namespace flash_mla::sm90::gqa
