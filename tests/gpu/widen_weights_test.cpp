// e4m3 weights widened to bfloat16, and made up.

#include "kernels/gemm/sm90/widen_weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/fp8.h"
#include "model_data.h"

namespace flash_mla::gpu_test {
namespace {

struct Shape {
  int n, k;
};

// Bit for bit what the reader of checkpoints rounds.
TEST(WidenWeights, AreRoundedAsOnTheHost) {
  Random random(15);
  for (const Shape shape :
       {Shape{576, 2048}, Shape{8, 16}, Shape{1000, 400}, Shape{40, 72}, Shape{13, 300}, Shape{3, 1}}) {
    std::vector<std::uint8_t> codes(std::size_t(shape.n) * shape.k);
    for (std::uint8_t& c : codes) c = static_cast<std::uint8_t>(random.below(127) + 128 * random.below(2));
    const std::size_t scale_columns = std::size_t(shape.k + 127) / 128;
    std::vector<float> scales(std::size_t(shape.n + 7) / 8 * scale_columns);
    for (float& s : scales) s = std::ldexp(1.0f + float(random.below(1000)) / 1000, random.below(40) - 30);
    const OnDevice<std::uint8_t> codes_device(codes);
    const OnDevice<float> scales_device(scales);
    OnDevice<std::uint16_t> out(codes.size());
    sm90::WidenWeights args;
    args.codes = codes_device.get();
    args.scales = scales_device.get();
    args.out = out.get();
    args.rows = shape.n;
    args.columns = shape.k;
    check(sm90::widen_weights(args, nullptr), "widen_weights");
    const std::vector<std::uint16_t> got = out.host();
    for (std::size_t i = 0; i < codes.size(); ++i) {
      const std::size_t row = i / shape.k, column = i % shape.k;
      ASSERT_EQ(got[i], to_bf16(to_float(E4m3{codes[i]}) * scales[row / 8 * scale_columns + column / 128]))
          << "n" << shape.n << " k" << shape.k << " element " << i;
    }
  }
  sm90::WidenWeights args;
  args.rows = args.columns = 8;
  EXPECT_EQ(sm90::widen_weights(args, nullptr), cudaErrorInvalidValue);
  args.rows = -1;
  EXPECT_EQ(sm90::widen_weights(args, nullptr), cudaErrorInvalidValue);
  args.rows = 0;
  EXPECT_EQ(sm90::widen_weights(args, nullptr), cudaSuccess);
}

TEST(WidenWeights, MadeUpOnesAreFiniteAndSpread) {
  OnDevice<std::uint8_t> codes(100'000);
  check(sm90::fill_random_e4m3(codes.get(), 100'000, 5, nullptr), "fill_random_e4m3");
  double sum = 0, squares = 0;
  for (const std::uint8_t c : codes.host()) {
    const double v = double(to_float(E4m3{c}));
    ASSERT_TRUE(std::isfinite(v));
    sum += v;
    squares += v * v;
  }
  EXPECT_NEAR(sum / 1e5, 0, 1.5);
  EXPECT_NEAR(std::sqrt(squares / 1e5), double(sm90::kRandomE4m3Deviation), 2);
}

}  // namespace
}  // namespace flash_mla::gpu_test
