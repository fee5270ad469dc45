// Norms, gates and rotations of rows (include/flash_mla/rows.h) on every backend, against float64.

#include "flash_mla/rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numbers>
#include <random>
#include <string>

#include "base/element.h"
#include "base/fp8.h"
#include "flash_mla/error.h"
#include "guarded.h"

namespace flash_mla::conformance {
namespace {

/// A matrix or a tensor of heads, random, with `gap` elements that are NaN behind every row.
class Random {
 public:
  Random(BackendUnderTest& backend, DType dtype, std::initializer_list<std::int64_t> shape, std::int64_t gap,
         unsigned seed)
      : dtype_(dtype), view(TensorView::contiguous(nullptr, dtype, shape, backend.device())) {
    if (view.rank > 1) {
      view.strides[0] += gap;
      rows_ = view.size(0);
    }
    row_ = view.numel() / std::max<std::int64_t>(rows_, 1);
    bytes_.assign(static_cast<std::size_t>(rows_ * (row_ + gap)) * dtype_size(dtype), 0xFF);
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = 0; c < row_; ++c) put(r * (row_ + gap) + c, normal(rng));
    }
    stride_ = row_ + gap;
    memory_ = std::make_unique<Guarded>(backend, bytes_.size());
    memory_->upload(bytes_.data());
    view.data = memory_->data();
  }

  void download() { bytes_ = memory_->download(); }
  double at(std::int64_t r, std::int64_t c) const {
    return visit_float_type(dtype_, [&](auto element) {
      std::memcpy(&element, &bytes_[static_cast<std::size_t>(r * stride_ + c) * sizeof(element)],
                  sizeof(element));
      return static_cast<double>(to_float(element));
    });
  }
  /// What was between the rows is there still.
  bool gaps_are_untouched() const {
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = row_; c < stride_; ++c) {
        if (!std::isnan(at(r, c))) return false;
      }
    }
    return true;
  }

 private:
  void put(std::int64_t at, float x) {
    visit_float_type(dtype_, [&](auto element) {
      element = from_double<decltype(element)>(static_cast<double>(x));
      std::memcpy(&bytes_[static_cast<std::size_t>(at) * sizeof(element)], &element, sizeof(element));
    });
  }

  DType dtype_;
  std::int64_t rows_ = 1, row_ = 0, stride_ = 0;
  std::vector<std::uint8_t> bytes_;
  std::unique_ptr<Guarded> memory_;

 public:
  TensorView view;
};

/// Between 1 and the next number.
double unit(DType dtype) {
  return dtype == DType::kBFloat16 ? 1.0 / 128 : dtype == DType::kFloat16 ? 1.0 / 1024 : 2e-6;
}

class Rows : public testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {};

constexpr DType kTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};

TEST_P(Rows, NumericsOfNorms) {
  unsigned seed = 1;
  for (const DType dtype : kTypes) {
    for (const DType weight_type : {dtype, DType::kFloat32}) {
      for (const std::int64_t d : {1, 7, 64, 1000, 4096, 7168, 20000}) {
        for (const bool adds : {false, true}) {
          const std::int64_t n = 3, gap = d % 8 == 0 ? 8 : 3;
          Random x(*GetParam(), dtype, {n, d}, gap, seed++),
              residual(*GetParam(), dtype, {n, d}, gap, seed++),
              weight(*GetParam(), weight_type, {d}, 0, seed++), out(*GetParam(), dtype, {n, d}, gap, seed++);
          const Random before = Random(*GetParam(), dtype, {n, d}, gap, seed - 3);  // residual's own seed
          const RmsNormOptions norm{1e-5f, adds ? 1.0f : 0.0f};
          if (adds) {
            add_rms_norm(x.view, residual.view, weight.view, out.view, norm);
          } else {
            rms_norm(x.view, weight.view, out.view, norm);
          }
          out.download();
          residual.download();
          double worst = 0;
          for (std::int64_t r = 0; r < n; ++r) {
            const Random& normed = adds ? residual : x;
            double squares = 0;
            for (std::int64_t c = 0; c < d; ++c) {
              if (adds) {
                const double sum = x.at(r, c) + before.at(r, c);
                worst = std::max(
                    worst, std::abs(residual.at(r, c) - sum) / (unit(dtype) / 2 * std::abs(sum) + 1e-6));
              }
              squares += normed.at(r, c) * normed.at(r, c);
            }
            const double factor = 1 / std::sqrt(squares / static_cast<double>(d) + 1e-5);
            for (std::int64_t c = 0; c < d; ++c) {
              const double y =
                  normed.at(r, c) * factor * (weight.at(0, c) + static_cast<double>(norm.weight_offset));
              worst = std::max(worst, std::abs(out.at(r, c) - y) / (unit(dtype) * 0.51 * std::abs(y) + 1e-5));
            }
          }
          EXPECT_LE(worst, 1) << dtype_name(dtype) << " d " << d << " adds " << adds;
          EXPECT_TRUE(out.gaps_are_untouched() && residual.gaps_are_untouched());
        }
      }
    }
  }
}

