#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "device.h"
#include "reference.h"

namespace flash_mla::gpu_test {
namespace {

constexpr int kTile = 64, kStep = 16, kWidth = 576, kWidthV = 512;

/// What the kernels need of a call.
struct Call {
  const void *q, *k, *out;
  const int *table, *lengths;
  std::int64_t q_stride[3], k_stride[3], out_stride[3], table_stride;
  const float* lse;
  std::int64_t lse_stride[3];
  int batch, s_q, h_q, h_kv, group, page_size;
  bool bf16;
};

Call call_of(const DenseDecodeArgs& a) {
  Call c{};
  c.q = a.q.data;
  c.k = a.k_cache.data;
  c.out = a.out.data;
  c.table = a.block_table.ptr<int>();
  c.lengths = a.cache_seqlens.ptr<int>();
  for (int i = 0; i < 3; ++i) {
    c.q_stride[i] = a.q.stride(i);
    c.k_stride[i] = a.k_cache.stride(i);
    c.out_stride[i] = a.out.stride(i);
    c.lse_stride[i] = a.lse.stride(i);
  }
  c.table_stride = a.block_table.stride(0);
  c.lse = a.lse.ptr<float>();
  c.batch = static_cast<int>(a.q.size(0));
  c.s_q = static_cast<int>(a.q.size(1));
  c.h_q = static_cast<int>(a.q.size(2));
  c.h_kv = static_cast<int>(a.k_cache.size(2));
  c.group = c.h_q / c.h_kv;
  c.page_size = static_cast<int>(a.k_cache.size(1));
  c.bf16 = a.q.dtype == DType::kBFloat16;
  return c;
}

__device__ float load(const void* p, std::int64_t at, bool bf16) {
  return bf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(p)[at])
              : __half2float(static_cast<const __half*>(p)[at]);
}
__device__ void store(void* p, std::int64_t at, bool bf16, float x) {
  if (bf16) {
    static_cast<__nv_bfloat16*>(p)[at] = __float2bfloat16(x);
  } else {
    static_cast<__half*>(p)[at] = __float2half(x);
  }
}
__device__ std::int64_t key_at(const Call& c, int req, int kv_head, int token) {
  const std::int64_t page = c.table[req * c.table_stride + token / c.page_size];
  return page * c.k_stride[0] + token % c.page_size * c.k_stride[1] + kv_head * c.k_stride[2];
}
/// Row r of the s_q * group rows that share a latent head.
__device__ std::int64_t query_at(const Call& c, int req, int kv_head, int r) {
  return req * c.q_stride[0] + r / c.group * c.q_stride[1] +
         (kv_head * c.group + r % c.group) * c.q_stride[2];
}

// Finalizer of MurmurHash3: every input bit reaches every output bit.
__device__ std::uint32_t mix(std::uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<std::uint32_t>(x >> 32);
}
__device__ float normal(std::uint64_t seed, std::uint64_t i) {
  const std::uint64_t at = seed * 0x9E3779B97F4A7C15ull + 2 * i;
  const float u = (mix(at) + 1.0f) * 2.3283064e-10f, v = mix(at + 1) * 2.3283064e-10f;
  return sqrtf(-2.0f * __logf(u)) * cospif(2.0f * v);
}

__global__ void fill_queries(Call c, std::uint64_t seed) {
  const std::int64_t row = blockIdx.x;
  const int req = static_cast<int>(row / (c.s_q * c.h_q)), in_req = static_cast<int>(row % (c.s_q * c.h_q));
  const std::int64_t at =
      req * c.q_stride[0] + in_req / c.h_q * c.q_stride[1] + in_req % c.h_q * c.q_stride[2];
  for (int d = static_cast<int>(threadIdx.x); d < kWidth; d += static_cast<int>(blockDim.x)) {
    store(const_cast<void*>(c.q), at + d, c.bf16,
          fminf(fmaxf(normal(seed, static_cast<std::uint64_t>(row * kWidth + d)), -1.0f), 1.0f));
  }
}

__global__ void fill_keys(Call c, std::uint64_t seed) {
  const int req = static_cast<int>(blockIdx.y);
  for (int t = static_cast<int>(blockIdx.x); t < c.lengths[req]; t += static_cast<int>(gridDim.x)) {
    for (int h = 0; h < c.h_kv; ++h) {
      const std::int64_t at = key_at(c, req, h, t);
      for (int d = static_cast<int>(threadIdx.x); d < kWidth; d += static_cast<int>(blockDim.x)) {
        const float x = normal(seed, static_cast<std::uint64_t>(at + d)) / 10;
        store(const_cast<void*>(c.k), at + d, c.bf16, fminf(fmaxf(x, -1.0f), 1.0f));
      }
    }
  }
}

// scores[row][token], token < length, of 64 x 64 tiles. 256 threads, 4 x 4 results each.
__global__ void __launch_bounds__(256)
    score_kernel(Call c, float scale, bool causal, int max_length, float* scores) {
  const int req = static_cast<int>(blockIdx.z), rows = c.s_q * c.group;
  const int row_tiles = (rows + kTile - 1) / kTile;
  const int kv_head = static_cast<int>(blockIdx.y) / row_tiles,
            row0 = static_cast<int>(blockIdx.y) % row_tiles * kTile;
  const int token0 = static_cast<int>(blockIdx.x) * kTile, length = c.lengths[req];
  if (token0 >= length) return;
  __shared__ float a[kStep][kTile + 1], b[kStep][kTile + 1];
  const int tx = static_cast<int>(threadIdx.x) % 16, ty = static_cast<int>(threadIdx.x) / 16;
  float acc[4][4] = {};
  for (int d0 = 0; d0 < kWidth; d0 += kStep) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kStep; i += 256) {
      const int r = i / kStep, d = i % kStep;
      a[d][r] = row0 + r < rows ? load(c.q, query_at(c, req, kv_head, row0 + r) + d0 + d, c.bf16) : 0.0f;
      b[d][r] = token0 + r < length ? load(c.k, key_at(c, req, kv_head, token0 + r) + d0 + d, c.bf16) : 0.0f;
    }
    __syncthreads();
    for (int d = 0; d < kStep; ++d) {
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) acc[i][j] += a[d][ty + 16 * i] * b[d][tx + 16 * j];
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    const int r = row0 + ty + 16 * i;
    if (r >= rows) continue;
    const int limit = causal ? length - c.s_q + r / c.group + 1 : length;
    float* to = scores + ((static_cast<std::int64_t>(req) * c.h_kv + kv_head) * rows + r) * max_length;
    for (int j = 0; j < 4; ++j) {
      const int t = token0 + tx + 16 * j;
      if (t < length) to[t] = t < limit ? acc[i][j] * scale : -INFINITY;
    }
  }
}

