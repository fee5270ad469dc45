// Dense decode over FP8 caches: the Hopper kernel's own code, thread by thread, on the CPU (tests/kernels/emulated), with
// what its combine kernel does to partial results done here, against the definition.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "combine.h"
#include "flash_mla/dense_fp8.h"
#include "flash_mla/reference.h"
#include "flash_mla/schedule.h"
#include "kernels/attention/dense_fp8_decode/sm90/kernel.cuh"

namespace flash_mla::sm90::dense_fp8 {

// The kernel's dynamic shared memory.
alignas(1024) std::byte dynamic_smem[228 << 10];

namespace {

struct Shape {
  std::vector<std::int32_t> lengths;
  int s_q = 1, h_q = 16, page_size = 64;
  KvFormat format = KvFormat::kFp8V32;
  bool bf16 = true, causal = false;
  Fp8Recipe recipe = Fp8Recipe::kFlashMla;
  int num_parts = 2, fixed_split_blocks = 0;
  unsigned seed = 1;
  float spread = 0.1f;  // of the latents
};

struct Problem {
  explicit Problem(Shape shape) : s(std::move(shape)) {
    std::mt19937 rng(s.seed);
    std::normal_distribution<float> normal;
    b = static_cast<std::int64_t>(s.lengths.size());
    std::int64_t pages = 0;
    for (const std::int32_t n : s.lengths) {
      const std::int64_t own = (n + s.page_size - 1) / s.page_size;
      pages += own;
      max_blocks = std::max(max_blocks, own + 1);
    }
    width = s.format == KvFormat::kFp8V32 ? 656 : 576;
    page_stride = std::int64_t{s.page_size} * width + 64;
    // NaN wherever no token is.
    bytes.assign(static_cast<std::size_t>((pages + 1) * page_stride) + 16, 0xFF);
    std::vector<std::int32_t> order(static_cast<std::size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    table.assign(static_cast<std::size_t>(b * max_blocks), -1);
    std::vector<std::int64_t> slots;
    std::size_t next = 0;
    for (std::int64_t r = 0; r < b; ++r) {
      for (std::int32_t j = 0; j < s.lengths[static_cast<std::size_t>(r)]; ++j) {
        auto& page = table[static_cast<std::size_t>(r * max_blocks + j / s.page_size)];
        if (j % s.page_size == 0) page = order[next++];
        slots.push_back(std::int64_t{page} * s.page_size + j % s.page_size);
      }
    }
    const auto n = static_cast<std::int64_t>(slots.size());
    std::vector<float> latents(static_cast<std::size_t>(n * 512)), ropes(static_cast<std::size_t>(n * 64));
    for (std::size_t i = 0; i < latents.size(); ++i) {
      // Tiles of zeros, and tiles a thousand times as large as others.
      const std::size_t tile = i / 128;
      latents[i] = tile % 13 == 5 ? 0.0f : normal(rng) * s.spread * (tile % 7 == 3 ? 1e-3f : 1.0f);
    }
    for (float& x : ropes) x = normal(rng) / 10;
    KvAppendArgs a;
    a.latent = TensorView::contiguous(latents.data(), DType::kFloat32, {n, 512});
    a.rope = TensorView::contiguous(ropes.data(), DType::kFloat32, {n, 64});
    a.slot_mapping = TensorView::contiguous(slots.data(), DType::kInt64, {n});
    a.cache = cache();
    a.recipe = s.recipe;
    append_kv(a);
    const std::int64_t rows = b * s.s_q * s.h_q;
    for (std::int64_t i = 0; i < rows * 576; ++i) {
      const float x = normal(rng) * (i / 576 % 3 == 1 ? 4.0f : 0.5f);
      q.push_back(s.bf16 ? emulated::to_bf16(x).bits : emulated::to_half(x).bits);
    }
    out.assign(static_cast<std::size_t>(rows * 512), 0xFFFF);
    lse.assign(static_cast<std::size_t>(rows), std::numeric_limits<float>::quiet_NaN());
    ScheduleOptions options{.num_parts = s.num_parts, .fixed_split_blocks = s.fixed_split_blocks};
    plan.emplace(DecodeSchedule::build(s.lengths, options));
  }

  KvCacheView cache() {
    KvCacheView v;
    v.format = s.format;
    v.scale = 1.0f / 256;
    const auto pages = static_cast<std::int64_t>(bytes.size() / static_cast<std::size_t>(page_stride));
    // Rows of kFp8Tensor, 576 bytes, begin at multiples of 16 as those of 656 do.
    v.data = TensorView::contiguous(bytes.data(), DType::kUInt8, {pages, s.page_size, 1, width});
    v.data.strides[0] = page_stride;
    return v;
  }

  DenseFp8Params params() {
    DenseFp8Params p{};
    p.blocks = row_blocks(s.s_q, s.h_q);
    p.batch = static_cast<int>(b);
    p.s_q = s.s_q;
    p.h_q = p.group = s.h_q;
    p.page_size = s.page_size;
    p.table_width = static_cast<int>(max_blocks);
    p.num_parts = s.num_parts;
    p.split_tiles = s.fixed_split_blocks;
    p.causal = s.causal && s.s_q > 1;
    p.scale_log2 = kScale * 1.44269504f;
    p.block_table = table.data();
    p.block_table_stride = max_blocks;
    p.cache_seqlens = s.lengths.data();
    p.parts = reinterpret_cast<const std::int32_t*>(plan->parts().data());
    p.num_splits = plan->num_splits().data();
    p.out = out.data();
    p.out_stride_h = 512;
    p.out_stride_s = std::int64_t{s.h_q} * 512;
    p.out_stride_b = s.s_q * p.out_stride_s;
    p.lse = lse.data();
    p.lse_stride_s = 1;
    p.lse_stride_h = s.s_q;
    p.lse_stride_b = std::int64_t{s.h_q} * s.s_q;
    const std::int64_t slots = std::max<std::int64_t>(2 * s.num_parts, plan->num_splits().back());
    const auto rows = static_cast<std::size_t>(slots * p.blocks.count() * row_groups(p.blocks) * 16);
    partial_out.assign(rows * 512, std::numeric_limits<float>::quiet_NaN());
    partial_stats.assign(rows * 2, std::numeric_limits<float>::quiet_NaN());
    p.partial_out = partial_out.data();
    p.partial_stats = partial_stats.data();
    p.cache = reinterpret_cast<const std::byte*>(bytes.data());
    p.page_stride = page_stride;
    p.token_stride = width;
    p.whole_tiles = s.format == KvFormat::kFp8V32 && s.page_size % kTileTokens == 0;
    p.cache_scale = s.format == KvFormat::kFp8Tensor ? cache().scale : 1.0f;
    return p;
  }

  template <class Rows, bool kBf16, int kHeads>
  void launch(const DenseFp8Params& p) {
    const QueryView view{q.data(), std::int64_t{s.s_q} * s.h_q * 576, std::int64_t{s.h_q} * 576, 576};
    for (int z = 0; z < s.num_parts; ++z) {
      for (int x = 0; x < p.blocks.count(); ++x) {
        std::fill(std::begin(dynamic_smem), std::end(dynamic_smem), std::byte{0xFF});
        emulated::Block block(raw_rows::kThreads, dynamic_smem, sizeof(dynamic_smem),
                              s.seed + static_cast<unsigned>(100 * z + x));
        block.block_index = {static_cast<unsigned>(x), 0, static_cast<unsigned>(z)};
        block.run([&] { dense_fp8_decode_kernel<Rows, kHeads, kBf16>(view, p); });
      }
    }
  }
  template <class Rows, bool kBf16>
  void launch(const DenseFp8Params& p) {
    const int rows = p.blocks.tokens * p.blocks.heads;
    rows <= 16   ? launch<Rows, kBf16, 16>(p)
    : rows <= 32 ? launch<Rows, kBf16, 32>(p)
                 : launch<Rows, kBf16, 64>(p);
  }

  void run() {
    const DenseFp8Params p = params();
    if (s.format == KvFormat::kFp8V32) {
      s.bf16 ? launch<raw_rows::V32Rows, true>(p) : launch<raw_rows::V32Rows, false>(p);
    } else {
      s.bf16 ? launch<raw_rows::TensorRows, true>(p) : launch<raw_rows::TensorRows, false>(p);
    }
    emulated::combine(p, static_cast<int>(b), s.bf16);
  }

  void expect_right() {
    DenseFp8DecodeArgs a;
    a.q =
        TensorView::contiguous(q.data(), s.bf16 ? DType::kBFloat16 : DType::kFloat16, {b, s.s_q, s.h_q, 576});
    a.cache = cache();
    a.block_table = TensorView::contiguous(table.data(), DType::kInt32, {b, max_blocks});
    a.cache_seqlens = TensorView::contiguous(s.lengths.data(), DType::kInt32, {b});
    std::vector<float> ref(out.size()), ref_lse(lse.size());
    a.out = TensorView::contiguous(ref.data(), DType::kFloat32, {b, s.s_q, s.h_q, 512});
    a.lse = TensorView::contiguous(ref_lse.data(), DType::kFloat32, {b, s.h_q, s.s_q});
    DenseFp8DecodeOptions options;
    options.causal = s.causal;
    options.softmax_scale = kScale;
    reference::dense_fp8_decode(a, options);
    double worst = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      const float x =
          s.bf16 ? emulated::Block::bf16_to_float(out[i]) : emulated::Block::half_to_float(out[i]);
      if (std::isnan(ref[i])) {
        ASSERT_TRUE(std::isnan(x)) << i;
        continue;
      }
      const double error = std::abs(double{x} - ref[i]);
      // An element passes by either bound, as in the conformance suite, whose latents have a deviation of 0.1.
      ASSERT_TRUE(error <= 8e-4 * s.spread / 0.1 || error <= 2.01 / 128 * std::abs(ref[i]))
          << i << ": " << x << ", expected " << ref[i];
      worst = std::max(worst, error);
    }
    for (std::size_t i = 0; i < lse.size(); ++i) {
      if (std::isinf(ref_lse[i]) || std::isnan(ref_lse[i])) {
        ASSERT_TRUE(lse[i] == ref_lse[i] || (std::isnan(lse[i]) && std::isnan(ref_lse[i]))) << i;
        continue;
      }
      ASSERT_NEAR(lse[i], ref_lse[i], 1e-3 + 1.2e-4 * std::abs(ref_lse[i])) << i;
    }
    testing::Test::RecordProperty("worst", std::to_string(worst));
  }

