// append_index_keys and quantise_index_queries on Hopper: rotation and quantisation of a row between one read and one
// write.
//
// Tile:      a row of 64 or 128 elements (a key, or a head of a query) for each warp, 4 warps a block.
// Threads:   lane l has the row's elements (dim / 32) l and its 1 or 3 neighbours.
// Memory:    none that is shared. The first stages of the Hadamard transform lie within a lane, the other five are
//            shuffles; each sum is of the two numbers that the CPU adds, so that bits are the same.
// Registers: some 30.

#include <cstdint>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/element.cuh"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/attention/indexer/sm90/indexer.h"
#include "kernels/cache/sm90/elements.cuh"
#include "kernels/quant/recipe.h"

namespace flash_mla::sm90 {
namespace {

using cache::Integers;
using cache::kWarp;
using cache::kWarps;

constexpr unsigned kAll = ~0u;

/// The Hadamard transform of a warp's row in its natural order.
template <int kElements>
__device__ __forceinline__ void hadamard(float (&x)[kElements], int lane) {
#pragma unroll
  for (int half = 1; half < kElements; half *= 2) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if ((i & half) != 0) continue;
      const float a = x[i], b = x[i + half];
      x[i] = __fadd_rn(a, b);
      x[i + half] = __fsub_rn(a, b);
    }
  }
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float other = __shfl_xor_sync(kAll, x[i], mask);
      x[i] = upper ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
    }
  }
}

/// A lane's share of a row: read, and rotated where that is wanted, rounded to T.
template <class T, int kElements>
__device__ __forceinline__ void read_row(const T* row, bool rotate, float (&x)[kElements], int lane) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) x[i] = as_float(row[lane * kElements + i]);
  if (!rotate) return;
  hadamard(x, lane);
  constexpr float kFactor = kElements == 4 ? 0x1.6a09e6p-4f : 0.125f;  // (32 kElements) ** -0.5
#pragma unroll
  for (int i = 0; i < kElements; ++i) x[i] = as_float(from_float<T>(__fmul_rn(x[i], kFactor)));
}

/// Quantises a warp's row; returns its scale, in every lane. A NaN is passed over by the scale.
template <int kElements>
__device__ __forceinline__ float store_row(const float (&x)[kElements], Fp8Recipe recipe, std::byte* to,
                                           int lane) {
  float highest = 0.0f;
#pragma unroll
  for (int i = 0; i < kElements; ++i) highest = fmaxf(highest, fabsf(x[i]));
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(kAll, highest, mask));
  }
  const float scale = quant::tile_scale(recipe, highest);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    to[lane * kElements + i] = std::byte{quant::quantise_value(recipe, x[i], scale).bits};
  }
  return scale;
}

struct KeyParams {
  const void* k;
  std::int64_t k_stride;  // elements
  std::uint32_t n;
  Integers slots;
  std::byte* cache;
  std::int64_t page_stride, page_size;  // bytes; tokens
  Fp8Recipe recipe;
  bool rotate;
};

template <class T, int kElements>
__global__ void __launch_bounds__(kWarps* kWarp) key_kernel(const __grid_constant__ KeyParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const std::uint32_t t = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (t >= p.n) return;
  const std::int64_t slot = p.slots.value(p.slots.load(t));
  if (slot < 0) return;
  constexpr std::int64_t kDim = kElements * kWarp;
  float x[kElements];
  read_row(static_cast<const T*>(p.k) + t * p.k_stride, p.rotate, x, lane);
  std::byte* const page = p.cache + slot / p.page_size * p.page_stride;
  const std::int64_t offset = slot % p.page_size;
  const float scale = store_row(x, p.recipe, page + offset * kDim, lane);
  // Pages begin at multiples of 4 bytes, and so do the scales behind kDim bytes a token.
  if (lane == 0) reinterpret_cast<float*>(page + p.page_size * kDim)[offset] = scale;
}

struct QueryParams {
  const void* q;
  std::int64_t q_stride;  // elements, from token to token
  std::int64_t rows;      // tokens * heads
  int heads;
  const float* weights;
  std::int64_t weights_stride;
  float factor;
  std::byte* values;
  std::int64_t values_stride;
  float* scaled;
  std::int64_t scaled_stride;
  Fp8Recipe recipe;
  bool rotate;
};