TEST_P(Rows, NumericsOfNormsToE4m3) {
  unsigned seed = 200;
  for (const DType dtype : kTypes) {
    for (const bool adds : {false, true}) {
      for (const std::int64_t d : {1000, 7168, 37}) {
        const std::int64_t n = 3;
        Random x(*GetParam(), dtype, {n, d}, 8, seed++), residual(*GetParam(), dtype, {n, d}, 8, seed++),
            weight(*GetParam(), DType::kFloat32, {d}, 0, seed++);
        Guarded memory(*GetParam(), static_cast<std::size_t>(n * d));
        const TensorView out =
            TensorView::contiguous(memory.data(), DType::kUInt8, {n, d}, GetParam()->device());
        const RmsNormOptions norm{1e-5f, 0.0f, 0.004f};  // so that some pass 448
        const auto call = [&] {
          if (adds) return add_rms_norm(x.view, residual.view, weight.view, out, norm);
          rms_norm(x.view, weight.view, out, norm);
        };
        call();
        const std::vector<std::uint8_t> bytes = memory.download();
        residual.download();
        int largest = 0;
        for (std::int64_t r = 0; r < n; ++r) {
          const Random& normed = adds ? residual : x;
          double squares = 0;
          for (std::int64_t c = 0; c < d; ++c) squares += normed.at(r, c) * normed.at(r, c);
          const double factor = 1 / std::sqrt(squares / static_cast<double>(d) + 1e-5);
          for (std::int64_t c = 0; c < d; ++c) {
            const double y = std::clamp(
                normed.at(r, c) * factor * weight.at(0, c) / static_cast<double>(0.004f), -448.0, 448.0);
            const double got = to_float(E4m3{bytes[static_cast<std::size_t>(r * d + c)]});
            // Half a unit of e4m3, of numbers below 2^-6 a half of 2^-9; and as much as float32 may be off at a tie.
            ASSERT_LE(std::abs(got - y), std::max(std::abs(y) / 16, 0x1p-10) * (1 + 1e-4))
                << dtype_name(dtype) << " row " << r << " column " << c << " got " << got << " for " << y;
            largest += std::abs(got) == 448.0 ? 1 : 0;
          }
        }
        EXPECT_GT(largest, d / 100);
        EXPECT_LT(largest, n * d / 2);
      }
    }
  }
}

TEST_P(Rows, NumericsOfGates) {
  unsigned seed = 300;
  for (const DType dtype : kTypes) {
    for (const Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
      for (const std::int64_t d : {1, 5, 64, 1408, 3000}) {
        Random x(*GetParam(), dtype, {4, 2 * d}, 8, seed++), out(*GetParam(), dtype, {4, d}, 8, seed++);
        gated_activation(x.view, out.view, activation);
        out.download();
        double worst = 0;
        for (std::int64_t r = 0; r < 4; ++r) {
          for (std::int64_t c = 0; c < d; ++c) {
            const double g = x.at(r, c);
            double y = g / (1 + std::exp(-g));
            if (activation == Activation::kGelu) y = g / 2 * (1 + std::erf(g / std::numbers::sqrt2));
            if (activation == Activation::kGeluTanh) {
              y = g / 2 * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (g + 0.044715 * g * g * g)));
            }
            y *= x.at(r, d + c);
            worst = std::max(worst, std::abs(out.at(r, c) - y) / (unit(dtype) * 0.51 * std::abs(y) + 1e-5));
          }
        }
        EXPECT_LE(worst, 1) << dtype_name(dtype) << " d " << d << " activation "
                            << static_cast<int>(activation);
        EXPECT_TRUE(out.gaps_are_untouched());
      }
    }
  }
}