  static constexpr float kScale = 0.0721688f;
  Shape s;
  std::int64_t b = 0, max_blocks = 1, page_stride = 0, width = 656;
  std::vector<std::uint8_t> bytes;
  std::vector<std::int32_t> table;
  std::vector<std::uint16_t> q, out;
  std::vector<float> lse, partial_out, partial_stats;
  std::optional<DecodeSchedule> plan;
};

void expect_right(Shape shape) {
  Problem p(std::move(shape));
  p.run();
  p.expect_right();
}

TEST(DenseFp8Block, OneTile) { expect_right({.lengths = {64}, .num_parts = 1}); }
TEST(DenseFp8Block, Heads64) { expect_right({.lengths = {200}, .h_q = 64, .num_parts = 1}); }
TEST(DenseFp8Block, Heads32) { expect_right({.lengths = {129}, .h_q = 32, .num_parts = 1}); }
TEST(DenseFp8Block, RowBlocksOf100Heads) { expect_right({.lengths = {70}, .h_q = 100, .num_parts = 1}); }

TEST(DenseFp8Block, RequestsOfAllLengths) {
  expect_right({.lengths = {1, 63, 0, 64, 65, 127, 128, 129, 192, 193, 320, 500}, .h_q = 8, .num_parts = 3});
}
TEST(DenseFp8Block, AnyOrderOfThreads) {
  for (unsigned seed = 1; seed <= 6; ++seed) {
    expect_right({.lengths = {450, 70, 0, 130}, .h_q = 16, .num_parts = 2, .seed = seed});
  }
}
TEST(DenseFp8Block, CausalTokens) {
  expect_right({.lengths = {130, 2, 0, 1, 64}, .s_q = 3, .h_q = 16, .causal = true, .num_parts = 2});
  expect_right({.lengths = {67}, .s_q = 5, .h_q = 5, .causal = true, .num_parts = 1});
}
TEST(DenseFp8Block, Pages) {
  for (const int page_size : {1, 16, 48, 128}) {
    expect_right({.lengths = {150, 33}, .h_q = 16, .page_size = page_size, .num_parts = 2});
  }
}
TEST(DenseFp8Block, FixedSplits) {
  expect_right({.lengths = {450, 0, 64, 200}, .h_q = 20, .num_parts = 3, .fixed_split_blocks = 2});
}
TEST(DenseFp8Block, TensorScale) {
  expect_right({.lengths = {300, 5}, .h_q = 16, .format = KvFormat::kFp8Tensor, .num_parts = 3});
  expect_right({.lengths = {100}, .h_q = 64, .format = KvFormat::kFp8Tensor, .bf16 = false, .num_parts = 1});
}
TEST(DenseFp8Block, Float16Queries) {
  expect_right({.lengths = {140}, .h_q = 16, .bf16 = false, .num_parts = 1});
}
TEST(DenseFp8Block, PlainScales) {
  expect_right({.lengths = {140}, .recipe = Fp8Recipe::kVllm, .num_parts = 1});
  expect_right({.lengths = {140}, .recipe = Fp8Recipe::kSglang, .num_parts = 1});
}
TEST(DenseFp8Block, ReferencesThatMove) {
  expect_right({.lengths = {500}, .h_q = 16, .num_parts = 1, .spread = 8.0f});
}

TEST(DenseFp8Block, NanOfAKeyReachesItsRequestAlone) {
  Problem p({.lengths = {100, 100}, .h_q = 16, .num_parts = 1});
  // Element 5 of token 3 of the first request's second page.
  p.bytes[static_cast<std::size_t>(p.table[1] * p.page_stride + 3 * p.width + 5)] = 0x7F;
  p.run();
  p.expect_right();
}

}  // namespace
}  // namespace flash_mla::sm90::dense_fp8
