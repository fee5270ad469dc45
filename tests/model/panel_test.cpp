// Products with weights in panels, against sums in fp64.

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/aligned.h"
#include "base/element.h"
#include "base/fp8.h"
#include "kernels/gemm/cpu/panel_weight.h"
#include "kernels/quant/cpu/weights.h"
#include "kernels/rows/cpu/rows.h"

namespace flash_mla::cpu {
namespace {

using Form = PanelWeight::Form;

std::vector<float> random_floats(std::int64_t count, unsigned seed, float deviation) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& x : out) x = normal(random);
  return out;
}

/// Rows with a gap of 3 elements between them.
struct Rows {
  DType dtype;
  std::int64_t rows, columns;
  std::vector<std::byte> bytes;

  Rows(DType type, std::int64_t num_rows, std::int64_t num_columns, const std::vector<float>& values)
      : dtype(type),
        rows(num_rows),
        columns(num_columns),
        bytes(static_cast<std::size_t>(rows * (columns + 3)) * dtype_size(dtype), std::byte{0x7F}) {
    for (std::int64_t i = 0; i < rows; ++i) {
      rows::narrow(values.data() + i * columns, matrix().row(i), dtype, columns);
    }
  }
  Matrix matrix() { return {bytes.data(), dtype, rows, columns, columns + 3}; }
  std::vector<float> row(std::int64_t i) {
    std::vector<float> out(static_cast<std::size_t>(columns));
    rows::widen(matrix().row(i), dtype, out.data(), columns);
    return out;
  }
};

struct Case {
  DType dtype;
  Form form;
  std::int64_t rows, out_features, in_features;
  bool bias, accumulate, wide_result;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << (c.dtype == DType::kBFloat16 ? "bf16" : "fp32")
             << (c.form == Form::kInt8 ? "_int8_" : "_plain_") << c.rows << "x" << c.out_features << "x"
             << c.in_features << (c.bias ? "_bias" : "") << (c.accumulate ? "_add" : "")
             << (c.wide_result ? "_wide" : "");
}

float rounded(float x, DType dtype) { return dtype == DType::kBFloat16 ? to_float(to_bf16(x)) : x; }

class PanelProduct : public testing::TestWithParam<Case> {};

TEST_P(PanelProduct, IsThatOfTheWeightsToRounding) {
  const Case c = GetParam();
  const DType y_dtype = c.wide_result ? DType::kFloat32 : c.dtype;
  const std::vector<float> w = random_floats(c.out_features * c.in_features, 1, 0.1f);
  const std::vector<float> bias = random_floats(c.out_features, 2, 1);
  Rows x(c.dtype, c.rows, c.in_features, random_floats(c.rows * c.in_features, 3, 1));
  Rows y(y_dtype, c.rows, c.out_features, random_floats(c.rows * c.out_features, 4, 1));
  Rows before = y;
  const PanelWeight weight(w.data(), c.out_features, c.in_features, c.dtype, c.form);
  weight.multiply(x.matrix(), c.bias ? bias.data() : nullptr, y.matrix(), 2, c.accumulate);
  // Kernels without bf16 products keep plain weights in fp32.
  const bool pairs = c.form == Form::kPlain && panel::select_kernel(c.dtype).plain_element == 2;
  const DType weight_dtype = pairs ? DType::kBFloat16 : DType::kFloat32;
  const float epsilon = y_dtype == DType::kBFloat16 ? 0x1p-8f : 0x1p-20f;
  for (std::int64_t i = 0; i < c.rows; ++i) {
    const std::vector<float> in = x.row(i), out = y.row(i), old = before.row(i);
    for (std::int64_t n = 0; n < c.out_features; ++n) {
      const float* row = w.data() + n * c.in_features;
      float highest = 0;
      for (std::int64_t k = 0; k < c.in_features; ++k) highest = std::max(highest, std::abs(row[k]));
      double exact = c.bias ? bias[static_cast<std::size_t>(n)] : 0.0, size = 0, allowed = 0;
      if (c.accumulate) exact += old[static_cast<std::size_t>(n)];
      for (std::int64_t k = 0; k < c.in_features; ++k) {
        const double value = in[static_cast<std::size_t>(k)];
        exact += value * (rounded(row[k], weight_dtype));
        size += std::abs(value * row[k]);
        // A weight of 8 bits is off by half a step at most.
        if (c.form == Form::kInt8) allowed += std::abs(value) * highest / 127 / 2;
      }
      allowed = allowed * 1.0001 + 1e-6 * (size + 1) + epsilon * std::abs(exact);
      ASSERT_NEAR(out[static_cast<std::size_t>(n)], exact, allowed) << "row " << i << ", column " << n;
    }
  }
  // Nothing is written between the rows.
  for (std::int64_t i = 0; i < c.rows; ++i) {
    const std::byte* gap =
        y.matrix().row(i) + c.out_features * static_cast<std::int64_t>(dtype_size(y_dtype));
    for (std::size_t b = 0; b < 3 * dtype_size(y_dtype); ++b)
      ASSERT_EQ(gap[b], std::byte{0x7F}) << "row " << i;
  }
}

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const Form form : {Form::kPlain, Form::kInt8}) {
      // Rows and columns around the tiles, depths odd and around the 256 that are multiplied at a time.
      for (const std::int64_t rows : {1, 2, 4, 5, 6, 7, 8, 11, 12, 13, 96, 130}) {
        out.push_back({dtype, form, rows, 70, 129, false, false, false});
      }
      for (const std::int64_t columns : {1, 15, 16, 17, 63, 64, 65, 128}) {
        out.push_back({dtype, form, 3, columns, 64, false, true, true});
        out.push_back({dtype, form, 9, columns, 64, true, false, false});
      }
      for (const std::int64_t depth : {1, 2, 255, 256, 257, 512, 600}) {
        out.push_back({dtype, form, 2, 65, depth, true, true, false});
        out.push_back({dtype, form, 26, 65, depth, false, false, true});
      }
    }
  }
  return out;
}

