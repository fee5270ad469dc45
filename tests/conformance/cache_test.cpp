// append_kv, gather_kv and quantise_fp8 (include/flash_mla/kv_cache.h, quantise.h), bit for bit, on every
// backend.

#include <gtest/gtest.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <random>

#include "base/element.h"
#include "base/fp8.h"
#include "cache_reference.h"
#include "flash_mla/error.h"
#include "guarded.h"
#include "kernels/quant/recipe.h"
#include "sparse_problem.h"

namespace flash_mla::conformance {
namespace {

class Cache : public CacheTest {};

INSTANTIATE_TEST_SUITE_P(Backends, Cache, ::testing::ValuesIn(backends_under_test()),
                         [](const auto& b) { return b.param->name(); });

TEST_P(Cache, NumericsOfAppendAreTheRecipesBits) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const KvFormat format : {KvFormat::kBFloat16, KvFormat::kFloat16, KvFormat::kFp8V32,
                                  KvFormat::kFp8V4, KvFormat::kFp8Tensor}) {
      if (!backend().supports(Operation::kAppend, format, dtype)) continue;
      for (const Fp8Recipe recipe : {Fp8Recipe::kFlashMla, Fp8Recipe::kVllm, Fp8Recipe::kSglang}) {
        if (recipe != Fp8Recipe::kFlashMla && format != KvFormat::kFp8V32) continue;
        const PoolShape shape{.format = format, .tokens = 200, .page_size = 13, .page_gap = 48};
        const int d_qk = format == KvFormat::kFp8V4 ? 512 : 576;
        const Tokens tokens(67, d_qk - 64, dtype, 3);
        TestPool pool(shape, d_qk, format == KvFormat::kFloat16 ? DType::kFloat16 : DType::kBFloat16, 9);
        std::vector<std::int64_t> slots(67, -1);
        for (std::size_t i = 0; i < 67; ++i) {
          if (i % 6 != 2) slots[i] = static_cast<std::int64_t>(i * 29 % 200);
        }
        KvAppendArgs a;
        a.cache = pool.host_view();
        a.recipe = recipe;
        a.latent = TensorView::contiguous(nullptr, dtype, {67, d_qk - 64});
        a.rope = TensorView::contiguous(nullptr, dtype, {67, 64});
        a.slot_mapping = TensorView::contiguous(nullptr, DType::kInt64, {67});
        const auto d_cache = upload(a.cache.data, pool.bytes.data(), pool.bytes.size());
        const auto d_latent = upload(a.latent, tokens.latent.data(), tokens.latent.size());
        const auto d_rope = upload(a.rope, tokens.rope.data(), tokens.rope.size());
        const auto d_slots = upload(a.slot_mapping, slots.data(), slots.size() * 8);
        append_kv(a);
        std::vector<std::uint8_t> expected = pool.bytes;
        for (int i = 0; i < 67; ++i) {
          if (slots[static_cast<std::size_t>(i)] < 0) continue;
          for (const auto& [at, byte] :
               expected_bytes(a, tokens.row(i).data(), slots[static_cast<std::size_t>(i)])) {
            expected[at] = byte;
          }
        }
        const std::vector<std::uint8_t> got = d_cache->download();
        // Any NaN will do for a NaN that was appended.
        for (std::size_t at = 0; at < got.size(); ++at) {
          const bool nan = (expected[at] & 0x7F) == 0x7F && (got[at] & 0x7F) == 0x7F;
          ASSERT_TRUE(got[at] == expected[at] || nan)
              << kv_format_name(format) << " " << fp8_recipe_name(recipe) << " " << dtype_name(dtype)
              << " byte " << at << " is " << int{got[at]} << ", expected " << int{expected[at]};
        }
      }
    }
  }
}

