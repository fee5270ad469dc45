// What is done to single rows of bfloat16: embedding, norm, gate, rotation and append, gather, bias, choice.
//
// Tile:      one row, or part of a row, for each block, walked kVec elements at a time: 8 (16 bytes) where
//            lengths, strides and addresses allow it, else 1.
// Threads:   up to 256, all alike (512 for the likeliest column).
// Memory:    a sum or a maximum of each warp.
// Registers: up to 32 a thread: what limits these kernels is memory.

#include <algorithm>
#include <cmath>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/page_size.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/rows/sm90/row_math.cuh"
#include "kernels/rows/sm90/rows.h"
#include "kernels/rows/sm90/silu.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 256;

__global__ void embed_kernel(const bf16* table, const std::int32_t* ids, const std::int32_t* tokens,
                             const std::int32_t* positions, RotationTable rotations, bf16* out,
                             std::int64_t stride, int columns) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t t = blockIdx.x;
  std::int32_t id = ids[t];
  if (id < 0) id = max(tokens[-1 - id], 0);
  const bf16* from = table + static_cast<std::int64_t>(id) * columns;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) out[t * stride + i] = from[i];
  for (int i = threadIdx.x; i < rotations.pairs; i += blockDim.x) {
    const float angle = static_cast<float>(positions[t]) * rotations.inv_freq[i];
    float sine, cosine;
    sincosf(angle, &sine, &cosine);
    rotations.cosines[t * rotations.pairs + i] = cosine * rotations.scale;
    rotations.sines[t * rotations.pairs + i] = sine * rotations.scale;
  }
}

template <int kVec>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const bf16* x, std::int64_t x_stride, const float* weight, float eps, bf16* out,
                    std::int64_t out_stride, int columns) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t t = blockIdx.x;
  norm_row<kVec>(x + t * x_stride, weight, eps, columns, out + t * out_stride);
}

template <int kVec>
__global__ void silu_mul_kernel(const bf16* gate_up, std::int64_t in_stride, bf16* out,
                                std::int64_t out_stride, int columns) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t t = blockIdx.y;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * kVec;
  if (i >= columns) return;
  Vector<kVec> gate = load<kVec>(gate_up + t * in_stride + i);
  const Vector<kVec> up = load<kVec>(gate_up + t * in_stride + columns + i);
  for (int j = 0; j < kVec; ++j) {
    const float g = __bfloat162float(gate.v[j]);
    gate.v[j] = __float2bfloat16(silu(g) * __bfloat162float(up.v[j]));
  }
  store<kVec>(out + t * out_stride + i, gate);
}

constexpr int kRopeHeads = 16;  // of a block

struct RopeParams {
  bf16* q;
  const bf16* kv;
  std::int64_t q_stride, kv_stride;
  const float* kv_norm;
  float eps;
  const std::int64_t* slots;
  const float* cosines;
  const float* sines;
  bf16* cache;
  int heads, nope, rope, rank;
};

/// Block (t, 0) appends token t's latent and key to the cache, the blocks (t, 1 ...) rotate its queries.
template <int kVec>
__global__ void __launch_bounds__(kThreads) rope_and_append_kernel(RopeParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t t = blockIdx.x;
  const int pairs = p.rope / 2;
  const float* cosines = p.cosines + t * pairs;
  const float* sines = p.sines + t * pairs;
  if (blockIdx.y == 0) {
    const std::int64_t slot = p.slots != nullptr ? p.slots[t] : t;
    if (slot < 0) return;
    const bf16* kv = p.kv + t * p.kv_stride;
    bf16* key = p.cache + slot * (p.rank + p.rope);
    norm_row<kVec>(kv, p.kv_norm, p.eps, p.rank, key);
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
      rotate(kv + p.rank + 2 * i, key + p.rank + 2 * i, cosines[i], sines[i]);
    }
    return;
  }
  const int first = static_cast<int>(blockIdx.y - 1) * kRopeHeads, count = min(kRopeHeads, p.heads - first);
  for (int i = threadIdx.x; i < count * pairs; i += blockDim.x) {
    const int head = first + i / pairs, pair = i % pairs;
    bf16* x = p.q + t * p.q_stride + head * (p.nope + p.rope) + p.nope + 2 * pair;
    rotate(x, x, cosines[pair], sines[pair]);
  }
}

__global__ void gather_kernel(const bf16* x, std::int64_t x_stride, const std::int32_t* rows, bf16* out,
                              std::int64_t out_stride, int columns) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t t = blockIdx.x;
  const bf16* from = x + rows[t] * x_stride;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) out[t * out_stride + i] = from[i];
}

__global__ void add_bias_kernel(const float* bias, bool replace, bf16* inout, std::int64_t stride,
                                int columns) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  bf16* row = inout + blockIdx.x * stride;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    row[i] = __float2bfloat16(bias[i] + (replace ? 0.0f : __bfloat162float(row[i])));
  }
}

