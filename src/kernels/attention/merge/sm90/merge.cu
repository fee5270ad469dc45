// merge_states on Hopper: two inputs read once, one output written once.
//
// Tile:      a row (the d elements of a query and head) for each warp; up to 8 warps a block, heads next to
//            each other.
// Threads:   32 lanes side by side in a row, 16 bytes each, twice, so that a row of
//            512 halves is under way as a whole before its log-sum-exps have come. An element each where
//            a row or its length is not a multiple of 16 bytes.
// Memory:    none that is shared.
// Registers: 8 to 16 for each input; at most 64, so that 32 rows are under way on a multiprocessor.

#include <algorithm>
#include <cstdint>
#include <numbers>
#include <string>
#include <type_traits>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/element.cuh"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/attention/merge/sm90/merge.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 8;
constexpr unsigned kMaxGrid = 65535;

/// A tensor's data and its strides by request, query token and head.
template <class T>
struct Rows {
  T* data;
  std::int64_t b, s, h;
  __device__ T* at(unsigned request, unsigned query, unsigned head) const {
    return data + request * b + query * s + head * h;
  }
};

template <class T>
struct MergeParams {
  Rows<const T> out_a, out_b;
  Rows<const float> lse_a, lse_b;
  Rows<T> out;
  Rows<float> lse;
  Rows<const std::uint8_t> mask;  ///< of queries; may be null
  unsigned batch, s_q, h_q, d;
  float to_base2, from_base2;
};

struct Weights {
  float a, b, lse;
};

/// As cpu/merge.cpp has it, whose comments say why.
__device__ Weights weights_of(float lse_a, float lse_b, float to_base2, float from_base2) {
  const float infinity = __int_as_float(0x7F800000);
  const float x = lse_a == infinity ? -infinity : lse_a, y = lse_b == infinity ? -infinity : lse_b;
  if (x == -infinity && y == -infinity) return {0.0f, 0.0f, infinity};
  const float highest = x < y ? y : x;  // not fmaxf, which drops a NaN
  const float power_a = exp2f((x - highest) * to_base2), power_b = exp2f((y - highest) * to_base2);
  const float sum = power_a + power_b, factor = 1.0f / sum;
  return {power_a * factor, power_b * factor, highest + log2f(sum) * from_base2};
}

/// A word of T: one float, or two halves.
template <class T>
__device__ std::uint32_t merged_word(std::uint32_t a, std::uint32_t b, const Weights& w) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(fmaf(__uint_as_float(b), w.b, __uint_as_float(a) * w.a));
  } else {
    float a0, a1, b0, b1;
    unpack<T>(a, a0, a1);
    unpack<T>(b, b0, b1);
    return pack<T>(fmaf(b0, w.b, a0 * w.a), fmaf(b1, w.b, a1 * w.a));
  }
}

/// kUnroll times 16 bytes of a row, a warp's width apart.
template <class T, int kUnroll>
struct Piece {
  static constexpr int kVec = 16 / static_cast<int>(sizeof(T)), kStep = kWarp * kVec;

  __device__ void load(const T* row, unsigned begin, unsigned d) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (begin + u * kStep < d) v[u] = *reinterpret_cast<const uint4*>(row + begin + u * kStep);
    }
  }
  __device__ void store_merged(const Piece& other, const Weights& w, T* row, unsigned begin,
                               unsigned d) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (begin + u * kStep >= d) continue;
      const uint4 a = v[u], b = other.v[u];
      // As four stores of a word without the assembly.
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(row + begin + u * kStep),
                   "r"(merged_word<T>(a.x, b.x, w)), "r"(merged_word<T>(a.y, b.y, w)),
                   "r"(merged_word<T>(a.z, b.z, w)), "r"(merged_word<T>(a.w, b.w, w))
                   : "memory");
    }
  }
  /// Of an empty state, whose weight is 0 and which may hold NaN.
  __device__ void clear() {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = make_uint4(0, 0, 0, 0);
  }
  uint4 v[kUnroll];
};

/// A row whose parts begin at multiples of 16 bytes.
template <class T>
__device__ Weights merge_wide(const MergeParams<T>& p, const T* row_a, const T* row_b, T* out, float lse_a,
                              float lse_b) {
  constexpr int kUnroll = 2;
  using Row = Piece<T, kUnroll>;
  Weights w{};
  for (unsigned first = 0; first < p.d; first += kUnroll * Row::kStep) {
    const unsigned begin = first + threadIdx.x % kWarp * Row::kVec;
    Row a, b;
    a.load(row_a, begin, p.d);
    b.load(row_b, begin, p.d);
    if (first == 0) w = weights_of(lse_a, lse_b, p.to_base2, p.from_base2);
    if (w.a == 0.0f) a.clear();
    if (w.b == 0.0f) b.clear();
    a.store_merged(b, w, out, begin, p.d);
  }
  return w;
}