INSTANTIATE_TEST_SUITE_P(Panel, PanelProduct, testing::ValuesIn(cases()), testing::PrintToStringParamName());

class PanelBits : public testing::TestWithParam<std::tuple<DType, Form>> {};

TEST_P(PanelBits, OfARowDoNotDependOnTheOthers) {
  const auto [dtype, form] = GetParam();
  constexpr std::int64_t kRows = 101, kOut = 200, kIn = 515;
  const std::vector<float> w = random_floats(kOut * kIn, 1, 0.1f);
  const PanelWeight weight(w.data(), kOut, kIn, dtype, form);
  Rows x(dtype, kRows, kIn, random_floats(kRows * kIn, 2, 1));
  const std::vector<float> nothing(kRows * kOut);
  Rows all(dtype, kRows, kOut, nothing);
  weight.multiply(x.matrix(), nullptr, all.matrix(), 2, false);
  for (std::int64_t first = 0, count = 1; first < kRows; first += count, count = count % 9 + 1) {
    Rows some(dtype, kRows, kOut, nothing);
    count = std::min(count, kRows - first);
    weight.multiply(x.matrix().row_range(first, count), nullptr, some.matrix().row_range(first, count), 1,
                    false);
    for (std::int64_t i = first; i < first + count; ++i) EXPECT_EQ(some.row(i), all.row(i)) << "row " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Panel, PanelBits,
                         testing::Combine(testing::Values(DType::kFloat32, DType::kBFloat16),
                                          testing::Values(Form::kPlain, Form::kInt8)));

struct Quantized {
  QuantizedFormat format;
  std::int64_t out_features, in_features;
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;

  /// Every code that there is, but NaN.
  Quantized(QuantizedFormat f, std::int64_t out, std::int64_t in, unsigned seed)
      : format(f),
        out_features(out),
        in_features(in),
        codes(static_cast<std::size_t>(out * in)),
        scales(static_cast<std::size_t>(out * f.groups(in))) {
    std::mt19937 random(seed);
    for (std::uint8_t& c : codes) {
      c = static_cast<std::uint8_t>(f.type == QuantizedType::kInt4 ? random() % 16
                                                                   : random() % 127 + random() % 2 * 128);
    }
    for (float& s : scales)
      s = std::ldexp(1 + static_cast<float>(random() % 1000) / 1000, -static_cast<int>(random() % 12));
  }
  float weight(std::int64_t n, std::int64_t k) const {
    return quantized_value(format.type, codes[static_cast<std::size_t>(n * in_features + k)]) *
           scales[static_cast<std::size_t>(n * format.groups(in_features) + k / format.group)];
  }
};

struct QuantizedCase {
  QuantizedFormat format;
  DType dtype;
  std::int64_t rows, out_features, in_features;
};

class QuantizedPanel : public testing::TestWithParam<QuantizedCase> {};

TEST_P(QuantizedPanel, IsTheProductOfTheDequantisedWeights) {
  const QuantizedCase c = GetParam();
  ASSERT_TRUE(PanelWeight::takes(c.format, c.in_features, c.dtype));
  const Quantized w(c.format, c.out_features, c.in_features, 5);
  const PanelWeight weight(w.codes.data(), w.scales.data(), c.format, c.out_features, c.in_features, c.dtype);
  Rows x(c.dtype, c.rows, c.in_features, random_floats(c.rows * c.in_features, 3, 1));
  const std::vector<float> bias = random_floats(c.out_features, 2, 1);
  Rows y(DType::kFloat32, c.rows, c.out_features, random_floats(c.rows * c.out_features, 4, 1));
  Rows before = y, narrow(c.dtype, c.rows, c.out_features, std::vector<float>(before.bytes.size() / 4));
  weight.multiply(x.matrix(), bias.data(), y.matrix(), 2, true);
  weight.multiply(x.matrix(), nullptr, narrow.matrix(), 1, false);
  for (std::int64_t i = 0; i < c.rows; ++i) {
    const std::vector<float> in = x.row(i), out = y.row(i), old = before.row(i), rounded_out = narrow.row(i);
    for (std::int64_t n = 0; n < c.out_features; ++n) {
      double exact = 0, size = 0;
      for (std::int64_t k = 0; k < c.in_features; ++k) {
        const double product = static_cast<double>(in[static_cast<std::size_t>(k)]) * w.weight(n, k);
        exact += product;
        size += std::abs(product);
      }
      const auto column = static_cast<std::size_t>(n);
      const double added = exact + bias[column] + old[column];
      ASSERT_NEAR(out[column], added, 2e-6 * (size + 1)) << "row " << i << ", column " << n;
      ASSERT_NEAR(rounded_out[column], exact, 2e-6 * (size + 1) + std::abs(exact) / 256)
          << "row " << i << ", column " << n;
    }
  }
}

std::vector<QuantizedCase> quantized_cases() {
  std::vector<QuantizedCase> out;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const QuantizedType type : {QuantizedType::kE4m3, QuantizedType::kInt4}) {
      for (const std::int64_t rows : {1, 3, 4, 5, 7, 13, 100}) {
        out.push_back({{type, 128}, dtype, rows, 70, 300});
        out.push_back({{type, 32}, dtype, rows, 64, 128});
      }
      // One group, of an odd size too; groups longer than 256, the depth that is multiplied at a time; a last
      // group of one.
      for (const std::int64_t depth : {1, 2, 127, 128, 129, 256, 257}) {
        out.push_back({{type, depth}, dtype, 2, 65, depth});
        out.push_back({{type, 128}, dtype, 6, 1, depth});
      }
      out.push_back({{type, 640}, dtype, 2, 65, 1300});
    }
  }
  return out;
}

