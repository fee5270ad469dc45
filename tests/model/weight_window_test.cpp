// Windows on stored matrices, of every form: what they read is what reading all of it has there.

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "base/element.h"
#include "checkpoint/checkpoint.h"
#include "safetensors_file.h"
#include "temporary_directory.h"

namespace flash_mla::checkpoint {
namespace {

constexpr std::int64_t kRows = 37, kColumns = 61;
constexpr StoredFormat kFormat = {.fp8_block_rows = 16, .fp8_block_columns = 8, .int4_group = 12};

class Windows : public testing::Test {
 protected:
  Windows() {
    SafetensorsFile file;
    std::mt19937 random(2);
    std::uniform_real_distribution<float> uniform(0.25f, 2.0f);
    std::vector<float> floats(kRows * kColumns);
    std::vector<std::uint16_t> halves(floats.size());
    std::vector<std::uint8_t> codes(floats.size());
    for (std::size_t i = 0; i < floats.size(); ++i) {
      floats[i] = uniform(random) - 1;
      halves[i] = to_bf16(floats[i]).bits;
      codes[i] = static_cast<std::uint8_t>(random() % 0x70);
    }
    file.add("f32.weight", "F32", {kRows, kColumns}, floats);
    file.add("bf16.weight", "BF16", {kRows, kColumns}, halves);
    file.add("fp8.weight", "F8_E4M3", {kRows, kColumns}, codes);
    const auto scales = [&](std::int64_t rows, std::int64_t groups) {
      std::vector<float> out(static_cast<std::size_t>(rows * groups));
      for (float& x : out) x = uniform(random);
      return out;
    };
    file.add("fp8.weight_scale_inv", "F32", {3, 8}, scales(3, 8));
    std::vector<std::uint32_t> words(kRows * 8);
    for (std::uint32_t& word : words) word = static_cast<std::uint32_t>(random());
    file.add("int4.weight_packed", "I32", {kRows, 8}, words);
    file.add("int4.weight_scale", "F32", {kRows, 6}, scales(kRows, 6));
    file.add("int4.weight_shape", "I32", {2}, std::vector<std::int32_t>{kRows, kColumns});
    directory_.write("model.safetensors", file.bytes());
  }

  static std::vector<WeightWindow> windows() {
    std::vector<WeightWindow> out;
    for (const auto& [row, rows] : {std::pair{0, 37}, std::pair{5, 20}, std::pair{36, 1}, std::pair{17, 0}}) {
      for (const auto& [column, columns] :
           {std::pair{0, 61}, std::pair{24, 37}, std::pair{7, 30}, std::pair{60, 1}}) {
        out.push_back({row, rows, column, columns});
      }
    }
    return out;
  }

  /// Elements of `window` of a matrix of `columns` columns.
  template <class T>
  static std::vector<T> cut(const std::vector<T>& whole, std::int64_t columns, const WeightWindow& w) {
    std::vector<T> out;
    for (std::int64_t r = 0; r < w.rows; ++r) {
      const auto row = whole.begin() + (w.first_row + r) * columns + w.first_column;
      out.insert(out.end(), row, row + w.columns);
    }
    return out;
  }

  TemporaryDirectory directory_;
};

TEST_F(Windows, OfEveryFormAreParts) {
  const Checkpoint checkpoint = Checkpoint::open(directory_.path());
  for (const std::string name : {"f32.weight", "bf16.weight", "fp8.weight", "int4.weight"}) {
    std::vector<float> floats(kRows * kColumns);
    std::vector<std::uint16_t> halves(floats.size());
    checkpoint.read_float32(name, kRows, kColumns, kFormat, floats.data());
    checkpoint.read_bfloat16(name, kRows, kColumns, kFormat, halves.data());
    for (const WeightWindow& w : windows()) {
      std::vector<float> part(static_cast<std::size_t>(w.rows * w.columns));
      std::vector<std::uint16_t> half(part.size());
      checkpoint.read_float32(name, kRows, kColumns, kFormat, part.data(), w);
      checkpoint.read_bfloat16(name, kRows, kColumns, kFormat, half.data(), w);
      EXPECT_EQ(part, cut(floats, kColumns, w)) << name << " at " << w.first_row << ", " << w.first_column;
      EXPECT_EQ(half, cut(halves, kColumns, w)) << name << " at " << w.first_row << ", " << w.first_column;
    }
  }
}

TEST_F(Windows, OfCodesBeginWithAGroup) {
  const Checkpoint checkpoint = Checkpoint::open(directory_.path());
  for (const std::string name : {"fp8.weight", "int4.weight"}) {
    const QuantizedFormat format = *checkpoint.quantized_format(name, kRows, kColumns, kFormat);
    const std::int64_t groups = format.groups(kColumns);
    std::vector<std::uint8_t> codes(kRows * kColumns);
    std::vector<float> scales(static_cast<std::size_t>(kRows * groups));
    checkpoint.read_quantized(name, kRows, kColumns, kFormat, codes.data(), scales.data());
    for (const WeightWindow& w : windows()) {
      if (w.first_column % format.group != 0) continue;
      const std::int64_t own = format.groups(w.columns);
      std::vector<std::uint8_t> part(static_cast<std::size_t>(w.rows * w.columns));
      std::vector<float> part_scales(static_cast<std::size_t>(w.rows * own));
      checkpoint.read_quantized(name, kRows, kColumns, kFormat, part.data(), part_scales.data(), w);
      EXPECT_EQ(part, cut(codes, kColumns, w)) << name;
      EXPECT_EQ(part_scales, cut(scales, groups, {w.first_row, w.rows, w.first_column / format.group, own}))
          << name;
    }
  }
}

}  // namespace
}  // namespace flash_mla::checkpoint
