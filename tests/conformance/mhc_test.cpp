// Hyper-connections against float64, on the CPU.

#include "flash_mla/mhc.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "base/element.h"
#include "flash_mla/error.h"

namespace flash_mla {
namespace {

/// A dense tensor of random numbers, or of NaN to be written.
class Tensor {
 public:
  Tensor(DType dtype, std::vector<std::int64_t> shape, unsigned seed, float spread = 1.0f) : dtype_(dtype) {
    std::int64_t count = 1;
    for (const std::int64_t s : shape) count *= s;
    bytes_.assign(static_cast<std::size_t>(count) * dtype_size(dtype), 0xFF);
    view.data = bytes_.data();
    view.dtype = dtype;
    view.rank = static_cast<int>(shape.size());
    std::int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.shape[static_cast<std::size_t>(i)] = shape[static_cast<std::size_t>(i)];
      view.strides[static_cast<std::size_t>(i)] = stride;
      stride *= shape[static_cast<std::size_t>(i)];
    }
    if (seed == 0) return;
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(0, spread);
    visit_float_type(dtype, [&](auto element) {
      auto* data = reinterpret_cast<decltype(element)*>(bytes_.data());
      for (std::int64_t i = 0; i < count; ++i)
        data[i] = from_double<decltype(element)>(static_cast<double>(normal(rng)));
    });
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  std::vector<double> values() const {
    return visit_float_type(dtype_, [&](auto element) {
      std::vector<double> out(bytes_.size() / sizeof(element));
      const auto* data = reinterpret_cast<const decltype(element)*>(bytes_.data());
      for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<double>(to_float(data[i]));
      return out;
    });
  }
  bool operator==(const Tensor& other) const { return bytes_ == other.bytes_; }
  TensorView view;

 private:
  DType dtype_;
  std::vector<std::uint8_t> bytes_;
};

void expect_near(const Tensor& got, const Tensor& expected, double relative, double absolute,
                 const char* what) {
  const std::vector<double> a = got.values(), b = expected.values();
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    worst = std::max(worst, std::abs(a[i] - b[i]) / (relative * std::abs(b[i]) + absolute));
    if (std::isnan(a[i])) worst = INFINITY;
  }
  EXPECT_LE(worst, 1) << what;
}

struct Mixes {
  Tensor post, comb, layer_input;
  Mixes(DType wide, DType dtype, std::int64_t tokens, std::int64_t n, std::int64_t d)
      : post(wide, {tokens, n}, 0), comb(wide, {tokens, n, n}, 0), layer_input(dtype, {tokens, d}, 0) {}
  MhcMixes view() const { return {post.view, comb.view, layer_input.view}; }
};

double unit(DType dtype) {
  return dtype == DType::kBFloat16 ? 1.0 / 128 : dtype == DType::kFloat16 ? 1.0 / 1024 : 2e-6;
}

TEST(Mhc, PreAndPostAreTheDefinition) {
  unsigned seed = 1;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const auto& [n, d] :
         {std::pair<std::int64_t, std::int64_t>{4, 256}, {4, 1000}, {1, 33}, {8, 40}, {3, 64}}) {
      for (const bool normed : {false, true}) {
        constexpr std::int64_t kTokens = 5;
        Tensor residual(dtype, {kTokens, n, d}, seed++), x(dtype, {kTokens, d}, seed++);
        // Mixes of order 1, so that no weight is a constant.
        Tensor fn(DType::kFloat32, {n * (n + 2), n * d}, seed++, 1.0f / std::sqrt(static_cast<float>(n * d)));
        Tensor scale(DType::kFloat32, {3}, seed++), base(DType::kFloat32, {n * (n + 2)}, seed++),
            norm(dtype, {d}, seed++);
        MhcWeights weights{fn.view, scale.view, base.view};
        if (normed) weights.norm = norm.view;
        const Mixes got(DType::kFloat32, dtype, kTokens, n, d),
            expected(DType::kFloat64, DType::kFloat64, kTokens, n, d);
        mhc_pre(residual.view, weights, got.view());
        reference::mhc_pre(residual.view, weights, expected.view());
        expect_near(got.post, expected.post, 1e-5, 1e-6, "post");
        expect_near(got.comb, expected.comb, 1e-5, 1e-6, "comb");
        // With a norm the sum is rounded twice.
        expect_near(got.layer_input, expected.layer_input, unit(dtype) * (normed ? 1.1 : 0.55), 2e-5,
                    "layer_input");

        const Tensor out(dtype, {kTokens, n, d}, 0), wide(DType::kFloat64, {kTokens, n, d}, 0);
        mhc_post(x.view, residual.view, got.post.view, got.comb.view, out.view);
        reference::mhc_post(x.view, residual.view, got.post.view, got.comb.view, wide.view);
        expect_near(out, wide, unit(dtype) * 0.51, 2e-6, "out");

        // Both in one pass have the bits of the two, also where everything is written over what it was made from.
        const Mixes next(DType::kFloat32, dtype, kTokens, n, d);
        mhc_pre(out.view, weights, next.view());
        mhc_post_pre(x.view, residual.view, got.post.view, got.comb.view, residual.view, weights, got.view());
        EXPECT_TRUE(residual == out);
        EXPECT_TRUE(got.post == next.post && got.comb == next.comb && got.layer_input == next.layer_input);
      }
    }
  }
}