INSTANTIATE_TEST_SUITE_P(Panel, QuantizedPanel, testing::ValuesIn(quantized_cases()),
                         [](const auto& instance) {
                           const QuantizedCase& c = instance.param;
                           return (c.format.type == QuantizedType::kInt4 ? std::string("int4_")
                                                                         : std::string("e4m3_")) +
                                  std::to_string(c.format.group) +
                                  (c.dtype == DType::kBFloat16 ? "_bf16_" : "_fp32_") +
                                  std::to_string(c.rows) + "x" + std::to_string(c.out_features) + "x" +
                                  std::to_string(c.in_features);
                         });

TEST(QuantizedPanelBits, OfARowDoNotDependOnTheOthers) {
  constexpr std::int64_t kRows = 101, kOut = 100, kIn = 400;
  for (const QuantizedType type : {QuantizedType::kE4m3, QuantizedType::kInt4}) {
    const Quantized w({type, 128}, kOut, kIn, 6);
    const PanelWeight weight(w.codes.data(), w.scales.data(), w.format, kOut, kIn, DType::kBFloat16);
    EXPECT_LE(weight.bytes(), static_cast<std::size_t>(128 * kIn / (type == QuantizedType::kInt4 ? 2 : 1)) +
                                  128 * 4 * sizeof(float));
    Rows x(DType::kBFloat16, kRows, kIn, random_floats(kRows * kIn, 2, 1));
    Rows all(DType::kBFloat16, kRows, kOut, std::vector<float>(kRows * kOut)), some = all;
    weight.multiply(x.matrix(), nullptr, all.matrix(), 2, false);
    for (std::int64_t first = 0, count = 1; first < kRows; first += count, count = count % 9 + 1) {
      count = std::min(count, kRows - first);
      weight.multiply(x.matrix().row_range(first, count), nullptr, some.matrix().row_range(first, count), 1,
                      false);
    }
    for (std::int64_t i = 0; i < kRows; ++i) EXPECT_EQ(some.row(i), all.row(i)) << "row " << i;
  }
}

