#include "model/int4_weight.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "base/element.h"

namespace flash_mla::model {
namespace {

/// As kernels/gemm/sm90/int4_weights.h says: of a matrix that has been packed.
int code_at(const std::vector<std::uint8_t>& packed, std::int64_t row, std::int64_t column,
            std::int64_t columns) {
  const std::int64_t word = (row / 2 * (columns / 8) + column / 8) * 2 + row % 2;
  std::uint32_t bits = 0;
  std::memcpy(&bits, packed.data() + 4 * word, sizeof(bits));
  return static_cast<int>(bits >> (4 * (column % 2 * 4 + column % 8 / 2)) & 15u);
}

Int4Weight random_weight(std::int64_t rows, std::int64_t columns) {
  Int4Weight out(rows, columns);
  std::mt19937 random(11);
  std::generate_n(out.codes.get(), rows * columns, [&] { return static_cast<std::uint8_t>(random() % 16); });
  for (float& s : out.scales) s = static_cast<float>(random() % 1000);
  return out;
}

TEST(Int4Weight, CutsArePackedTwoRowsTogether) {
  const Int4Weight weight = random_weight(80, 400);
  for (const Int4Cut& cut :
       {Int4Cut{0, 80, 0, 400}, Int4Cut{16, 48, 0, 400}, Int4Cut{0, 80, 128, 256}, Int4Cut{2, 6, 256, 144}}) {
    const std::int64_t groups = (cut.columns + 127) / 128, stride = cut.rows + 8;
    std::vector<std::uint8_t> codes(int4_bytes(cut.rows, cut.columns));
    std::vector<float> scales(static_cast<std::size_t>(groups * stride), -1);
    pack_int4(weight, cut, codes.data(), scales.data(), stride);
    for (std::int64_t row = 0; row < cut.rows; ++row) {
      const std::int64_t from = cut.row + row;
      for (std::int64_t column = 0; column < cut.columns; ++column) {
        ASSERT_EQ(code_at(codes, row, column, cut.columns),
                  weight.codes[static_cast<std::size_t>(from * 400 + cut.column + column)])
            << row << " " << column;
      }
      for (std::int64_t g = 0; g < groups; ++g) {
        EXPECT_EQ(scales[static_cast<std::size_t>(g * stride + row)],
                  weight.scales[static_cast<std::size_t>(from * 4 + cut.column / 128 + g)]);
      }
    }
    for (std::int64_t g = 0; g < groups; ++g) {
      for (std::int64_t i = cut.rows; i < stride; ++i)
        EXPECT_EQ(scales[static_cast<std::size_t>(g * stride + i)], -1);
    }
  }
}

TEST(Int4Weight, StoredGroupsAreSpreadOverThoseOf128) {
  Weight weight;
  weight.rows = 8;
  weight.columns = 400;
  weight.stored = QuantizedFormat{QuantizedType::kInt4, 256};
  weight.read_quantized = [](std::uint8_t* codes, float* scales) {
    std::fill_n(codes, 8 * 400, std::uint8_t{3});
    for (int i = 0; i < 16; ++i) scales[i] = static_cast<float>(i);
  };
  EXPECT_TRUE(stored_as_int4(weight));
  const Int4Weight got = read_int4(weight);
  for (std::size_t row = 0; row < 8; ++row) {
    for (std::size_t g = 0; g < 4; ++g) {
      const std::size_t group = 2 * row + g / 2;
      EXPECT_EQ(got.scales[row * 4 + g], static_cast<float>(group));
    }
  }
  weight.stored->group = 400;  // one for each row
  EXPECT_TRUE(stored_as_int4(weight));
  for (const std::int64_t group : {32, 64, 192}) {
    weight.stored->group = group;
    EXPECT_FALSE(stored_as_int4(weight)) << group;
  }
}

TEST(Int4Weight, OthersAreQuantised) {
  Weight weight;
  weight.rows = 16;
  weight.columns = 144;
  weight.read = [](void* to) {
    for (int i = 0; i < 16 * 144; ++i)
      static_cast<std::uint16_t*>(to)[i] = to_bf16(static_cast<float>(i % 13) - 6).bits;
  };
  EXPECT_FALSE(stored_as_int4(weight));
  const Int4Weight got = read_int4(weight);
  for (std::int64_t i = 0; i < weight.size(); ++i) {
    const float scale = got.scales[static_cast<std::size_t>(i / 144 * 2 + i % 144 / 128)];
    const float value = quantized_value(QuantizedType::kInt4, got.codes[static_cast<std::size_t>(i)]) * scale;
    EXPECT_NEAR(value, static_cast<float>(i % 13) - 6, 0.51f * scale);
  }
}

TEST(Int4Weight, SizesAndWhatIsAskedFor) {
  EXPECT_TRUE(takes_int4(8, 16));
  EXPECT_FALSE(takes_int4(12, 16));
  EXPECT_FALSE(takes_int4(8, 24));
  EXPECT_EQ(int4_bytes(8, 400), 1600u);
  EXPECT_EQ(int4_scales(8, 400), 32);
  EXPECT_TRUE(asks_for_int4(ModelQuantize::kW4A8, LayerKind::kExperts));
  EXPECT_TRUE(asks_for_int4(ModelQuantize::kW4A8, LayerKind::kShared));
  EXPECT_FALSE(asks_for_int4(ModelQuantize::kW4A8, LayerKind::kAttention));
  EXPECT_FALSE(asks_for_int4(ModelQuantize::kFp8, LayerKind::kExperts));
}

}  // namespace
}  // namespace flash_mla::model