template <class T, class Op>
__device__ T block_reduce(T x, Op op, T* shared) {
  shared[threadIdx.x] = x;
  __syncthreads();
  for (unsigned i = blockDim.x / 2; i > 0; i /= 2) {
    if (threadIdx.x < i) shared[threadIdx.x] = op(shared[threadIdx.x], shared[threadIdx.x + i]);
    __syncthreads();
  }
  x = shared[0];
  __syncthreads();
  return x;
}

// Scores become weights. One block per row.
__global__ void __launch_bounds__(256) softmax_kernel(Call c, int max_length, float* scores, float* lse) {
  __shared__ double shared[256];
  const std::int64_t row = blockIdx.x;
  const int rows = c.s_q * c.group, r = static_cast<int>(row % rows);
  const int kv_head = static_cast<int>(row / rows % c.h_kv), req = static_cast<int>(row / rows / c.h_kv);
  const int length = c.lengths[req];
  float* x = scores + row * max_length;
  double highest = -INFINITY, sum = 0;
  for (int t = static_cast<int>(threadIdx.x); t < length; t += 256) highest = fmax(highest, double{x[t]});
  highest = block_reduce(
      highest, [](double u, double v) { return fmax(u, v); }, shared);
  const bool none = highest == -INFINITY;
  for (int t = static_cast<int>(threadIdx.x); t < length; t += 256) {
    x[t] = none ? 0.0f : expf(static_cast<float>(x[t] - highest));
    sum += x[t];
  }
  sum = block_reduce(
      sum, [](double u, double v) { return u + v; }, shared);
  for (int t = static_cast<int>(threadIdx.x); t < length && !none; t += 256) {
    x[t] = static_cast<float>(x[t] / sum);
  }
  if (threadIdx.x == 0) {
    const int head = kv_head * c.group + r % c.group, token = r / c.group;
    lse[(static_cast<std::int64_t>(req) * c.h_q + head) * c.s_q + token] =
        none ? INFINITY : static_cast<float>(highest + log(sum));
  }
}