TEST(Mhc, CombIsNearlyDoublyStochastic) {
  constexpr std::int64_t kTokens = 16, kStreams = 4, kWidth = 128;
  Tensor residual(DType::kBFloat16, {kTokens, kStreams, kWidth}, 3),
      fn(DType::kFloat32, {24, kStreams * kWidth}, 4, 0.05f), scale(DType::kFloat32, {3}, 5),
      base(DType::kFloat32, {24}, 6);
  const Mixes mixes(DType::kFloat32, DType::kBFloat16, kTokens, kStreams, kWidth);
  mhc_pre(residual.view, {fn.view, scale.view, base.view}, mixes.view());
  const std::vector<double> comb = mixes.comb.values();
  for (std::size_t i = 0; i < kTokens * kStreams; ++i) {
    double row = 0, column = 0;
    for (std::size_t j = 0; j < kStreams; ++j) {
      row += comb[i * kStreams + j];
      column += comb[i / kStreams * 16 + j * kStreams + i % kStreams];
    }
    EXPECT_NEAR(row, 1, 1e-3);
    EXPECT_NEAR(column, 1, 1e-5);
  }
}

TEST(Mhc, BadInputIsNamed) {
  Tensor residual(DType::kFloat32, {2, 4, 8}, 1), fn(DType::kFloat32, {24, 32}, 2),
      scale(DType::kFloat32, {3}, 3), base(DType::kFloat32, {24}, 4), nine(DType::kFloat32, {2, 9, 8}, 5),
      x(DType::kFloat32, {2, 7}, 6);
  const Mixes mixes(DType::kFloat32, DType::kFloat32, 2, 4, 8);
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "accepted";
  };
  const MhcWeights weights{fn.view, scale.view, base.view};
  MhcOptions options;
  EXPECT_EQ(message([&] { mhc_pre(residual.view, weights, mixes.view(), options); }), "accepted");
  EXPECT_EQ(message([&] { mhc_pre(nine.view, weights, mixes.view()); }),
            "residual.shape[1] (n) is 9, expected 1 to 8");
  EXPECT_EQ(message([&] {
              mhc_pre(residual.view, {scale.view, scale.view, base.view}, mixes.view());
            }),
            "fn is float32 (3,) on cpu, expected a tensor of rank 2");
  options.sinkhorn_repeat = 0;
  EXPECT_EQ(message([&] { mhc_pre(residual.view, weights, mixes.view(), options); }),
            "sinkhorn_repeat is 0, expected 1 to 1000");
  EXPECT_EQ(
      message([&] { mhc_post(x.view, residual.view, mixes.post.view, mixes.comb.view, residual.view); }),
      "x.shape[1] is 7, expected residual.shape[2] (d) = 8");
}

}  // namespace
}  // namespace flash_mla
