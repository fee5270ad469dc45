// Hyper-connections on every backend, against float64.

#include "flash_mla/mhc.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "flash_mla/error.h"
#include "tensor.h"

namespace flash_mla::conformance {
namespace {

class Mhc : public testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {
 protected:
  Tensor random(DType dtype, const std::vector<std::int64_t>& shape, unsigned seed,
                float spread = 1.0f) const {
    return Tensor::random(*GetParam(), dtype, shape, seed, spread);
  }
  Tensor none(DType dtype, const std::vector<std::int64_t>& shape) const {
    return {*GetParam(), dtype, shape};
  }
};

struct Mixes {
  Tensor post, comb, layer_input;
  Mixes(BackendUnderTest& backend, DType wide, DType dtype, std::int64_t tokens, std::int64_t n,
        std::int64_t d)
      : post(backend, wide, {tokens, n}),
        comb(backend, wide, {tokens, n, n}),
        layer_input(backend, dtype, {tokens, d}) {}
  MhcMixes view() const { return {post.view, comb.view, layer_input.view}; }
  MhcMixes host() { return {post.host(), comb.host(), layer_input.host()}; }
  void download() {
    for (Tensor* t : {&post, &comb, &layer_input}) t->download();
  }
};

void expect_near(const Tensor& got, const Tensor& expected, double relative, double absolute,
                 const char* what) {
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    worst = std::max(worst, std::abs(got[i] - expected[i]) / (relative * std::abs(expected[i]) + absolute));
    if (std::isnan(got[i])) worst = INFINITY;
  }
  EXPECT_LE(worst, 1) << what;
}

double unit(DType dtype) {
  return dtype == DType::kBFloat16 ? 1.0 / 128 : dtype == DType::kFloat16 ? 1.0 / 1024 : 2e-6;
}

TEST_P(Mhc, PreAndPostAreTheDefinition) {
  unsigned seed = 1;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const auto& [tokens, n, d] : {std::tuple<std::int64_t, std::int64_t, std::int64_t>{5, 4, 256},
                                       {70, 4, 512},
                                       {1100, 4, 256},
                                       {5, 4, 1000},
                                       {5, 1, 33},
                                       {5, 8, 40},
                                       {5, 3, 64},
                                       {2, 4, 4096}}) {
      for (const bool normed : {false, true}) {
        SCOPED_TRACE(testing::Message() << dtype_name(dtype) << " tokens " << tokens << " n " << n << " d "
                                        << d << " normed " << normed);
        Tensor residual = random(dtype, {tokens, n, d}, seed), x = random(dtype, {tokens, d}, seed + 1);
        // Mixes of order 1, so that no weight is a constant.
        Tensor fn = random(DType::kFloat32, {n * (n + 2), n * d}, seed + 2,
                           1.0f / std::sqrt(static_cast<float>(n * d)));
        Tensor scale = random(DType::kFloat32, {3}, seed + 3),
               base = random(DType::kFloat32, {n * (n + 2)}, seed + 4),
               norm = random(seed % 2 == 0 ? dtype : DType::kFloat32, {d}, seed + 5);
        seed += 7;
        MhcWeights weights{fn.view, scale.view, base.view}, host{fn.host(), scale.host(), base.host()};
        if (normed) weights.norm = norm.view, host.norm = norm.host();
        Mixes got(*GetParam(), DType::kFloat32, dtype, tokens, n, d),
            expected(*GetParam(), DType::kFloat64, DType::kFloat64, tokens, n, d);
        mhc_pre(residual.view, weights, got.view());
        got.download();
        reference::mhc_pre(residual.host(), host, expected.host());
        expect_near(got.post, expected.post, 1e-5, 1e-6, "post");
        expect_near(got.comb, expected.comb, 1e-5, 1e-6, "comb");
        // With a norm the sum is rounded twice.
        expect_near(got.layer_input, expected.layer_input, unit(dtype) * (normed ? 1.1 : 0.55), 2e-5,
                    "layer_input");

        Tensor out = none(dtype, {tokens, n, d}), wide = none(DType::kFloat64, {tokens, n, d});
        mhc_post(x.view, residual.view, got.post.view, got.comb.view, out.view);
        out.download();
        reference::mhc_post(x.host(), residual.host(), got.post.host(), got.comb.host(), wide.host());
        expect_near(out, wide, unit(dtype) * 0.51, 2e-6, "out");

        // Both in one pass have the bits of the two, also where everything is written over what it was made from.
        Mixes next(*GetParam(), DType::kFloat32, dtype, tokens, n, d);
        mhc_pre(out.view, weights, next.view());
        mhc_post_pre(x.view, residual.view, got.post.view, got.comb.view, residual.view, weights, got.view());
        next.download();
        got.download();
        residual.download();
        EXPECT_TRUE(residual.bytes == out.bytes);
        EXPECT_TRUE(got.post.bytes == next.post.bytes && got.comb.bytes == next.comb.bytes &&
                    got.layer_input.bytes == next.layer_input.bytes);
      }
    }
  }
}