// out[row][column] of 64 x 64 tiles.
__global__ void __launch_bounds__(256) value_kernel(Call c, int max_length, const float* scores, float* out) {
  const int req = static_cast<int>(blockIdx.z), rows = c.s_q * c.group, length = c.lengths[req];
  const int row_tiles = (rows + kTile - 1) / kTile;
  const int kv_head = static_cast<int>(blockIdx.y) / row_tiles,
            row0 = static_cast<int>(blockIdx.y) % row_tiles * kTile;
  const int column0 = static_cast<int>(blockIdx.x) * kTile;
  __shared__ float a[kStep][kTile + 1], b[kStep][kTile + 1];
  const int tx = static_cast<int>(threadIdx.x) % 16, ty = static_cast<int>(threadIdx.x) / 16;
  const float* weights = scores + (static_cast<std::int64_t>(req) * c.h_kv + kv_head) * rows * max_length;
  float acc[4][4] = {};
  for (int t0 = 0; t0 < length; t0 += kStep) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kStep; i += 256) {
      const int r = i / kStep, t = i % kStep;
      a[t][r] = row0 + r < rows && t0 + t < length
                    ? weights[static_cast<std::int64_t>(row0 + r) * max_length + t0 + t]
                    : 0.0f;
      const int column = i % kTile, token = t0 + i / kTile;
      b[i / kTile][column] =
          token < length ? load(c.k, key_at(c, req, kv_head, token) + column0 + column, c.bf16) : 0.0f;
    }
    __syncthreads();
    for (int t = 0; t < kStep; ++t) {
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) acc[i][j] += a[t][ty + 16 * i] * b[t][tx + 16 * j];
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    const int r = row0 + ty + 16 * i;
    if (r >= rows) continue;
    const int head = kv_head * c.group + r % c.group, token = r / c.group;
    float* to = out + ((static_cast<std::int64_t>(req) * c.s_q + token) * c.h_q + head) * kWidthV + column0;
    for (int j = 0; j < 4; ++j) to[tx + 16 * j] = acc[i][j];
  }
}

struct Sums {
  unsigned long long wrong_out, wrong_lse;
  double dot, norm;
};

