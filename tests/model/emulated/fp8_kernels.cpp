// Products in FP8 and the quantisation of what they multiply, each as its header says it, in loops over the host's memory.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "base/element.h"
#include "base/fp8.h"
#include "kernels/gemm/sm90/fp8_gemm.h"
#include "kernels/quant/sm90/quantise_rows.h"
#include "queue.h"

namespace flash_mla::sm90 {

using emulated::queue;

namespace {

/// `n` values of a row as e4m3 with a scale for every 128.
void quantise_row(const float* x, std::int64_t n, std::uint8_t* codes, float* scales) {
  for (std::int64_t first = 0; first < n; first += 128) {
    const std::int64_t count = std::min<std::int64_t>(128, n - first);
    float highest = 0;
    for (std::int64_t i = 0; i < count; ++i) highest = std::max(highest, std::abs(x[first + i]));
    const float scale = std::max(highest / kE4m3Max, 1.17549435e-38f);
    for (std::int64_t i = 0; i < count; ++i) codes[first + i] = to_e4m3(x[first + i] / scale).bits;
    scales[first / 128] = scale;
  }
}

/// Row `row` of x times row n of the only matrix.
float product(const Fp8Gemm& g, std::int64_t row, std::int64_t n) {
  const auto* const x = static_cast<const E4m3*>(g.x) + row * g.x_stride;
  const auto* const w = static_cast<const E4m3*>(g.weight) + n * g.k;
  const std::int64_t width = (g.k + 127) / 128;
  float sum = 0;
  for (std::int64_t c = 0; c < width; ++c) {
    float part = 0;
    for (std::int64_t i = 128 * c; i < std::min(g.k, 128 * c + 128); ++i)
      part += to_float(x[i]) * to_float(w[i]);
    sum += part * g.x_scales[row * width + c] * g.weight_scales[n / 8 * width + c];
  }
  return sum;
}

void multiply_row(const Fp8Gemm& g, std::int64_t row) {
  for (std::int64_t n = 0; n < g.n; ++n) {
    const float value = product(g, row, n);
    if (g.out_fp32) {
      float& out = static_cast<float*>(g.out)[row * g.out_stride + n];
      out = value + (g.accumulate ? out : 0);
    } else {
      Bf16& out = static_cast<Bf16*>(g.out)[row * g.out_stride + n];
      out = to_bf16(value + (g.accumulate ? to_float(out) : 0));
    }
  }
}

void activate_row(const Fp8Gemm& g, std::int64_t row) {
  const std::int64_t outputs = g.n / 2;
  std::vector<float> act(static_cast<std::size_t>(outputs));
  for (std::int64_t n = 0; n < outputs; ++n) {
    const float gate = product(g, row, n);
    act[static_cast<std::size_t>(n)] = gate / (1 + std::exp(-gate)) * product(g, row, outputs + n);
  }
  quantise_row(act.data(), outputs, static_cast<std::uint8_t*>(g.out) + row * outputs,
               g.out_scales + row * ((outputs + 127) / 128));
}

}  // namespace

bool fits_fp8_gemm(const Fp8Gemm& g) {
  return g.units == nullptr && g.k % 16 == 0 && g.n % (g.silu_quantise ? 32 : 8) == 0 && g.x_stride >= g.k &&
         (g.silu_quantise || g.out_stride >= g.n);
}
Fp8Tiles plan_fp8_gemm(std::int64_t, std::int64_t, std::int64_t, bool, int) { return {}; }

cudaError_t fp8_gemm(const Fp8Gemm& g, cudaStream_t) {
  if (!fits_fp8_gemm(g) || g.gather != g.silu_quantise) return cudaErrorInvalidValue;
  queue([=] {
    for (std::int64_t row = 0; row < g.m; ++row)
      g.silu_quantise ? activate_row(g, row) : multiply_row(g, row);
  });
  return cudaSuccess;
}

cudaError_t quantise_rows(const QuantiseRows& q, cudaStream_t) {
  queue([=] {
    std::vector<float> x(static_cast<std::size_t>(q.columns));
    for (std::int64_t row = 0; row < q.rows; ++row) {
      const auto* const from = static_cast<const Bf16*>(q.x) + row * q.x_stride;
      for (std::int64_t i = 0; i < q.columns; ++i) x[static_cast<std::size_t>(i)] = to_float(from[i]);
      quantise_row(x.data(), q.columns, static_cast<std::uint8_t*>(q.codes) + row * q.columns,
                   q.scales + row * ((q.columns + 127) / 128));
    }
  });
  return cudaSuccess;
}

}  // namespace flash_mla::sm90