TEST(QuantizedPanelBits, GroupsThatCutPairsAreNotTaken) {
  EXPECT_TRUE(PanelWeight::takes({QuantizedType::kE4m3, 3}, 3, DType::kBFloat16));
  EXPECT_EQ(PanelWeight::takes({QuantizedType::kE4m3, 3}, 6, DType::kBFloat16),
            panel::select_kernel(DType::kBFloat16).depth_multiple == 1);
}

TEST(QuantisedWeights, Fp8Blocks) {
  // 3 x 2 blocks, the last of each way cut off; heavy tails; the last block of zeros.
  constexpr std::int64_t kRows = 300, kColumns = 200;
  std::vector<float> w = random_floats(kRows * kColumns, 7, 1);
  for (float& x : w) x = x * x * x;
  for (std::int64_t r = 256; r < kRows; ++r) std::fill_n(w.begin() + r * kColumns + 128, 72, 0.0f);
  for (const bool powers : {false, true}) {
    std::vector<std::uint8_t> codes(w.size());
    std::vector<float> scales(6);
    quantise_fp8_blocks(w.data(), kRows, kColumns, powers, codes.data(), scales.data());
    for (std::int64_t block = 0; block < 6; ++block) {
      float amax = 0;
      const std::int64_t row = block / 2 * 128, column = block % 2 * 128;
      for (std::int64_t r = row; r < std::min(row + 128, kRows); ++r) {
        for (std::int64_t c = column; c < std::min(column + 128, kColumns); ++c) {
          const auto at = static_cast<std::size_t>(r * kColumns + c);
          amax = std::max(amax, std::abs(w[at]));
          const float scale = scales[static_cast<std::size_t>(block)];
          ASSERT_EQ(codes[at], to_e4m3(w[at] / scale).bits) << r << ", " << c;
        }
      }
      const float exact = amax / 448;
      const float expected = amax == 0 ? 1 : powers ? next_power_of_two(exact) : exact;
      EXPECT_EQ(scales[static_cast<std::size_t>(block)], expected) << block;
    }
  }
}

TEST(QuantisedWeights, Int4) {
  constexpr std::int64_t kRows = 5, kColumns = 300, kGroup = 128;
  std::vector<float> w = random_floats(kRows * kColumns, 8, 1);
  std::fill_n(w.begin() + kColumns, kGroup, 0.0f);
  std::vector<std::uint8_t> codes(w.size());
  std::vector<float> scales(kRows * 3);
  quantise_int4(w.data(), kRows, kColumns, kGroup, codes.data(), scales.data());
  EXPECT_EQ(scales[3], 1.0f);
  double error = 0, plain = 0;
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (std::int64_t c = 0; c < kColumns; ++c) {
      const auto at = static_cast<std::size_t>(r * kColumns + c);
      const float scale = scales[static_cast<std::size_t>(r * 3 + c / kGroup)];
      ASSERT_LE(codes[at], 15);
      EXPECT_EQ(to_float(to_bf16(scale)), scale);
      // The nearest of the sixteen.
      const float off = std::abs(w[at] / scale - quantized_value(QuantizedType::kInt4, codes[at]));
      EXPECT_TRUE(off <= 0.5001f || codes[at] == 0 || codes[at] == 15) << off;
      const float difference = w[at] - quantized_value(QuantizedType::kInt4, codes[at]) * scale;
      error += static_cast<double>(difference * difference);
      plain += static_cast<double>(w[at] * w[at]);
    }
  }
  EXPECT_LT(error / plain, 0.012);
  EXPECT_GT(error, 0);
}