template <class T, bool kWide>
__device__ void merge_row(const MergeParams<T>& p, unsigned request, unsigned query, unsigned head) {
  const unsigned lane = threadIdx.x % kWarp;
  const T* row_a = p.out_a.at(request, query, head);
  const T* row_b = p.out_b.at(request, query, head);
  T* out = p.out.at(request, query, head);
  const float lse_a = *p.lse_a.at(request, query, head), lse_b = *p.lse_b.at(request, query, head);
  Weights w;
  if constexpr (kWide) {
    w = merge_wide(p, row_a, row_b, out, lse_a, lse_b);
  } else {
    w = weights_of(lse_a, lse_b, p.to_base2, p.from_base2);
    for (unsigned at = lane; at < p.d; at += kWarp) {
      const float a = w.a == 0.0f ? 0.0f : as_float(row_a[at]), b = w.b == 0.0f ? 0.0f : as_float(row_b[at]);
      out[at] = from_float<T>(fmaf(b, w.b, a * w.a));
    }
  }
  __syncwarp();  // lse may be one of the inputs, which every lane has read by now
  if (lane == 0) *p.lse.at(request, query, head) = w.lse;
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 4)
    merge_kernel(const __grid_constant__ MergeParams<T> p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const unsigned head = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (head >= p.h_q) return;
  for (unsigned request = blockIdx.z; request < p.batch; request += gridDim.z) {
    for (unsigned query = blockIdx.y; query < p.s_q; query += gridDim.y) {
      if (p.mask.data != nullptr && *p.mask.at(request, query, 0) == 0) continue;
      merge_row<T, kWide>(p, request, query, head);
    }
  }
}

template <class T>
Rows<T> out_rows(const TensorView& t) {
  return {t.ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}
template <class T>
Rows<T> lse_rows(const TensorView& t) {
  return {t.ptr<T>(), t.stride(0), t.stride(2), t.stride(1)};
}

/// Whether every row of t begins at a multiple of 16 bytes.
bool rows_are_aligned(const TensorView& t) {
  const auto element = static_cast<std::int64_t>(dtype_size(t.dtype));
  std::int64_t all =
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.data)) | t.size(3) * element;
  for (int d = 0; d < 3; ++d) {
    if (t.size(d) > 1) all |= t.stride(d) * element;
  }
  return all % 16 == 0;
}

template <class T>
void launch_merge(const MergeParams<T>& p, bool wide, cudaStream_t stream) {
  const auto kernel = wide ? merge_kernel<T, true> : merge_kernel<T, false>;
  const unsigned warps = std::min<unsigned>(p.h_q, kMaxWarps);
  const dim3 grid((p.h_q + warps - 1) / warps, std::min(p.s_q, kMaxGrid), std::min(p.batch, kMaxGrid));
  check(launch(LaunchConfig(grid, warps * kWarp, 0, stream).programmatic(), kernel, p), "merge_kernel");
}

}  // namespace

void merge_states(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b,
                  const TensorView& lse_b, const TensorView& out, const TensorView& lse,
                  const TensorView& mask, LseBase base, void* stream) {
  require_device(out.device.index);
  const DeviceGuard guard(out.device.index);
  for (int dim = 0; dim < 4; ++dim) {
    if (out.size(dim) <= INT32_MAX) continue;
    throw Unsupported("out.shape[" + std::to_string(dim) + "] is " + std::to_string(out.size(dim)) +
                      "; merge_states on sm90 takes up to 2147483647");
  }
  const bool wide = rows_are_aligned(out_a) && rows_are_aligned(out_b) && rows_are_aligned(out);
  const auto merge = [&]<class T>(T) {
    MergeParams<T> p{};
    p.out_a = out_rows<const T>(out_a);
    p.out_b = out_rows<const T>(out_b);
    p.out = out_rows<T>(out);
    p.lse_a = lse_rows<const float>(lse_a);
    p.lse_b = lse_rows<const float>(lse_b);
    p.lse = lse_rows<float>(lse);
    if (mask.defined()) p.mask = {mask.ptr<const std::uint8_t>(), mask.stride(0), mask.stride(1), 0};
    p.batch = static_cast<unsigned>(out.size(0));
    p.s_q = static_cast<unsigned>(out.size(1));
    p.h_q = static_cast<unsigned>(out.size(2));
    p.d = static_cast<unsigned>(out.size(3));
    p.to_base2 = base == LseBase::kE ? std::numbers::log2e_v<float> : 1.0f;
    p.from_base2 = base == LseBase::kE ? std::numbers::ln2_v<float> : 1.0f;
    launch_merge(p, wide, static_cast<cudaStream_t>(stream));
  };
  if (out.dtype == DType::kFloat32) {
    merge(float{});
  } else if (out.dtype == DType::kFloat16) {
    merge(Fp16{});
  } else {
    merge(Bf16{});
  }
}

}  // namespace flash_mla::sm90
