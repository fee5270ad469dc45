#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "base/cuda/check.h"
#include "bench/gpu/kernels.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr int kDim = 576, kDimV = 512;
constexpr int kReferenceThreads = 512;

// MurmurHash3's finaliser: a counter becomes 32 random bits.
__device__ std::uint32_t mix(std::uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  x ^= x >> 33;
  return static_cast<std::uint32_t>(x);
}

template <class T>
__device__ T from_float(float x);
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __half from_float<__half>(float x) {
  return __float2half(x);
}
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(float x) { return x; }

__device__ std::int64_t first_index() { return std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ std::int64_t index_step() { return std::int64_t{gridDim.x} * blockDim.x; }

template <class T>
__global__ void fill_normal_kernel(T* data, std::int64_t count, std::uint64_t seed) {
  // Box and Muller's transform, the cosine half.
  for (std::int64_t i = first_index(); i < count; i += index_step()) {
    const std::uint64_t at = seed * 0x9E3779B97F4A7C15ull + 2 * static_cast<std::uint64_t>(i);
    const float u = (static_cast<float>(mix(at)) + 1.0f) * 0x1p-32f,
                v = static_cast<float>(mix(at + 1)) * 0x1p-32f;
    const float x = 0.5f * sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
    data[i] = from_float<T>(fminf(fmaxf(x, -1.0f), 1.0f));
  }
}

__global__ void read_all_kernel(const uint4* data, std::int64_t count, std::uint32_t* sink) {
  constexpr int kInFlight = 4;
  std::uint32_t x = 0;
  std::int64_t i = first_index();
  const std::int64_t step = index_step();
  for (; i + (kInFlight - 1) * step < count; i += kInFlight * step) {
    uint4 v[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) v[j] = data[i + j * step];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += step) x ^= data[i].x ^ data[i].y ^ data[i].z ^ data[i].w;
  if (x == 0x12345678u) *sink = x;
}

__global__ void copy_all_kernel(const uint4* from, uint4* to, std::int64_t count) {
  constexpr int kInFlight = 4;
  const std::int64_t step = blockDim.x;
  std::int64_t i = std::int64_t{blockIdx.x} * kInFlight * step + threadIdx.x;
  uint4 v[kInFlight];
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    if (i + j * step < count) v[j] = from[i + j * step];
  }
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    if (i + j * step < count) to[i + j * step] = v[j];
  }
}

__global__ void spin_kernel(long long clocks) {
  const long long start = clock64();
  while (clock64() - start < clocks) {
  }
}

template <class T>
__global__ void count_nan_kernel(const T* data, std::int64_t count, unsigned long long* counter) {
  unsigned long long found = 0;
  for (std::int64_t i = first_index(); i < count; i += index_step())
    found += isnan(to_float(data[i])) ? 1 : 0;
  if (found > 0) atomicAdd(counter, found);
}

// One value of all threads of a block.
template <class Combine>
__device__ float over_block(float x, float* shared, Combine combine) {
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int i = kReferenceThreads / 2; i > 0; i /= 2) {
    if (static_cast<int>(threadIdx.x) < i)
      shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + i]);
    __syncthreads();
  }
  return shared[0];
}