TEST(Panel, ALargestWeightIsExact) {
  const std::vector<float> w = {0.5f, -1.27f, 0.01f, 3, 0, 0, 0, 0};
  const PanelWeight weight(w.data(), 2, 4, DType::kFloat32, Form::kInt8);
  Rows x(DType::kFloat32, 4, 4, {0, 1, 0, 0, /**/ 0, 0, 0, 1, /**/ 1, 0, 0, 0, /**/ 0, 0, 1, 0});
  Rows y(DType::kFloat32, 4, 2, std::vector<float>(8, 5.0f));
  weight.multiply(x.matrix(), nullptr, y.matrix(), 1, false);
  EXPECT_THAT(y.row(0), testing::Pointwise(testing::FloatNear(1e-6f), {-54 * 3 / 127.0f, 0.0f}));
  EXPECT_THAT(y.row(1), testing::Pointwise(testing::FloatNear(1e-6f), {3.0f, 0.0f}));
  // Steps are 3 / 127 wide.
  EXPECT_THAT(y.row(2), testing::Pointwise(testing::FloatNear(1e-6f), {21 * 3 / 127.0f, 0.0f}));
  EXPECT_THAT(y.row(3), testing::Pointwise(testing::FloatNear(1e-6f), {0.0f, 0.0f}));
}

TEST(Panel, EightBitsTakeHalfTheMemoryOfBfloat16) {
  const std::vector<float> w = random_floats(256 * 512, 1, 1);
  const std::size_t bf16 = PanelWeight(w.data(), 256, 512, DType::kBFloat16, Form::kPlain).bytes();
  const std::size_t int8 = PanelWeight(w.data(), 256, 512, DType::kBFloat16, Form::kInt8).bytes();
  EXPECT_LE(int8, 256 * 512 + 256 * sizeof(float));
  EXPECT_GE(bf16, 2 * 256 * 512);
}

TEST(Panel, KernelsOfTheMachineAgree) {
  if (!panel::multiplies_bfloat16_pairs()) GTEST_SKIP() << "this machine has one kernel";
  constexpr std::int64_t kRows = 17, kDepth = 128;
  std::mt19937 random(3);
  std::uniform_int_distribution<int> any(-127, 127);
  std::vector<std::int8_t> values(static_cast<std::size_t>(panel::kColumns * kDepth));
  for (std::int8_t& v : values) v = static_cast<std::int8_t>(any(random));
  Rows x(DType::kBFloat16, kRows, kDepth, random_floats(kRows * kDepth, 4, 1));
  std::vector<std::vector<float>> results;
  for (const panel::Kernel* kernel :
       {&panel::avx512_bf16_kernel(), &panel::highway_kernel(DType::kBFloat16)}) {
    std::vector<std::byte> packed(values.size());
    const Buffer plain = allocate_aligned(values.size() * kernel->plain_element);
    kernel->pack(panel::Codes::kInt8, reinterpret_cast<const std::uint8_t*>(values.data()), kDepth, kDepth,
                 packed.data());
    kernel->expand(panel::Codes::kInt8, packed.data(), kDepth, plain.data());
    std::vector<float> sums(kRows * panel::kColumns), y(kRows * panel::kColumns);
    panel::Block block{};
    block.x = x.matrix().data;
    block.x_stride = x.matrix().stride * 2;
    block.rows = kRows;
    block.depth = kDepth;
    block.sums = sums.data();
    block.first = block.last = true;
    block.y = reinterpret_cast<std::byte*>(y.data());
    block.y_stride = panel::kColumns * 4;
    block.y_dtype = DType::kFloat32;
    block.columns = panel::kColumns;
    kernel->multiply(block, plain.data());
    results.push_back(y);
  }
  EXPECT_THAT(results[0], testing::Pointwise(testing::FloatNear(0.01f), results[1]));  // sums of some 1000
}

}  // namespace
}  // namespace flash_mla::cpu
