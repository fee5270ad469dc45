// The indexer's keys and queries before they are quantised, against float64 on the host.

#include "kernels/rows/sm90/index_rows.h"

#include <gtest/gtest.h>

#include <cmath>

#include "model_data.h"

namespace flash_mla::gpu_test {
namespace {

constexpr float kEps = 1e-6f;

std::size_t product(int a, int b) { return static_cast<std::size_t>(a) * static_cast<std::size_t>(b); }

Matrix matrix(const OnDevice<std::uint16_t>& data, std::int64_t rows, std::int64_t columns,
              std::int64_t stride) {
  return {reinterpret_cast<std::byte*>(data.get()), DType::kBFloat16, rows, columns, stride};
}

/// Cosines and sines of (rows, pairs).
struct Angles {
  Angles(Random& random, int rows, int pairs) {
    for (int i = 0; i < rows * pairs; ++i) {
      const float angle = random.normal() * 3;
      cosines.push_back(std::cos(angle));
      sines.push_back(std::sin(angle));
    }
  }
  std::vector<float> cosines, sines;
};

/// The first `pairs` pairs of x turned, from bfloat16.
void turn(std::vector<double>& x, std::size_t head, const Angles& angles, int row, int pairs) {
  for (int i = 0; i < pairs; ++i) {
    const auto at = product(row, pairs) + static_cast<std::size_t>(i),
               low = head + 2 * static_cast<std::size_t>(i);
    const double a = x[low], b = x[low + 1];
    x[low] = a * angles.cosines[at] - b * angles.sines[at];
    x[low + 1] = b * angles.cosines[at] + a * angles.sines[at];
  }
}

double rounded(double x) { return from_bf16(to_bf16(static_cast<float>(x))); }

TEST(IndexRows, KeysAreNormalisedAndTurned) {
  Random random(3);
  for (const auto& [dim, pairs, rows] :
       {std::tuple(128, 32, 1), std::tuple(128, 32, 203), std::tuple(64, 32, 70), std::tuple(128, 64, 9),
        std::tuple(64, 8, 5)}) {
    const int stride = dim + 8;
    const std::vector<std::uint16_t> k = random.bf16(product(rows, stride), 2);
    std::vector<float> weight = random.fp32(static_cast<std::size_t>(dim), 0.2f), bias = weight;
    for (float& w : weight) w += 1;
    const Angles angles(random, rows, pairs);
    const OnDevice<std::uint16_t> device(k);
    const OnDevice<float> weights(weight), biases(bias), cosines(angles.cosines), sines(angles.sines);
    sm90::norm_and_rotate_index_keys(matrix(device, rows, dim, stride), weights.get(), biases.get(), kEps,
                                     {cosines.get(), sines.get(), pairs}, nullptr);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    const std::vector<std::uint16_t> out = device.host();
    for (int t = 0; t < rows; ++t) {
      const auto first = product(t, stride);
      std::vector<double> x(static_cast<std::size_t>(dim));
      double sum = 0, squares = 0;
      for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] = from_bf16(k[first + i]);
      for (const double v : x) squares += (v - sum / dim) * (v - sum / dim);
      for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = rounded((x[i] - sum / dim) / std::sqrt(squares / dim + double{kEps}) * weight[i] + bias[i]);
      }
      turn(x, 0, angles, t, pairs);
      for (std::size_t i = 0; i < x.size(); ++i) {
        EXPECT_NEAR(from_bf16(out[first + i]), x[i], 0.02 + std::abs(x[i]) / 128)
            << dim << " " << t << " " << i;
      }
      for (int i = dim; i < stride; ++i) {
        EXPECT_EQ(out[first + static_cast<std::size_t>(i)], k[first + static_cast<std::size_t>(i)]);
      }
    }
  }
}

TEST(IndexRows, QueriesAreTurned) {
  Random random(4);
  for (const auto& [heads, dim, rows] :
       {std::tuple(64, 128, 3), std::tuple(5, 64, 40), std::tuple(1, 128, 300)}) {
    const int pairs = 32;
    const std::vector<std::uint16_t> q = random.bf16(product(rows, heads * dim), 1);
    const Angles angles(random, rows, pairs);
    const OnDevice<std::uint16_t> device(q);
    const OnDevice<float> cosines(angles.cosines), sines(angles.sines);
    sm90::rotate_index_queries(matrix(device, rows, std::int64_t{heads} * dim, std::int64_t{heads} * dim),
                               dim, {cosines.get(), sines.get(), pairs}, nullptr);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    const std::vector<std::uint16_t> out = device.host();
    for (int t = 0; t < rows; ++t) {
      std::vector<double> x(product(heads, dim));
      for (std::size_t i = 0; i < x.size(); ++i)
        x[i] = from_bf16(q[static_cast<std::size_t>(t) * x.size() + i]);
      for (int head = 0; head < heads; ++head) turn(x, product(head, dim), angles, t, pairs);
      for (std::size_t i = 0; i < x.size(); ++i) {
        ASSERT_NEAR(from_bf16(out[static_cast<std::size_t>(t) * x.size() + i]), x[i],
                    1e-3 + std::abs(x[i]) / 128);
      }
    }
  }
}

}  // namespace
}  // namespace flash_mla::gpu_test
