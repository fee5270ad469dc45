// Products of few rows: by weight_stream.cuh, and by the plain kernel here where rows are not aligned to 16
// bytes.
//
// Tile:      one output for each warp. Threads: 8 warps, all alike. Memory: none. Registers: 40 a thread.

#include <cuda_bf16.h>

#include "base/cuda/launch.h"
#include "base/fp8.h"
#include "kernels/gemm/sm90/skinny_gemm.h"
#include "kernels/gemm/sm90/weight_stream.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/rows/sm90/silu.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kPlainThreads = 256;

__device__ float weight_at(const SkinnyGemm& p, std::int64_t n, std::int64_t k) {
  const std::int64_t i = n * p.k + k;
  if (p.weight_scales != nullptr) {
    return to_float(static_cast<const E4m3*>(p.weight)[i]) *
           p.weight_scales[n / 8 * ((p.k + 127) / 128) + k / 128];
  }
  return p.weight_fp32 ? static_cast<const float*>(p.weight)[i]
                       : __bfloat162float(static_cast<const __nv_bfloat16*>(p.weight)[i]);
}

/// Sum over k of x[row, k] * weight[n, k], spread over the warp's lanes.
__device__ float dot(const SkinnyGemm& p, std::int64_t row, std::int64_t n) {
  const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(p.x) + row * p.x_stride;
  float sum = 0;
  for (std::int64_t i = threadIdx.x % 32; i < p.k; i += 32) {
    sum += __bfloat162float(x[i]) * weight_at(p, n, i);
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum + (p.bias != nullptr ? p.bias[n] : 0.0f);
}

/// For shapes and pointers that the fast path does not take: a warp for each output.
__global__ __launch_bounds__(kPlainThreads) void plain_gemm(const SkinnyGemm p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t columns = p.silu_mul ? p.n / 2 : p.n;
  const std::int64_t stride = std::int64_t(gridDim.x) * (kPlainThreads / 32);
  for (std::int64_t i = std::int64_t(blockIdx.x) * (kPlainThreads / 32) + threadIdx.x / 32; i < p.m * columns;
       i += stride) {
    const std::int64_t row = i / columns, n = i % columns;
    float value = dot(p, row, n);
    if (p.silu_mul) value = silu(value) * dot(p, row, n + columns);
    if (threadIdx.x % 32 != 0) continue;
    const std::int64_t at = row * p.out_stride + n;
    if (p.out_fp32) {
      float* out = static_cast<float*>(p.out) + at;
      *out = p.accumulate ? *out + value : value;
    } else {
      __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + at;
      *out = __float2bfloat16(p.accumulate ? __bfloat162float(*out) + value : value);
    }
  }
}

bool valid(const SkinnyGemm& p) {
  if (p.m < 0 || p.n < 0 || p.k < 0 || (p.silu_mul && p.n % 2 != 0)) return false;
  if (p.m == 0 || p.n == 0) return true;
  if (p.weight_scales != nullptr && p.weight_fp32) return false;
  if (p.out == nullptr || (p.k > 0 && (p.x == nullptr || p.weight == nullptr))) return false;
  return p.m == 1 || (p.x_stride >= p.k && p.out_stride >= (p.silu_mul ? p.n / 2 : p.n));
}

}  // namespace

cudaError_t skinny_gemm(const SkinnyGemm& p, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  const bool e4m3 = p.weight_scales != nullptr;
  const bool whole_rows = !e4m3 || (p.silu_mul ? p.n / 2 : p.n) % 8 == 0;
  if (!whole_rows || !fits_stream(p.x, p.m == 1 ? 0 : p.x_stride, p.weight, p.k, e4m3)) {
    return launch(LaunchConfig(8 * 132, kPlainThreads, 0, stream).programmatic(p.programmatic_launch),
                  plain_gemm, p);
  }
  WeightStream s;
  s.weight = p.weight;
  s.scales = p.weight_scales;
  s.bias = p.bias;
  s.x = p.x;
  s.out = p.out;
  s.x_stride = p.x_stride;
  s.out_stride = p.out_stride;
  s.n = p.n;
  s.k = p.k;
  s.m = p.m;
  s.out_fp32 = p.out_fp32;
  s.weight_fp32 = p.weight_fp32;
  s.accumulate = p.accumulate;
  s.silu_mul = p.silu_mul;
  s.batch_invariant = p.batch_invariant;
  s.programmatic_launch = p.programmatic_launch;
  return launch_stream(s, stream);
}

}  // namespace flash_mla::sm90