TEST_P(Cache, NumericsOfAppendWithNormAndRope) {
  for (const KvFormat format : {KvFormat::kBFloat16, KvFormat::kFp8V32, KvFormat::kFp8V4}) {
    if (!backend().supports(Operation::kAppend, format, DType::kBFloat16)) continue;
    for (const bool whole : {false, true}) {
      const int d_qk = format == KvFormat::kFp8V4 ? 512 : 576, latent = d_qk - 64, n = 9;
      const int normed = whole ? d_qk : latent;
      Tokens tokens(n, latent, DType::kBFloat16, 4);
      std::mt19937 rng(2);
      std::normal_distribution<float> normal;
      std::vector<float> weight, cos_sin;
      for (int d = 0; d < normed; ++d) weight.push_back(1 + normal(rng) / 4);
      std::vector<std::int32_t> slots, positions;
      for (int i = 0; i < n; ++i) {
        slots.push_back(20 - 2 * i);
        positions.push_back(i * 3);
      }
      for (int p = 0; p < 30; ++p) {
        for (int i = 0; i < 64; ++i) {
          const double angle = p * std::pow(10000.0, -(i % 32) / 32.0);
          cos_sin.push_back(static_cast<float>(i < 32 ? std::cos(angle) : std::sin(angle)));
        }
      }
      TestPool pool({.format = format, .tokens = 30, .page_size = 8}, d_qk, DType::kBFloat16, 9);
      KvAppendArgs a;
      a.cache = pool.host_view();
      a.latent = TensorView::contiguous(nullptr, DType::kBFloat16, {n, latent});
      a.rope = TensorView::contiguous(nullptr, DType::kBFloat16, {n, 64});
      a.slot_mapping = TensorView::contiguous(nullptr, DType::kInt32, {n});
      a.norm_weight = TensorView::contiguous(nullptr, DType::kFloat32, {normed});
      a.positions = TensorView::contiguous(nullptr, DType::kInt32, {n});
      a.cos_sin = TensorView::contiguous(nullptr, DType::kFloat32, {30, 64});
      const auto d_cache = upload(a.cache.data, pool.bytes.data(), pool.bytes.size());
      const auto d_latent = upload(a.latent, tokens.latent.data(), tokens.latent.size());
      const auto d_rope = upload(a.rope, tokens.rope.data(), tokens.rope.size());
      const auto d_slots = upload(a.slot_mapping, slots.data(), slots.size() * 4);
      const auto d_weight = upload(a.norm_weight, weight.data(), weight.size() * 4);
      const auto d_positions = upload(a.positions, positions.data(), positions.size() * 4);
      const auto d_cos_sin = upload(a.cos_sin, cos_sin.data(), cos_sin.size() * 4);
      append_kv(a);
      const std::vector<std::uint8_t> bytes = d_cache->download();
      std::vector<float> got(static_cast<std::size_t>(n * d_qk)), expected;
      KvGatherArgs g;
      g.cache = pool.view(const_cast<std::uint8_t*>(bytes.data()), {});
      g.slots = TensorView::contiguous(slots.data(), DType::kInt32, {n});
      g.out = TensorView::contiguous(got.data(), DType::kFloat32, {n, d_qk});
      gather_kv(g);
      for (int i = 0; i < n; ++i) {
        std::vector<float> row = tokens.row(i);
        double sum = 0;
        for (int d = 0; d < normed; ++d)
          sum += double{row[static_cast<std::size_t>(d)]} * row[static_cast<std::size_t>(d)];
        for (std::size_t d = 0; d < static_cast<std::size_t>(normed); ++d) {
          row[d] = static_cast<float>(row[d] / std::sqrt(sum / normed + 1e-6) * weight[d]);
        }
        for (std::size_t pair = 0; pair < 32; ++pair) {
          const std::size_t at = static_cast<std::size_t>(latent) + 2 * pair;
          const float c =
              cos_sin[static_cast<std::size_t>(positions[static_cast<std::size_t>(i)]) * 64 + pair];
          const float s =
              cos_sin[static_cast<std::size_t>(positions[static_cast<std::size_t>(i)]) * 64 + 32 + pair];
          const float x = row[at], y = row[at + 1];
          row[at] = x * c - y * s;
          row[at + 1] = x * s + y * c;
        }
        expected.insert(expected.end(), row.begin(), row.end());
      }
      for (std::size_t i = 0; i < got.size(); ++i) {
        if (std::isnan(expected[i])) continue;
        // Half a step of e4m3 is 1/16 of a value, or 2^-10 of the tile's scale, which is at most a hundredth
        // of amax.
        const float tolerance = format == KvFormat::kBFloat16 ? 0.02f : 0.08f;
        ASSERT_NEAR(got[i], expected[i], tolerance * std::abs(expected[i]) + 0.01f)
            << kv_format_name(format) << " " << i;
      }
    }
  }
}