// A logit and its column as one number: larger logits first, of equals the smaller column. A row that holds
// what no logit may be is marked by the largest number there is.
constexpr unsigned long long kBadRow = ~0ull;
constexpr int kLikeliestParts = 16;  // blocks of a row
constexpr int kLikeliestThreads = 512;

__device__ unsigned long long rank_of(float logit, unsigned column) {
  if (!(logit < INFINITY)) return kBadRow;
  const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 and +0 are equals
  const unsigned ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xFFFFFFFEu - column);
}

struct LikeliestScratch {
  unsigned long long best;
  unsigned arrived;
};

/// The last block of a row to arrive writes its result and leaves the scratch as it was found: zero.
__global__ void __launch_bounds__(kLikeliestThreads)
    likeliest_kernel(const float* x, int columns, LikeliestScratch* scratch, std::int32_t* tokens) {
  __shared__ unsigned long long bests[kLikeliestThreads / kWarp];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const float* row = x + static_cast<std::int64_t>(blockIdx.y) * columns;
  const int part = (columns + kLikeliestParts - 1) / kLikeliestParts;
  const int begin = static_cast<int>(blockIdx.x) * part, end = min(columns, begin + part);
  unsigned long long best = 0;
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kLikeliestThreads) {
    best = max(best, rank_of(row[i], static_cast<unsigned>(i)));
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) best = max(best, __shfl_xor_sync(~0u, best, offset));
  if (threadIdx.x % kWarp == 0) bests[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (const unsigned long long b : bests) best = max(best, b);
  LikeliestScratch& s = scratch[blockIdx.y];
  atomicMax(&s.best, best);
  __threadfence();
  if (atomicAdd(&s.arrived, 1) + 1 != kLikeliestParts) return;
  best = atomicExch(&s.best, 0);
  s.arrived = 0;
  const bool none = best == kBadRow || best >> 32 <= rank_of(-INFINITY, 0) >> 32;
  tokens[blockIdx.y] = none ? -1 : static_cast<std::int32_t>(0xFFFFFFFEu - static_cast<unsigned>(best));
}

/// One warp per key.
template <int kVec>
__global__ void __launch_bounds__(kThreads) gather_keys_kernel(GatherKeys p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t key = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (key >= p.num_keys) return;
  int low = 0, high = p.num_seqs;  // the sequence is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.starts[middle] <= key ? low : high) = middle;
  }
  const std::int64_t position = key - p.starts[low];
  const std::int64_t page = p.pages[p.tables[low] + position / kPageSize];
  const int width = p.rank + p.rope;
  const bf16* from =
      reinterpret_cast<const bf16*>(p.cache) + (page * kPageSize + position % kPageSize) * width;
  bf16* latent = reinterpret_cast<bf16*>(p.latents) + key * p.rank;
  bf16* rope = reinterpret_cast<bf16*>(p.k_rope) + key * p.rope;
  for (int i = static_cast<int>(threadIdx.x % kWarp) * kVec; i < width; i += kWarp * kVec) {
    store<kVec>(i < p.rank ? latent + i : rope + (i - p.rank), load<kVec>(from + i));
  }
}

/// SplitMix64's finaliser.
__device__ unsigned long long mix(unsigned long long x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/// Sum of four 16-bit uniforms, centred: variance 4/12, near enough to normal for weights.
template <class T>
__global__ void fill_random_kernel(T* out, std::int64_t count, unsigned long long seed, float deviation) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const unsigned long long bits =
        mix(mix(seed) + static_cast<unsigned long long>(i) * 0x9e3779b97f4a7c15ull);
    float sum = 0;
    for (int j = 0; j < 4; ++j) sum += static_cast<float>((bits >> (16 * j)) & 0xFFFF) + 0.5f;
    const float value = (sum / 65536.0f - 2.0f) * 1.7320508f * deviation;
    if constexpr (sizeof(T) == 2) {
      out[i] = __float2bfloat16(value);
    } else {
      out[i] = value;
    }
  }
}

bf16* elements(const Matrix& m) { return reinterpret_cast<bf16*>(m.data); }

bool wide(const void* data, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}
bool wide(const Matrix& m) { return wide(m.data, m.stride) && m.columns % 8 == 0; }

unsigned blocks(std::int64_t n, std::int64_t size) { return static_cast<unsigned>((n + size - 1) / size); }
unsigned grid_of(std::int64_t rows) { return static_cast<unsigned>(rows); }

/// Threads of a block that handles a row of that many vectors.
unsigned row_threads(std::int64_t vectors) {
  return std::clamp<unsigned>(blocks(vectors, kWarp) * kWarp, kWarp, kThreads);
}

}  // namespace

void embed(const std::byte* table, const std::int32_t* ids, const std::int32_t* tokens,
           const std::int32_t* positions, const RotationTable& rotations, Matrix out, cudaStream_t stream) {
  check(launch(LaunchConfig(grid_of(out.rows), kThreads, 0, stream).programmatic(), embed_kernel,
               reinterpret_cast<const bf16*>(table), ids, tokens, positions, rotations, elements(out),
               out.stride, static_cast<int>(out.columns)),
        "embed");
}