/// A rotation of 5 tokens: by a table of its own, or by frequencies.
void expect_rotation(BackendUnderTest& backend, DType dtype, std::int64_t d, RopeOptions rope,
                     bool with_table, bool wide, unsigned seed) {
  constexpr std::int64_t kTokens = 5, kHeads = 3, kPositions = 50;
  Random x(backend, dtype, {kTokens, kHeads, d}, 8, seed),
      out(backend, dtype, {kTokens, kHeads, d}, 8, seed + 1);
  const int rotary = rope.rotary_dim > 0 ? rope.rotary_dim : static_cast<int>(d);
  Random table(backend, DType::kFloat32, {kPositions, rotary}, 0, seed + 2);
  const std::vector<std::int32_t> positions{0, 49, 7, 7, 31};
  const std::vector<std::int64_t> wide_positions(positions.begin(), positions.end());
  Guarded memory(backend, kTokens * (wide ? 8 : 4));
  memory.upload(wide ? static_cast<const void*>(wide_positions.data()) : positions.data());
  const TensorView at = TensorView::contiguous(memory.data(), wide ? DType::kInt64 : DType::kInt32, {kTokens},
                                               backend.device());
  apply_rope(x.view, at, with_table ? table.view : TensorView{}, out.view, rope);
  out.download();
  double worst = 0;
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const std::int32_t position = positions[static_cast<std::size_t>(t)];
    for (std::int64_t c = 0; c < kHeads * d; ++c) {
      const std::int64_t first = c / d * d, i = c % d;
      double y = x.at(t, c);
      if (i < rotary) {
        const std::int64_t pairs = rotary / 2, pair = rope.interleaved ? i / 2 : i % pairs;
        const bool second = rope.interleaved ? i % 2 == 1 : i >= pairs;
        const double angle = position * rope_frequency(rope, rotary, static_cast<int>(pair));
        const double scale =
            rope.scaling == RopeScaling::kYarn ? static_cast<double>(rope.attention_factor) : 1;
        const double cosine = with_table ? table.at(position, pair) : std::cos(angle) * scale;
        const double sine = with_table ? table.at(position, pairs + pair) : std::sin(angle) * scale;
        const double a = x.at(t, first + (rope.interleaved ? 2 * pair : pair));
        const double b = x.at(t, first + (rope.interleaved ? 2 * pair + 1 : pair + pairs));
        y = second ? b * cosine + a * sine : a * cosine - b * sine;
      }
      worst = std::max(worst, std::abs(out.at(t, c) - y) / (unit(dtype) * 0.51 * std::abs(y) + 5e-5));
    }
  }
  EXPECT_LE(worst, 1) << dtype_name(dtype) << " d " << d << " rotary " << rotary << " interleaved "
                      << rope.interleaved;
  EXPECT_TRUE(out.gaps_are_untouched());
}

TEST_P(Rows, NumericsOfRotations) {
  unsigned seed = 500;
  for (const DType dtype : kTypes) {
    for (const bool interleaved : {false, true}) {
      for (const auto& [d, rotary] :
           {std::pair{64, 0}, std::pair{128, 64}, std::pair{10, 6}, std::pair{256, 0}}) {
        RopeOptions rope{.interleaved = interleaved, .rotary_dim = rotary};
        for (const bool table : {false, true}) {
          expect_rotation(*GetParam(), dtype, d, rope, table, interleaved, seed);
          seed += 10;
        }
        rope.scaling = RopeScaling::kYarn;
        rope.factor = 40;
        rope.original_max_position = 4096;
        rope.attention_factor = 1.3f;
        expect_rotation(*GetParam(), dtype, d, rope, false, false, seed);
        rope.scaling = RopeScaling::kLlama3;
        rope.factor = 8;
        rope.theta = 500000;
        expect_rotation(*GetParam(), dtype, d, rope, false, true, seed + 5);
      }
    }
  }
}