// A block per row: scores by a warp per key, the softmax, then the sum over values by a thread per column.
template <class T>
__global__ void __launch_bounds__(kReferenceThreads)
    reference_kernel(const ReferenceProblem p, const OutputRow* rows, float* all_scores,
                     std::int64_t score_stride, float* out, float* lse) {
  const OutputRow row = rows[blockIdx.x];
  const int length = p.cache_seqlens[row.request];
  const int visible = p.causal && p.s_q > 1 ? max(length - p.s_q + row.query + 1, 0) : length;
  const std::int32_t* pages = p.block_table + std::int64_t{row.request} * p.max_blocks;
  const int kv_head = row.head / (p.h_q / p.h_kv);
  float* scores = all_scores + blockIdx.x * score_stride;
  const auto key = [&](int j) {
    const std::int64_t slot = std::int64_t{pages[j / p.page_size]} * p.page_size + j % p.page_size;
    return static_cast<const T*>(p.k_cache) + (slot * p.h_kv + kv_head) * kDim;
  };
  __shared__ float query[kDim];
  __shared__ float shared[kReferenceThreads];
  const std::int64_t q_row = (std::int64_t{row.request} * p.s_q + row.query) * p.h_q + row.head;
  for (int d = static_cast<int>(threadIdx.x); d < kDim; d += kReferenceThreads)
    query[d] = to_float(static_cast<const T*>(p.q)[q_row * kDim + d]);
  __syncthreads();

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float highest = -INFINITY;
  for (int j = warp; j < visible; j += kReferenceThreads / 32) {
    const T* k = key(j);
    float x = 0;
    for (int d = lane; d < kDim; d += 32) x += query[d] * to_float(k[d]);
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, i);
    x *= p.softmax_scale;
    if (lane == 0) scores[j] = x;
    highest = fmaxf(highest, x);
  }
  highest = over_block(highest, shared, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int j = static_cast<int>(threadIdx.x); j < visible; j += kReferenceThreads) {
    scores[j] = expf(scores[j] - highest);
    sum += scores[j];
  }
  sum = over_block(sum, shared, [](float a, float b) { return a + b; });

  static_assert(kReferenceThreads == kDimV);
  float x = 0;
  for (int j = 0; j < visible; ++j) x += scores[j] * to_float(key(j)[threadIdx.x]);
  out[std::int64_t{blockIdx.x} * kDimV + threadIdx.x] = visible > 0 ? x / sum : 0.0f;
  if (threadIdx.x == 0) lse[blockIdx.x] = visible > 0 ? highest + logf(sum) : INFINITY;
}

constexpr int kBlocks = 132 * 8, kThreads = 256;

}  // namespace

void fill_normal(void* data, DType dtype, std::int64_t count, std::uint64_t seed, cudaStream_t stream) {
  if (dtype == DType::kBFloat16) {
    fill_normal_kernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<__nv_bfloat16*>(data), count, seed);
  } else {
    fill_normal_kernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<__half*>(data), count, seed);
  }
  check(cudaGetLastError(), "fill_normal");
}

void read_all(const void* data, std::size_t bytes, std::uint32_t* sink, cudaStream_t stream) {
  // The quickest launch of those tried on an H200: 4.57 TB/s; eight blocks of 256 threads per multiprocessor
  // reach 4.54.
  read_all_kernel<<<132 * 64, 1024, 0, stream>>>(static_cast<const uint4*>(data),
                                                 static_cast<std::int64_t>(bytes / sizeof(uint4)), sink);
  check(cudaGetLastError(), "read_all");
}

void copy_all(const void* from, void* to, std::size_t bytes, cudaStream_t stream) {
  constexpr unsigned kThreads = 256, kInFlight = 4;
  const auto count = static_cast<std::int64_t>(bytes / sizeof(uint4));
  const std::int64_t blocks = (count + kThreads * kInFlight - 1) / (kThreads * kInFlight);
  copy_all_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(static_cast<const uint4*>(from),
                                                                          static_cast<uint4*>(to), count);
  check(cudaGetLastError(), "copy_all");
}

void spin(long long clocks, cudaStream_t stream) {
  spin_kernel<<<1, 1, 0, stream>>>(clocks);
  check(cudaGetLastError(), "spin");
}

void count_nan(const void* data, DType dtype, std::int64_t count, unsigned long long* counter,
               cudaStream_t stream) {
  if (dtype == DType::kBFloat16) {
    count_nan_kernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<const __nv_bfloat16*>(data), count,
                                                       counter);
  } else if (dtype == DType::kFloat16) {
    count_nan_kernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<const __half*>(data), count, counter);
  } else {
    count_nan_kernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<const float*>(data), count, counter);
  }
  check(cudaGetLastError(), "count_nan");
}

void reference_rows(const ReferenceProblem& problem, const OutputRow* rows, int count, float* scores,
                    std::int64_t score_stride, float* out, float* lse, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(count);
  if (problem.dtype == DType::kBFloat16) {
    reference_kernel<__nv_bfloat16>
        <<<blocks, kReferenceThreads, 0, stream>>>(problem, rows, scores, score_stride, out, lse);
  } else {
    reference_kernel<__half>
        <<<blocks, kReferenceThreads, 0, stream>>>(problem, rows, scores, score_stride, out, lse);
  }
  check(cudaGetLastError(), "reference_rows");
}

}  // namespace flash_mla::bench::gpu