void rms_norm(Matrix x, const float* weight, float eps, Matrix out, cudaStream_t stream) {
  const int n = static_cast<int>(x.columns);
  if (wide(x) && wide(out)) {
    check(launch(LaunchConfig(grid_of(x.rows), row_threads(n / 8), 0, stream).programmatic(),
                 rms_norm_kernel<8>, elements(x), x.stride, weight, eps, elements(out), out.stride, n),
          "rms_norm");
  } else {
    check(launch(LaunchConfig(grid_of(x.rows), row_threads(n), 0, stream).programmatic(), rms_norm_kernel<1>,
                 elements(x), x.stride, weight, eps, elements(out), out.stride, n),
          "rms_norm");
  }
}

void silu_mul(Matrix gate_up, Matrix out, cudaStream_t stream) {
  const int n = static_cast<int>(out.columns);
  constexpr unsigned kBlock = 128;
  if (wide(gate_up) && wide(out)) {
    check(
        launch(LaunchConfig(dim3(blocks(n, kBlock * 8), grid_of(out.rows)), kBlock, 0, stream).programmatic(),
               silu_mul_kernel<8>, elements(gate_up), gate_up.stride, elements(out), out.stride, n),
        "silu_mul");
  } else {
    check(launch(LaunchConfig(dim3(blocks(n, kBlock), grid_of(out.rows)), kBlock, 0, stream).programmatic(),
                 silu_mul_kernel<1>, elements(gate_up), gate_up.stride, elements(out), out.stride, n),
          "silu_mul");
  }
}

void rope_and_append(const RopeAndAppend& a, cudaStream_t stream) {
  const RopeParams p{elements(a.q),
                     elements(a.kv),
                     a.q.stride,
                     a.kv.stride,
                     a.kv_norm,
                     a.eps,
                     a.slots,
                     a.rotations.cosines,
                     a.rotations.sines,
                     reinterpret_cast<bf16*>(a.cache),
                     a.heads,
                     a.nope,
                     a.rope,
                     a.rank};
  const dim3 grid(grid_of(a.q.rows), 1 + blocks(a.heads, kRopeHeads));
  const bool vectors = wide(a.kv.data, a.kv.stride) && a.rank % 8 == 0 && a.rope % 8 == 0;
  check(launch(LaunchConfig(grid, kThreads, 0, stream).programmatic(),
               vectors ? rope_and_append_kernel<8> : rope_and_append_kernel<1>, p),
        "rope_and_append");
}

void gather(Matrix x, const std::int32_t* rows, Matrix out, cudaStream_t stream) {
  check(launch(LaunchConfig(grid_of(out.rows), kThreads, 0, stream).programmatic(), gather_kernel,
               elements(x), x.stride, rows, elements(out), out.stride, static_cast<int>(x.columns)),
        "gather");
}

void add_bias(const float* bias, bool replace, Matrix inout, cudaStream_t stream) {
  check(launch(LaunchConfig(grid_of(inout.rows), kThreads, 0, stream).programmatic(), add_bias_kernel, bias,
               replace, elements(inout), inout.stride, static_cast<int>(inout.columns)),
        "add_bias");
}

std::size_t likeliest_scratch_bytes(std::int64_t rows) {
  return static_cast<std::size_t>(rows) * sizeof(LikeliestScratch);
}

void likeliest(Matrix x, std::int32_t* tokens, std::byte* scratch, cudaStream_t stream) {
  check(launch(
            LaunchConfig(dim3(kLikeliestParts, grid_of(x.rows)), kLikeliestThreads, 0, stream).programmatic(),
            likeliest_kernel, reinterpret_cast<const float*>(x.data), static_cast<int>(x.columns),
            reinterpret_cast<LikeliestScratch*>(scratch), tokens),
        "likeliest");
}

void gather_keys(const GatherKeys& a, cudaStream_t stream) {
  const bool vectors = a.rank % 8 == 0 && a.rope % 8 == 0;
  check(launch(LaunchConfig(blocks(a.num_keys, kThreads / kWarp), kThreads, 0, stream).programmatic(),
               vectors ? gather_keys_kernel<8> : gather_keys_kernel<1>, a),
        "gather_keys");
}

void fill_random(std::byte* out, DType dtype, std::int64_t count, std::uint64_t seed, float deviation,
                 cudaStream_t stream) {
  const unsigned grid = std::min(blocks(count, kThreads), 4096u);
  if (dtype == DType::kBFloat16) {
    fill_random_kernel<<<grid, kThreads, 0, stream>>>(reinterpret_cast<bf16*>(out), count, seed, deviation);
  } else {
    fill_random_kernel<<<grid, kThreads, 0, stream>>>(reinterpret_cast<float*>(out), count, seed, deviation);
  }
  check(cudaGetLastError(), "fill_random");
}

}  // namespace flash_mla::sm90