TEST_P(Cache, NumericsOfGather) {
  for (const KvFormat format :
       {KvFormat::kBFloat16, KvFormat::kFloat16, KvFormat::kFp8V32, KvFormat::kFp8V4, KvFormat::kFp8Tensor}) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
      if (!backend().supports(Operation::kGather, format, dtype)) continue;
      const int d_qk = format == KvFormat::kFp8V4 ? 512 : 576, latent = d_qk - 64;
      // Every byte of e4m3 at every place of a tile, under scales that are no powers of two, 0 and NaN among
      // them.
      const std::int64_t page = 16;
      const std::size_t token = format == KvFormat::kFp8V32      ? 656
                                : format == KvFormat::kFp8V4     ? 584
                                : format == KvFormat::kFp8Tensor ? 576
                                                                 : 1152;
      std::mt19937 rng(8);
      std::vector<std::uint8_t> bytes(static_cast<std::size_t>(page) * 3 * token);
      for (auto& x : bytes) x = static_cast<std::uint8_t>(rng());
      const auto scale_at = [&](std::int64_t slot, int t) {
        const std::int64_t p = slot / page, o = slot % page;
        return format == KvFormat::kFp8V32
                   ? static_cast<std::size_t>(slot) * 656 + 512 + 4 * static_cast<std::size_t>(t)
                   : static_cast<std::size_t>(p * page * 584 + page * 576 + o * 8 + t);
      };
      if (format == KvFormat::kFp8V32) {
        for (std::int64_t slot = 0; slot < 3 * page; ++slot) {
          for (int t = 0; t < 4; ++t) {
            const float scale = std::array{0.37f, 0.0f, 1.7e-7f, 3e38f, 1e-40f, kNan}[rng() % 6];
            std::memcpy(&bytes[scale_at(slot, t)], &scale, 4);
          }
        }
      }
      KvGatherArgs g;
      g.cache.format = format;
      g.cache.scale = 0.03f;
      const bool fp8 = token != 1152;
      const DType rows = format == KvFormat::kFloat16 ? DType::kFloat16 : DType::kBFloat16;
      g.cache.data = TensorView::contiguous(nullptr, fp8 ? DType::kUInt8 : rows,
                                            {3, page, 1, fp8 ? static_cast<std::int64_t>(token) : 576});
      std::vector<std::int32_t> slots;
      for (int i = 0; i < 40; ++i) slots.push_back(i % 9 == 4 ? -1 : i * 11 % 48);
      g.slots = TensorView::contiguous(nullptr, DType::kInt32, {40});
      g.out = TensorView::contiguous(nullptr, dtype, {40, d_qk});
      const std::vector<std::uint8_t> fill(40 * static_cast<std::size_t>(d_qk) * dtype_size(dtype), 0xA7);
      const auto d_cache = upload(g.cache.data, bytes.data(), bytes.size());
      const auto d_slots = upload(g.slots, slots.data(), slots.size() * 4);
      const auto d_out = upload(g.out, fill.data(), fill.size());
      gather_kv(g);
      const std::vector<std::uint8_t> got = d_out->download();
      for (std::size_t i = 0; i < 40; ++i) {
        for (int d = 0; d < d_qk; ++d) {
          const std::int64_t slot = slots[i], p = slot / page, o = slot % page;
          float x = 0;
          const auto half = [&](std::size_t at) {
            std::uint16_t raw = 0;
            std::memcpy(&raw, &bytes[at], 2);
            return rows == DType::kFloat16 ? to_float(Fp16{raw}) : to_float(Bf16{raw});
          };
          if (slot >= 0) {
            const auto at = static_cast<std::size_t>(slot);
            const auto column = static_cast<std::size_t>(d);
            if (format == KvFormat::kFp8V32) {
              float scale = 0;
              if (d < latent) std::memcpy(&scale, &bytes[scale_at(slot, d / 128)], 4);
              x = d < latent ? value_of(bytes[at * 656 + column]) * scale
                             : half(at * 656 + 528 + 2 * (column - 512));
            } else if (format == KvFormat::kFp8V4) {
              const auto row = static_cast<std::size_t>(p * page * 584 + o * 576);
              const int e = d < latent ? bytes[scale_at(slot, d / 64)] : 0;
              const float scale = e == 255 ? kNan : std::ldexp(1.0f, e - 127);
              x = d < latent ? value_of(bytes[row + column]) * scale : half(row + 448 + 2 * (column - 448));
            } else if (format == KvFormat::kFp8Tensor) {
              x = value_of(bytes[at * 576 + column]) * 0.03f;
            } else {
              x = half(at * 1152 + 2 * column);
            }
          }
          visit_float_type(dtype, [&](auto element) {
            const auto want = from_double<decltype(element)>(x);
            decltype(element) have;
            std::memcpy(
                &have,
                &got[(i * static_cast<std::size_t>(d_qk) + static_cast<std::size_t>(d)) * sizeof(have)],
                sizeof(have));
            const bool both_nan = std::isnan(to_float(want)) && std::isnan(to_float(have));
            if (!both_nan && std::memcmp(&want, &have, sizeof(have)) != 0) {
              FAIL() << kv_format_name(format) << " to " << dtype_name(dtype) << " slot " << slot
                     << " element " << d << " is " << to_float(have) << ", expected " << to_float(want);
            }
          });
          if (::testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(QuantiseFp8, IsTheRecipe) {
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  constexpr int kRows = 40, kWidth = 300, kTile = 128;
  std::vector<float> x;
  for (int i = 0; i < kRows * kWidth; ++i) {
    const float size =
        std::array{1.0f, 1e-12f, 0.0f, 448.0f, 1e-5f}[static_cast<std::size_t>(i / kWidth % 5)];
    x.push_back(normal(rng) * size);
  }
  x[10] = kNan;
  for (const Fp8Recipe recipe : {Fp8Recipe::kFlashMla, Fp8Recipe::kVllm, Fp8Recipe::kSglang,
                                 Fp8Recipe::kIndexerPow2, Fp8Recipe::kIndexer, Fp8Recipe::kVllmIndexer}) {
    std::vector<std::uint8_t> values(x.size()), expected(kTile);
    std::vector<float> scales(kRows * 3);
    quantise_fp8(TensorView::contiguous(x.data(), DType::kFloat32, {kRows, kWidth}), kTile, recipe,
                 TensorView::contiguous(values.data(), DType::kUInt8, {kRows, kWidth}),
                 TensorView::contiguous(scales.data(), DType::kFloat32, {kRows, 3}));
    for (int row = 0; row < kRows; ++row) {
      for (int t = 0; t < 3; ++t) {
        const int at = row * kWidth + t * kTile, n = std::min(kTile, kWidth - t * kTile);
        ASSERT_EQ(scales[static_cast<std::size_t>(row * 3 + t)],
                  quantise(recipe, &x[static_cast<std::size_t>(at)], n, expected.data()));
        for (int i = 0; i < n; ++i) {
          ASSERT_EQ(values[static_cast<std::size_t>(at + i)] & 0x7F,
                    expected[static_cast<std::size_t>(i)] & 0x7F)
              << fp8_recipe_name(recipe) << " row " << row << " element " << t * kTile + i;
        }
      }
    }
  }
}

// Every backend has the CPU's bytes, whatever the width of a tile and of a row; nothing outside is written (Guarded).
TEST_P(Cache, NumericsOfQuantiseAreTheCpusBits) {
  constexpr std::int64_t kRows = 37, kPitch = 1100;
  std::mt19937 rng(8);
  std::normal_distribution<float> normal;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const auto& [width, tile] :
         {std::pair<std::int64_t, int>{1, 1}, {130, 128}, {512, 64}, {1000, 300}, {1100, 1100}, {77, 7}}) {
      for (const Fp8Recipe recipe : {Fp8Recipe::kFlashMla, Fp8Recipe::kVllm, Fp8Recipe::kSglang,
                                     Fp8Recipe::kIndexerPow2, Fp8Recipe::kIndexer, Fp8Recipe::kVllmIndexer}) {
        std::vector<std::uint8_t> x;
        visit_float_type(dtype, [&](auto element) {
          for (std::int64_t i = 0; i < kRows * kPitch; ++i) {
            const float size = std::array{1.0f, 3e-6f, 0.0f, 300.0f}[static_cast<std::size_t>(i / 50 % 4)];
            const auto value = from_double<decltype(element)>(normal(rng) * size);
            const auto* raw = reinterpret_cast<const std::uint8_t*>(&value);
            x.insert(x.end(), raw, raw + sizeof(value));
          }
        });
        const std::int64_t tiles = (width + tile - 1) / tile;
        for (const bool e8m0 : {false, true}) {
          if (e8m0 && !quant::scales_are_powers_of_two(recipe)) continue;
          const std::size_t scale_bytes = static_cast<std::size_t>(kRows * tiles) * (e8m0 ? 1 : 4);
          std::vector<std::uint8_t> values(static_cast<std::size_t>(kRows * width), 0xAA),
              scales(scale_bytes, 0xAA);
          TensorView host_x =
              TensorView::contiguous(const_cast<std::uint8_t*>(x.data()), dtype, {kRows, width});
          host_x.strides[0] = kPitch;
          TensorView xs = host_x;
          TensorView vs = TensorView::contiguous(values.data(), DType::kUInt8, {kRows, width});
          TensorView ss =
              TensorView::contiguous(scales.data(), e8m0 ? DType::kUInt8 : DType::kFloat32, {kRows, tiles});
          const auto d_x = upload(xs, x.data(), x.size());
          const auto d_values = upload(vs, values.data(), values.size());
          const auto d_scales = upload(ss, scales.data(), scales.size());
          quantise_fp8(xs, tile, recipe, vs, ss);
          const auto got = d_values->download(), got_scales = d_scales->download();
          quantise_fp8(host_x, tile, recipe,
                       TensorView::contiguous(values.data(), DType::kUInt8, {kRows, width}),
                       TensorView::contiguous(scales.data(), ss.dtype, {kRows, tiles}));
          ASSERT_EQ(got, values) << fp8_recipe_name(recipe) << " " << dtype_name(dtype) << " tile " << tile;
          ASSERT_EQ(got_scales, scales)
              << fp8_recipe_name(recipe) << " " << dtype_name(dtype) << " tile " << tile;
        }
      }
    }
  }
}

TEST(QuantiseFp8, ScalesAsE8m0) {
  std::vector<float> x{1, 2, 3, 4, 448, 449, 0, 0}, dequantised;
  std::vector<std::uint8_t> values(8), scales(2);
  quantise_fp8(TensorView::contiguous(x.data(), DType::kFloat32, {2, 4}), 4, Fp8Recipe::kIndexerPow2,
               TensorView::contiguous(values.data(), DType::kUInt8, {2, 4}),
               TensorView::contiguous(scales.data(), DType::kUInt8, {2, 1}));
  EXPECT_EQ(scales[0], 127 - 6);  // 4 / 448 = 1 / 112
  EXPECT_EQ(scales[1], 127 + 1);  // 449 / 448
  EXPECT_THROW(quantise_fp8(TensorView::contiguous(x.data(), DType::kFloat32, {2, 4}), 4, Fp8Recipe::kVllm,
                            TensorView::contiguous(values.data(), DType::kUInt8, {2, 4}),
                            TensorView::contiguous(scales.data(), DType::kUInt8, {2, 1})),
               InvalidArgument);
}

TEST(Fp8, EveryNumberAndEveryTie) {
  for (int code = 0; code < 256; ++code) {
    const auto bits = static_cast<std::uint8_t>(code);
    const float x = to_float(E4m3{bits});
    if ((code & 0x7F) == 0x7F) {
      EXPECT_TRUE(std::isnan(x));
      continue;
    }
    EXPECT_EQ(x, value_of(bits));
    EXPECT_EQ(to_e4m3(x).bits, bits);
    if ((code & 0x7F) == 0x7E) continue;
    const float next = to_float(E4m3{static_cast<std::uint8_t>(code + 1)}), middle = (x + next) / 2;
    for (const float y : {middle, std::nextafter(middle, x), std::nextafter(middle, next)}) {
      EXPECT_EQ(to_e4m3(y).bits, nearest(y)) << y;
    }
  }
  EXPECT_EQ(to_e4m3(1e30f).bits, 0x7E);
  EXPECT_EQ(to_e4m3(-std::numeric_limits<float>::infinity()).bits, 0xFE);
  EXPECT_EQ(to_float(E8m0{0}), std::ldexp(1.0f, -127));
  EXPECT_EQ(to_float(E8m0{254}), std::ldexp(1.0f, 127));
  EXPECT_TRUE(std::isnan(to_float(E8m0{255})));
  EXPECT_EQ(next_power_of_two(1.0f), 1.0f);
  EXPECT_EQ(next_power_of_two(std::nextafter(1.0f, 2.0f)), 2.0f);
}

TEST(CacheChecks, ErrorsNameArgumentAndValue) {
  TestPool pool({.tokens = 64}, 576, DType::kBFloat16, 1);
  std::vector<float> latent(3 * 512), rope(3 * 64);
  std::vector<std::int64_t> slots{0, -1, 5};
  KvAppendArgs good;
  good.cache = pool.host_view();
  good.latent = TensorView::contiguous(latent.data(), DType::kFloat32, {3, 512});
  good.rope = TensorView::contiguous(rope.data(), DType::kFloat32, {3, 64});
  good.slot_mapping = TensorView::contiguous(slots.data(), DType::kInt64, {3});
  const auto expect_refused = [&](const KvAppendArgs& a, const std::string& part) {
    try {
      append_kv(a);
      ADD_FAILURE() << "accepted, expected a message with \"" << part << "\"";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  append_kv(good);
  KvAppendArgs a = good;
  a.latent.shape[1] = 448;
  expect_refused(a, "latent.shape[1] is 448, expected the cache's latent width = 512");
  a = good;
  a.rope.dtype = DType::kBFloat16;
  expect_refused(a, "rope is bfloat16");
  a = good;
  a.recipe = Fp8Recipe::kIndexer;
  expect_refused(a, "recipe is indexer");
  a = good;
  a.positions = good.slot_mapping;
  expect_refused(a, "cos_sin is (none), expected both or neither");
  slots[1] = 128;
  expect_refused(good, "slot_mapping[1] is 128, expected -1 or 0 to 127");
  slots[1] = -2;
  expect_refused(good, "slot_mapping[1] is -2");
  slots[1] = -1;
  a = good;
  std::vector<std::int64_t> positions{0, 99, 30};
  std::vector<float> cos_sin(30 * 64);
  a.positions = TensorView::contiguous(positions.data(), DType::kInt64, {3});
  a.cos_sin = TensorView::contiguous(cos_sin.data(), DType::kFloat32, {30, 64});
  expect_refused(
      a, "positions[2] is 30, expected 0 to cos_sin.shape[0] - 1 = 29");  // the skipped token's is not read
  positions[2] = 29;
  append_kv(a);
}

}  // namespace
}  // namespace flash_mla::conformance