// Of Llama 3.1 and DeepSeek-V3, whose pairs go over from one frequency to another where transformers' do.
TEST(RopeFrequency, OfLlama3AndYarn) {
  const RopeOptions llama{.theta = 500000,
                          .scaling = RopeScaling::kLlama3,
                          .factor = 8,
                          .original_max_position = 8192,
                          .low_freq_factor = 1,
                          .high_freq_factor = 4};
  EXPECT_DOUBLE_EQ(rope_frequency(llama, 128, 0), 1.0);
  EXPECT_NEAR(rope_frequency(llama, 128, 63), std::pow(500000, -126.0 / 128) / 8, 1e-12);
  const RopeOptions yarn{.scaling = RopeScaling::kYarn, .factor = 40, .original_max_position = 4096};
  // Pairs 10 to 23 of 32 go over: 64 ln(4096 / (2 pi turns)) / (2 ln 10000) of 32 turns and of 1.
  EXPECT_DOUBLE_EQ(rope_frequency(yarn, 64, 10), std::pow(10000, -20.0 / 64));
  EXPECT_LT(rope_frequency(yarn, 64, 11), std::pow(10000, -22.0 / 64));
  EXPECT_GT(rope_frequency(yarn, 64, 22), std::pow(10000, -44.0 / 64) / 40);
  EXPECT_NEAR(rope_frequency(yarn, 64, 23), std::pow(10000, -46.0 / 64) / 40, 1e-15);
}

TEST_P(Rows, InPlaceAndEmpty) {
  Random x(*GetParam(), DType::kBFloat16, {3, 64}, 8, 900),
      weight(*GetParam(), DType::kBFloat16, {64}, 0, 901),
      out(*GetParam(), DType::kBFloat16, {3, 64}, 8, 902);
  rms_norm(x.view, weight.view, out.view);
  rms_norm(x.view, weight.view, x.view);
  x.download();
  out.download();
  for (std::int64_t c = 0; c < 64; ++c) EXPECT_EQ(x.at(2, c), out.at(2, c));
  TensorView none = x.view;
  none.shape[0] = 0;
  rms_norm(none, weight.view, none);
}

TEST_P(Rows, BadInputIsNamed) {
  Random x(*GetParam(), DType::kBFloat16, {3, 64}, 0, 950),
      weight(*GetParam(), DType::kBFloat16, {64}, 0, 951);
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "accepted";
  };
  TensorView narrow = weight.view, heads = x.view;
  narrow.shape[0] = 63;
  EXPECT_EQ(message([&] { rms_norm(x.view, narrow, x.view); }),
            "weight.shape[0] is 63, expected x.shape[1] (d) = 64");
  EXPECT_EQ(message([&] {
              rms_norm(x.view, weight.view, x.view, {-1.0f, 0.0f});
            }),
            "eps is -1, expected a finite number >= 0");
  EXPECT_EQ(message([&] {
              rms_norm(x.view, weight.view, x.view, {1e-6f, 0.0f, 0.0f});
            }),
            "out_scale is 0, expected a positive finite number");
  EXPECT_EQ(message([&] { add_rms_norm(x.view, x.view, weight.view, x.view); }),
            "out is residual, expected another tensor");
  EXPECT_EQ(message([&] { gated_activation(x.view, x.view, Activation::kSilu); }),
            "gate_up.shape[1] is 64, expected 2 * out.shape[1] (d) = 128");
  heads.rank = 3;
  heads.shape = {3, 1, 64};
  heads.strides = {64, 64, 1};
  Guarded memory(*GetParam(), 12);
  const std::int32_t positions[] = {0, 5, 1};
  memory.upload(positions);
  const TensorView at = TensorView::contiguous(memory.data(), DType::kInt32, {3}, GetParam()->device());
  EXPECT_EQ(message([&] { apply_rope(heads, at, {}, heads, {.rotary_dim = 7}); }),
            "rotary_dim is 7, expected an even number up to x.shape[2] (d) = 64 and 512");
  EXPECT_EQ(message([&] { apply_rope(heads, at, {}, heads, {.theta = 0}); }),
            "theta is 0, expected a positive finite number");
  if (!GetParam()->checks_values()) return;
  Random table(*GetParam(), DType::kFloat32, {5, 64}, 0, 952);
  EXPECT_EQ(message([&] { apply_rope(heads, at, table.view, heads); }),
            "positions[1] is 5, expected 0 to 4 (rows of cos_sin)");
}

INSTANTIATE_TEST_SUITE_P(Backends, Rows, testing::ValuesIn(backends_under_test()),
                         [](const auto& backend) { return backend.param->name(); });

}  // namespace
}  // namespace flash_mla::conformance
