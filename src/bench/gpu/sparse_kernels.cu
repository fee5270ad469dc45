#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "base/cuda/check.h"
#include "base/fp8.h"
#include "bench/gpu/sparse_kernels.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr int kDimV = 512, kThreads = 256;

// MurmurHash3's finaliser: a counter becomes 32 random bits.
__device__ std::uint32_t mix(std::uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  x ^= x >> 33;
  return static_cast<std::uint32_t>(x);
}

/// N(0, 1) / 2, by Box and Muller's transform.
__device__ float half_normal(std::uint64_t at) {
  const float u = (static_cast<float>(mix(2 * at)) + 1.0f) * 0x1p-32f,
              v = static_cast<float>(mix(2 * at + 1)) * 0x1p-32f;
  return 0.5f * sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

__device__ int tile_of(const kv::Pool& pool) {
  return pool.format == KvFormat::kFp8V32 ? kv::Fp8V32::kTile : kv::Fp8V4::kTile;
}

/// A block for each token.
__global__ void fill_tokens_kernel(kv::Pool pool, std::uint64_t seed) {
  const bool fp8 = pool.format != KvFormat::kBFloat16;
  const int latent = pool.latent(), tile = tile_of(pool);
  for (std::int64_t slot = blockIdx.x; slot < pool.num_slots(); slot += gridDim.x) {
    const kv::Token token = kv::locate(pool, slot);
    const std::uint64_t first = (seed << 44) + static_cast<std::uint64_t>(slot) * 1024;
    for (int i = static_cast<int>(threadIdx.x); i < pool.d_qk; i += static_cast<int>(blockDim.x)) {
      const float x = half_normal(first + static_cast<std::uint64_t>(i));
      if (pool.format == KvFormat::kFp8Tensor) {
        reinterpret_cast<E4m3*>(token.latent)[i] = to_e4m3(x / pool.scale);
      } else if (i >= latent) {
        reinterpret_cast<__nv_bfloat16*>(token.rope)[i - latent] = __float2bfloat16(x);
      } else if (!fp8) {
        reinterpret_cast<__nv_bfloat16*>(token.latent)[i] = __float2bfloat16(x);
      } else {
        const std::uint32_t bits = mix(first + 1000 + static_cast<std::uint64_t>(i / tile));
        // 448 of the smallest scale are four deviations.
        float scale = 0.0045f + 0.004f * static_cast<float>(bits & 0xFFFF) * 0x1p-16f;
        if (pool.format == KvFormat::kFp8V4) scale = (bits & 1) != 0 ? 0x1p-7f : 0x1p-8f;
        reinterpret_cast<E4m3*>(token.latent)[i] = to_e4m3(x / scale);
        if (i % tile != 0) continue;
        if (pool.format == KvFormat::kFp8V32) {
          reinterpret_cast<float*>(token.scales)[i / tile] = scale;
        } else {
          token.scales[i / tile] = std::byte{to_e8m0(scale).bits};
        }
      }
    }
  }
}

/// Element i of a token.
__device__ float element(const kv::Pool& pool, const kv::Token& token, int i) {
  if (pool.format == KvFormat::kFp8Tensor)
    return to_float(reinterpret_cast<const E4m3*>(token.latent)[i]) * pool.scale;
  const int latent = pool.latent();
  if (i >= latent) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(token.rope)[i - latent]);
  if (pool.format == KvFormat::kBFloat16)
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(token.latent)[i]);
  const float value = to_float(reinterpret_cast<const E4m3*>(token.latent)[i]);
  const int t = i / tile_of(pool);
  return value * (pool.format == KvFormat::kFp8V32
                      ? reinterpret_cast<const float*>(token.scales)[t]
                      : to_float(E8m0{static_cast<std::uint8_t>(token.scales[t])}));
}

/// Sum of x over the block, in every thread.
__device__ double block_sum(double x) {
  __shared__ double parts[kThreads];
  parts[threadIdx.x] = x;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = parts[0];
  __syncthreads();
  return sum;
}
__device__ double block_maximum(double x) {
  __shared__ double parts[kThreads];
  parts[threadIdx.x] = x;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x] = fmax(parts[threadIdx.x], parts[threadIdx.x + half]);
    __syncthreads();
  }
  const double highest = parts[0];
  __syncthreads();
  return highest;
}

/// A block for each row.
__global__ void __launch_bounds__(kThreads) reference_listed_rows_kernel(ListedRows p) {
  const ListedRow row = p.rows[blockIdx.x];
  const int d_qk = p.pools[0].d_qk, keys = row.count + row.extra_count;
  const auto* q = static_cast<const __nv_bfloat16*>(p.q) + row.query * d_qk;
  double* scores = p.scores + blockIdx.x * p.score_stride;
  const auto token_of = [&](int key, const kv::Pool*& pool) {
    pool = &p.pools[key < row.count ? 0 : 1];
    return kv::locate(*pool, p.slots[row.begin + key]);
  };
  double highest = -INFINITY;
  // A warp for each key, its lanes side by side in the token.
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int key = warp; key < keys; key += kThreads / 32) {
    const kv::Pool* pool = nullptr;
    const kv::Token token = token_of(key, pool);
    double sum = 0;
    for (int i = lane; i < d_qk; i += 32)
      sum += static_cast<double>(__bfloat162float(q[i])) * static_cast<double>(element(*pool, token, i));
    for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
    sum *= p.softmax_scale;
    if (lane == 0) scores[key] = sum;
    highest = fmax(highest, sum);
  }
  highest = block_maximum(highest);
  double total = 0;
  for (int key = static_cast<int>(threadIdx.x); key < keys; key += kThreads)
    total += exp(scores[key] - highest);
  total = block_sum(total);
  for (int i = static_cast<int>(threadIdx.x); i < kDimV; i += kThreads) {
    double sum = 0;
    for (int key = 0; key < keys; ++key) {
      const kv::Pool* pool = nullptr;
      const kv::Token token = token_of(key, pool);
      sum += exp(scores[key] - highest) * static_cast<double>(element(*pool, token, i));
    }
    p.out[blockIdx.x * static_cast<std::int64_t>(kDimV) + i] = static_cast<float>(sum / total);
  }
  if (threadIdx.x == 0) p.lse[blockIdx.x] = static_cast<float>(highest + log(total));
}

}  // namespace

void fill_tokens(const kv::Pool& pool, std::uint64_t seed, cudaStream_t stream) {
  fill_tokens_kernel<<<132 * 16, 128, 0, stream>>>(pool, seed);
  check(cudaGetLastError(), "fill_tokens");
}

void reference_listed_rows(const ListedRows& problem, cudaStream_t stream) {
  if (problem.count == 0) return;
  reference_listed_rows_kernel<<<static_cast<unsigned>(problem.count), kThreads, 0, stream>>>(problem);
  check(cudaGetLastError(), "reference_listed_rows");
}

}  // namespace flash_mla::bench::gpu