__global__ void __launch_bounds__(256)
    compare_kernel(Call c, const float* out, const float* lse, Sums* sums) {
  __shared__ double shared[256];
  const std::int64_t row = blockIdx.x;
  const int in_req = static_cast<int>(row % (c.s_q * c.h_q)), req = static_cast<int>(row / (c.s_q * c.h_q));
  const int token = in_req / c.h_q, head = in_req % c.h_q;
  const std::int64_t at = req * c.out_stride[0] + token * c.out_stride[1] + head * c.out_stride[2];
  double dot = 0, norm = 0, wrong = 0;
  for (int d = static_cast<int>(threadIdx.x); d < kWidthV; d += 256) {
    const double x = load(c.out, at + d, c.bf16), y = out[row * kWidthV + d], error = fabs(x - y);
    wrong += !(error <= 8e-4 || error <= 2.01 / 128 * fabs(y));
    dot += x * y;
    norm += x * x + y * y;
  }
  const auto add = [](double u, double v) { return u + v; };
  dot = block_reduce(dot, add, shared);
  norm = block_reduce(norm, add, shared);
  wrong = block_reduce(wrong, add, shared);
  if (threadIdx.x != 0) return;
  atomicAdd(&sums->dot, dot);
  atomicAdd(&sums->norm, norm);
  if (wrong > 0) atomicAdd(&sums->wrong_out, static_cast<unsigned long long>(wrong));
  if (c.lse == nullptr) return;
  const double x = c.lse[req * c.lse_stride[0] + head * c.lse_stride[1] + token * c.lse_stride[2]];
  const double y = lse[(static_cast<std::int64_t>(req) * c.h_q + head) * c.s_q + token], error = fabs(x - y);
  if (isinf(y) ? x != y : !(error <= 1e-6 || error <= 8.01 / 65536 * fabs(y)))
    atomicAdd(&sums->wrong_lse, 1ull);
}

dim3 tiles(const Call& c, int x) {
  const int row_tiles = (c.s_q * c.group + kTile - 1) / kTile;
  return {static_cast<unsigned>(x), static_cast<unsigned>(c.h_kv * row_tiles),
          static_cast<unsigned>(c.batch)};
}

}  // namespace

void fill_random(const DenseDecodeArgs& a, int max_length, std::uint64_t seed) {
  const Call c = call_of(a);
  const std::size_t pool = static_cast<std::size_t>(a.k_cache.size(0) * a.k_cache.stride(0)) * 2;
  check(cudaMemsetAsync(a.k_cache.data, 0xFF, pool, nullptr), "cudaMemsetAsync");
  if (c.batch == 0) return;
  fill_queries<<<static_cast<unsigned>(c.batch * c.s_q * c.h_q), 192>>>(c, 2 * seed);
  if (max_length > 0) {
    const dim3 grid(static_cast<unsigned>(std::min(max_length, 4096)), static_cast<unsigned>(c.batch));
    fill_keys<<<grid, 192>>>(c, 2 * seed + 1);
  }
  check(cudaGetLastError(), "fill_random");
}

void attention(const DenseDecodeArgs& a, float softmax_scale, bool causal, int max_length, float* scores,
               float* out, float* lse) {
  const Call c = call_of(a);
  if (c.batch == 0) return;
  if (max_length > 0) {
    score_kernel<<<tiles(c, (max_length + kTile - 1) / kTile), 256>>>(c, softmax_scale, causal, max_length,
                                                                      scores);
  }
  softmax_kernel<<<static_cast<unsigned>(c.batch * c.s_q * c.h_q), 256>>>(c, max_length, scores, lse);
  value_kernel<<<tiles(c, kWidthV / kTile), 256>>>(c, max_length, scores, out);
  check(cudaGetLastError(), "attention");
}

Difference compare(const DenseDecodeArgs& a, const float* out, const float* lse) {
  const Call c = call_of(a);
  DeviceMemory memory(sizeof(Sums));
  check(cudaMemsetAsync(memory.as<void>(), 0, sizeof(Sums), nullptr), "cudaMemsetAsync");
  compare_kernel<<<static_cast<unsigned>(c.batch * c.s_q * c.h_q), 256>>>(c, out, lse, memory.as<Sums>());
  check(cudaGetLastError(), "compare");
  const Sums sums = memory.download<Sums>()[0];
  return {sums.wrong_out, sums.wrong_lse, sums.norm > 0 ? 1 - 2 * sums.dot / sums.norm : 0.0};
}

}  // namespace flash_mla::gpu_test