TEST_P(Mhc, StridesAreFree) {
  // Streams of tokens apart, columns of a wider memory: rows of 16 bytes and others.
  for (const std::int64_t gap : {8, 3}) {
    constexpr std::int64_t kTokens = 6, kStreams = 4, kWidth = 256;
    Tensor memory = random(DType::kBFloat16, {kStreams, kTokens, kWidth + gap}, 21);
    TensorView residual = memory.view;
    residual.shape = {kTokens, kStreams, kWidth};
    residual.strides = {kWidth + gap, kTokens * (kWidth + gap), 1};
    Tensor dense = none(DType::kBFloat16, {kTokens, kStreams, kWidth});
    for (std::size_t t = 0; t < kTokens; ++t) {
      for (std::size_t s = 0; s < kStreams; ++s) {
        for (std::size_t c = 0; c < kWidth; ++c) {
          dense.put((t * kStreams + s) * kWidth + c,
                    memory[(s * kTokens + t) * static_cast<std::size_t>(kWidth + gap) + c]);
        }
      }
    }
    Tensor fn = random(DType::kFloat32, {24, kStreams * kWidth}, 22, 0.03f),
           scale = random(DType::kFloat32, {3}, 23), base = random(DType::kFloat32, {24}, 24);
    Mixes got(*GetParam(), DType::kFloat32, DType::kBFloat16, kTokens, kStreams, kWidth),
        expected(*GetParam(), DType::kFloat64, DType::kFloat64, kTokens, kStreams, kWidth);
    mhc_pre(residual, {fn.view, scale.view, base.view}, got.view());
    got.download();
    reference::mhc_pre(dense.host(), {fn.host(), scale.host(), base.host()}, expected.host());
    expect_near(got.comb, expected.comb, 1e-5, 1e-6, "comb");
    expect_near(got.layer_input, expected.layer_input, 0.55 / 128, 2e-5, "layer_input");
    Tensor x = random(DType::kBFloat16, {kTokens, kWidth}, 25),
           wide = none(DType::kFloat64, {kTokens, kStreams, kWidth});
    mhc_post(x.view, residual, got.post.view, got.comb.view, residual);
    memory.download();
    reference::mhc_post(x.host(), dense.host(), got.post.host(), got.comb.host(), wide.host());
    double worst = 0;
    for (std::size_t t = 0; t < kTokens; ++t) {
      for (std::size_t s = 0; s < kStreams; ++s) {
        const std::size_t row = (s * kTokens + t) * static_cast<std::size_t>(kWidth + gap);
        for (std::size_t c = 0; c < kWidth; ++c) {
          const double y = wide[(t * kStreams + s) * kWidth + c];
          worst = std::max(worst, std::abs(memory[row + c] - y) / (std::abs(y) * 0.51 / 128 + 2e-6));
        }
      }
    }
    EXPECT_LE(worst, 1) << gap;
  }
}

TEST_P(Mhc, CombIsNearlyDoublyStochastic) {
  constexpr std::int64_t kTokens = 16, kStreams = 4, kWidth = 128;
  const Tensor residual = random(DType::kBFloat16, {kTokens, kStreams, kWidth}, 3),
               fn = random(DType::kFloat32, {24, kStreams * kWidth}, 4, 0.05f),
               scale = random(DType::kFloat32, {3}, 5), base = random(DType::kFloat32, {24}, 6);
  Mixes mixes(*GetParam(), DType::kFloat32, DType::kBFloat16, kTokens, kStreams, kWidth);
  mhc_pre(residual.view, {fn.view, scale.view, base.view}, mixes.view());
  mixes.download();
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

TEST_P(Mhc, BadInputIsNamed) {
  const Tensor residual = random(DType::kFloat32, {2, 4, 8}, 1), fn = random(DType::kFloat32, {24, 32}, 2),
               scale = random(DType::kFloat32, {3}, 3), base = random(DType::kFloat32, {24}, 4),
               nine = random(DType::kFloat32, {2, 9, 8}, 5), x = random(DType::kFloat32, {2, 7}, 6);
  const Mixes mixes(*GetParam(), DType::kFloat32, DType::kFloat32, 2, 4, 8);
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
            "fn is " + scale.view.describe() + ", expected a tensor of rank 2");
  options.sinkhorn_repeat = 0;
  EXPECT_EQ(message([&] { mhc_pre(residual.view, weights, mixes.view(), options); }),
            "sinkhorn_repeat is 0, expected 1 to 1000");
  EXPECT_EQ(
      message([&] { mhc_post(x.view, residual.view, mixes.post.view, mixes.comb.view, residual.view); }),
      "x.shape[1] is 7, expected residual.shape[2] (d) = 8");
}

INSTANTIATE_TEST_SUITE_P(Backends, Mhc, testing::ValuesIn(backends_under_test()),
                         [](const auto& backend) { return backend.param->name(); });

}  // namespace
}  // namespace flash_mla::conformance
