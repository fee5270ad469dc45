#pragma once

// The experts' products where nothing is aligned: a warp for each output.

#include <cuda_bf16.h>

#include <cstdint>

#include "base/fp8.h"
#include "kernels/gemm/sm90/int4_weights.h"
#include "kernels/moe/sm90/moe.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/rows/sm90/silu.cuh"

namespace flash_mla::sm90 {

inline constexpr int kPlainThreads = 256;

struct PlainArgs {
  ExpertFfn ffn;
  __nv_bfloat16* act;  // (pairs, intermediate)
  float* results;      // (pairs, hidden)
};

/// A row of weights.
struct PlainRow {
  const __nv_bfloat16* values;
  const E4m3* codes;           // or null
  const std::uint32_t* words;  // of int4, every second; or null
  const float* scales;         // of the codes
  std::int64_t scale_stride;

  __device__ float at(std::int64_t i) const {
    if (words != nullptr) {
      const int code = static_cast<int>(words[i / 8 * 2] >> (4 * int4_place(i)) & 15) - 8;
      return static_cast<float>(code) * scales[i / 128 * scale_stride];
    }
    if (codes == nullptr) return __bfloat162float(values[i]);
    return to_float(codes[i]) * scales[i / 128];
  }
};

/// Row n of expert e in (num_experts, rows, columns).
__device__ PlainRow plain_row(const ExpertFfn& f, const void* weights, const float* scales, std::int64_t e,
                              std::int64_t rows, std::int64_t columns, std::int64_t n) {
  const std::int64_t at = (e * rows + n) * columns, groups = (columns + 127) / 128;
  PlainRow row{};
  if (scales == nullptr) {
    row.values = static_cast<const __nv_bfloat16*>(weights) + at;
  } else if (f.int4) {
    row.words = static_cast<const std::uint32_t*>(weights) + int4_word(e * rows + n, 0, columns);
    row.scales = scales + e * groups * rows + n;
    row.scale_stride = rows;
  } else {
    row.codes = static_cast<const E4m3*>(weights) + at;
    row.scales = scales + (e * ((rows + 7) / 8) + n / 8) * groups;
  }
  return row;
}

__device__ float plain_dot(const __nv_bfloat16* x, const PlainRow& weight, std::int64_t n) {
  float sum = 0;
  for (std::int64_t i = threadIdx.x % 32; i < n; i += 32) sum += __bfloat162float(x[i]) * weight.at(i);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

/// A warp for each output of gate and up (kDown false) or of down.
template <bool kDown>
__global__ __launch_bounds__(kPlainThreads) void plain_experts(const PlainArgs p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const ExpertFfn& f = p.ffn;
  const std::int64_t columns = kDown ? f.hidden : f.intermediate;
  const std::int64_t count = f.tokens * f.experts_per_token * columns;
  const std::int64_t stride = std::int64_t(gridDim.x) * (kPlainThreads / 32);
  for (std::int64_t i = std::int64_t(blockIdx.x) * (kPlainThreads / 32) + threadIdx.x / 32; i < count;
       i += stride) {
    const std::int64_t pair = i / columns, n = i % columns, e = f.ids[pair];
    if (e < 0) continue;
    if constexpr (kDown) {
      const PlainRow row = plain_row(f, f.down, f.down_scales, e, f.hidden, f.intermediate, n);
      const float value = plain_dot(p.act + pair * f.intermediate, row, f.intermediate);
      if (threadIdx.x % 32 == 0) p.results[pair * f.hidden + n] = value;
    } else {
      const auto* x = static_cast<const __nv_bfloat16*>(f.x) + pair / f.experts_per_token * f.x_stride;
      const auto row = [&](std::int64_t at) {
        return plain_row(f, f.gate_up, f.gate_up_scales, e, 2 * f.intermediate, f.hidden, at);
      };
      const float gate = plain_dot(x, row(n), f.hidden);
      const float up = plain_dot(x, row(n + f.intermediate), f.hidden);
      if (threadIdx.x % 32 == 0) {
        p.act[pair * f.intermediate + n] = __float2bfloat16(silu(gate) * up);
      }
    }
  }
}

}  // namespace flash_mla::sm90