template <class T, int kElements>
__global__ void __launch_bounds__(kWarps* kWarp) query_kernel(const __grid_constant__ QueryParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const std::int64_t token = row / p.heads, head = row % p.heads;
  constexpr std::int64_t kDim = kElements * kWarp;
  float x[kElements];
  read_row(static_cast<const T*>(p.q) + token * p.q_stride + head * kDim, p.rotate, x, lane);
  const float scale = store_row(x, p.recipe, p.values + token * p.values_stride + head * kDim, lane);
  if (lane == 0) {
    p.scaled[token * p.scaled_stride + head] =
        __fmul_rn(__fmul_rn(p.weights[token * p.weights_stride + head], p.factor), scale);
  }
}

template <class Params>
using Kernel = void (*)(Params);

/// The kernel of a dtype and a width.
template <class T>
Kernel<KeyParams> key_kernel_of(std::int64_t dim) {
  return dim == 128 ? key_kernel<T, 4> : key_kernel<T, 2>;
}
template <class T>
Kernel<QueryParams> query_kernel_of(std::int64_t dim) {
  return dim == 128 ? query_kernel<T, 4> : query_kernel<T, 2>;
}

template <class Params>
void run(Kernel<Params> kernel, const Params& params, std::int64_t rows, const char* name, void* stream) {
  if (rows == 0) return;
  const std::int64_t blocks = (rows + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) {
    throw Unsupported(std::string(name) + " is given " + std::to_string(rows) +
                      " rows; the sm90 backend takes up to 8589934588");
  }
  check(launch(LaunchConfig(dim3(static_cast<unsigned>(blocks)), kWarps * kWarp, 0,
                            static_cast<cudaStream_t>(stream))
                   .programmatic(),
               kernel, params),
        name);
}

}  // namespace

void append_index_keys(const IndexKeyAppendArgs& args, void* stream) {
  require_device(args.k.device.index);
  const DeviceGuard guard(args.k.device.index);
  const std::int64_t dim = args.k.size(1);
  KeyParams p{};
  p.k = args.k.data;
  p.k_stride = args.k.stride(0);
  p.n = cache::count_of(args.k, "k");
  p.slots = cache::integers(args.slot_mapping);
  p.cache = args.cache.ptr<std::byte>();
  p.page_size = args.cache.size(1);
  p.page_stride = args.cache.size(0) > 1 ? args.cache.stride(0) : 0;
  p.recipe = args.recipe;
  p.rotate = args.rotate;
  const Kernel<KeyParams> kernel = args.k.dtype == DType::kFloat32   ? key_kernel_of<float>(dim)
                                   : args.k.dtype == DType::kFloat16 ? key_kernel_of<Fp16>(dim)
                                                                     : key_kernel_of<Bf16>(dim);
  run(kernel, p, args.k.size(0), "append_index_keys", stream);
}

void quantise_index_queries(const IndexQueryArgs& args, void* stream) {
  require_device(args.q.device.index);
  const DeviceGuard guard(args.q.device.index);
  const std::int64_t dim = args.q.size(2);
  QueryParams p{};
  p.q = args.q.data;
  p.q_stride = args.q.stride(0);
  p.heads = static_cast<int>(args.q.size(1));
  p.rows = args.q.size(0) * args.q.size(1);
  p.weights = args.weights.ptr<const float>();
  p.weights_stride = args.weights.stride(0);
  p.factor = args.factor;
  p.values = args.values.ptr<std::byte>();
  p.values_stride = args.values.stride(0);
  p.scaled = args.scaled_weights.ptr<float>();
  p.scaled_stride = args.scaled_weights.stride(0);
  p.recipe = args.recipe;
  p.rotate = args.rotate;
  const Kernel<QueryParams> kernel = args.q.dtype == DType::kFloat32   ? query_kernel_of<float>(dim)
                                     : args.q.dtype == DType::kFloat16 ? query_kernel_of<Fp16>(dim)
                                                                       : query_kernel_of<Bf16>(dim);
  run(kernel, p, p.rows, "quantise_index_queries", stream);
}

}  // namespace flash_mla::sm90
