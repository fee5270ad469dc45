// The public operations on rows on Hopper: norms with and without a sum, gates, rotations.
//
// Tile:      a row for each block (norms), or part of one; 16 bytes a thread at a time where rows, strides and addresses allow
//            it, else an element.
// Threads:   up to 256, all alike; of norms a quarter of a row's pieces, up to 1024.
// Memory:    a sum for each warp; of rotations a token's cosines and sines.
// Registers: up to 40: what limits these kernels is memory. A norm keeps its row in registers between its two passes where that
//            takes at most 4 pieces a thread.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/element.cuh"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/rows/row_ops.h"
#include "kernels/rows/sm90/piece.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 256, kMaxNormThreads = 1024;
constexpr int kHeld = 4;  // pieces of a row that a thread keeps
constexpr std::int64_t kMaxRows = INT32_MAX;

/// Sum over the block, in every thread, in an order that depends on the number of threads alone.
__device__ float block_sum(float x) {
  __shared__ float sums[kMaxNormThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0.0f;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) total += sums[w];
  return total;
}

template <class T, class W, class O>
struct NormParams {
  const T* x;
  T* residual;  ///< may be null
  const W* weight;
  O* out;  ///< T, or e4m3 as bytes
  std::int64_t x_stride, residual_stride, out_stride;
  int d;
  float eps, weight_offset, out_scale;
};

template <class T, class W, class O, int kVec>
__global__ void __launch_bounds__(kMaxNormThreads)
    norm_kernel(const __grid_constant__ NormParams<T, W, O> p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  using P = Piece<T, kVec>;
  const T* x = p.x + blockIdx.x * p.x_stride;
  T* residual = p.residual == nullptr ? nullptr : p.residual + blockIdx.x * p.residual_stride;
  O* out = p.out + blockIdx.x * p.out_stride;
  const int step = static_cast<int>(blockDim.x) * kVec, first = static_cast<int>(threadIdx.x) * kVec;
  float squares = 0.0f;
  /// x plus residual, which is written, or x.
  const auto sum_at = [&](P a, const P& b, int at) {
    if (residual != nullptr) {
      float sum[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] = as_float(b.v[i]) + as_float(a.v[i]);
      a = narrow<T, kVec>(sum);
      *reinterpret_cast<P*>(residual + at) = a;
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) squares += as_float(a.v[i]) * as_float(a.v[i]);
    return a;
  };
  // All of a thread's loads are under way before the first is waited for.
  P held[kHeld], other[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int at = first + h * step;
    if (at >= p.d) continue;
    held[h] = *reinterpret_cast<const P*>(x + at);
    if (residual != nullptr) other[h] = *reinterpret_cast<const P*>(residual + at);
  }
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    if (first + h * step < p.d) held[h] = sum_at(held[h], other[h], first + h * step);
  }
  for (int at = first + kHeld * step; at < p.d; at += step) {
    P b{};
    if (residual != nullptr) b = *reinterpret_cast<const P*>(residual + at);
    sum_at(*reinterpret_cast<const P*>(x + at), b, at);
  }
  const float factor = rsqrtf(block_sum(squares) / static_cast<float>(p.d) + p.eps);
  const float divisor = std::is_same_v<O, T> ? 1.0f : p.out_scale;
  const auto store = [&](const P& a, int at) {
    const auto weight = *reinterpret_cast<const Piece<W, kVec>*>(p.weight + at);
    float y[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      y[i] = as_float(a.v[i]) * factor * (as_float(weight.v[i]) + p.weight_offset);
      if constexpr (!std::is_same_v<O, T>) y[i] /= divisor;
    }
    *reinterpret_cast<Piece<O, kVec>*>(out + at) = narrow<O, kVec>(y);
  };
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    if (first + h * step < p.d) store(held[h], first + h * step);
  }
  // A thread reads again what it has written itself.
  const T* again = residual != nullptr ? residual : x;
  for (int at = first + kHeld * step; at < p.d; at += step)
    store(*reinterpret_cast<const P*>(again + at), at);
}

template <class T>
struct GateParams {
  const T* gate_up;
  T* out;
  std::int64_t in_stride, out_stride;
  int d;
};

template <Activation kActivation>
__device__ float activate(float x) {
  if constexpr (kActivation == Activation::kSilu) {
    return x / (1.0f + __expf(-x));
  } else if constexpr (kActivation == Activation::kGelu) {
    return 0.5f * x * (1.0f + erff(x * 0.707106781f));
  } else {
    return 0.5f * x * (1.0f + tanhf(0.797884561f * (x + 0.044715f * x * x * x)));
  }
}

template <class T, Activation kActivation, int kVec>
__global__ void __launch_bounds__(kMaxThreads) gate_kernel(const __grid_constant__ GateParams<T> p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  using P = Piece<T, kVec>;
  const std::int64_t row = blockIdx.x;
  const int at = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kVec;
  if (at >= p.d) return;
  P gate = *reinterpret_cast<const P*>(p.gate_up + row * p.in_stride + at);
  const P up = *reinterpret_cast<const P*>(p.gate_up + row * p.in_stride + p.d + at);
#pragma unroll
  for (int i = 0; i < kVec; ++i)
    gate.v[i] = from_float<T>(activate<kActivation>(as_float(gate.v[i])) * as_float(up.v[i]));
  *reinterpret_cast<P*>(p.out + row * p.out_stride + at) = gate;
}

template <class T>
struct RopeParams {
  const T* x;
  T* out;
  std::int64_t x_stride, x_head_stride, out_stride, out_head_stride;
  const void* positions;
  std::int64_t position_stride;
  const float* table;  ///< may be null
  std::int64_t table_stride;
  int heads, d, pairs;
  bool wide_positions, interleaved;
  float scale;
  float frequencies[kMaxRopePairs];
};

/// A token's heads: kVec elements of a head for a thread at a time; of pairs that lie apart, and of both halves.
template <class T, int kVec>
__global__ void __launch_bounds__(kMaxThreads) rope_kernel(const __grid_constant__ RopeParams<T> p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  using P = Piece<T, kVec>;
  __shared__ float cosines[kMaxRopePairs], sines[kMaxRopePairs];
  const std::int64_t row = blockIdx.x;
  const std::int64_t position = p.wide_positions
                                    ? static_cast<const std::int64_t*>(p.positions)[row * p.position_stride]
                                    : static_cast<const std::int32_t*>(p.positions)[row * p.position_stride];
  for (int i = static_cast<int>(threadIdx.x); i < p.pairs; i += static_cast<int>(blockDim.x)) {
    if (p.table != nullptr) {
      cosines[i] = p.table[position * p.table_stride + i];
      sines[i] = p.table[position * p.table_stride + p.pairs + i];
    } else {
      float sine, cosine;
      sincosf(static_cast<float>(position) * p.frequencies[i], &sine, &cosine);
      cosines[i] = cosine * p.scale;
      sines[i] = sine * p.scale;
    }
  }
  __syncthreads();
  const int rotary = 2 * p.pairs;
  // Pieces of a head: its turned ones (one for both halves, where pairs lie apart), then those that are copied.
  const int turned = (p.interleaved ? rotary : p.pairs) / kVec, pieces = turned + (p.d - rotary) / kVec;
  for (int i = static_cast<int>(threadIdx.x); i < p.heads * pieces; i += static_cast<int>(blockDim.x)) {
    const int head = i / pieces, piece = i - head * pieces;
    const T* from = p.x + row * p.x_stride + head * p.x_head_stride;
    T* to = p.out + row * p.out_stride + head * p.out_head_stride;
    if (piece >= turned) {
      const int at = rotary + (piece - turned) * kVec;
      *reinterpret_cast<P*>(to + at) = *reinterpret_cast<const P*>(from + at);
      continue;
    }
    const int at = piece * kVec;
    if (p.interleaved) {
      if constexpr (kVec > 1) {
        P a = *reinterpret_cast<const P*>(from + at);
#pragma unroll
        for (int j = 0; j < kVec; j += 2) {
          const float x = as_float(a.v[j]), y = as_float(a.v[j + 1]);
          const float cosine = cosines[(at + j) / 2], sine = sines[(at + j) / 2];
          a.v[j] = from_float<T>(x * cosine - y * sine);
          a.v[j + 1] = from_float<T>(y * cosine + x * sine);
        }
        *reinterpret_cast<P*>(to + at) = a;
      } else if (at % 2 == 0) {
        const float x = as_float(from[at]), y = as_float(from[at + 1]);
        to[at] = from_float<T>(x * cosines[at / 2] - y * sines[at / 2]);
        to[at + 1] = from_float<T>(y * cosines[at / 2] + x * sines[at / 2]);
      }
    } else {
      P a = *reinterpret_cast<const P*>(from + at), b = *reinterpret_cast<const P*>(from + p.pairs + at);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float x = as_float(a.v[j]), y = as_float(b.v[j]);
        a.v[j] = from_float<T>(x * cosines[at + j] - y * sines[at + j]);
        b.v[j] = from_float<T>(y * cosines[at + j] + x * sines[at + j]);
      }
      *reinterpret_cast<P*>(to + at) = a;
      *reinterpret_cast<P*>(to + p.pairs + at) = b;
    }
  }
}

/// Whether all rows of `t`, and heads where there are some, begin at multiples of so many bytes and are as long as some.
bool is_wide(const TensorView& t, std::int64_t bytes = 16) {
  const auto element = static_cast<std::int64_t>(dtype_size(t.dtype));
  auto all =
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.data)) | t.size(t.rank - 1) * element;
  for (int d = 0; d + 1 < t.rank; ++d) {
    if (t.size(d) > 1) all |= t.stride(d) * element;
  }
  return all % bytes == 0;
}

unsigned threads_for(std::int64_t pieces, unsigned most) {
  return static_cast<unsigned>(std::min<std::int64_t>((pieces + kWarp - 1) / kWarp * kWarp, most));
}

void check_rows(const TensorView& t, const char* name) {
  require_device(t.device.index);
  for (int d = 0; d < t.rank; ++d) {
    if (t.size(d) > kMaxRows) {
      throw Unsupported(std::string(name) + ".shape[" + std::to_string(d) + "] is " +
                        std::to_string(t.size(d)) + "; the sm90 backend takes up to 2147483647");
    }
  }
}

/// f(element) of a row's type.
template <class F>
void visit_row_type(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) {
    f(Bf16{});
  } else if (dtype == DType::kFloat16) {
    f(Fp16{});
  } else {
    f(float{});
  }
}

template <class T, class W, class O>
void launch_norm(const NormCall& call, cudaStream_t stream) {
  NormParams<T, W, O> p{};
  p.x = call.x.ptr<const T>();
  p.x_stride = call.x.stride(0);
  if (call.residual.defined()) {
    p.residual = call.residual.ptr<T>();
    p.residual_stride = call.residual.stride(0);
  }
  p.weight = call.weight.ptr<const W>();
  p.out = call.out.ptr<O>();
  p.out_stride = call.out.stride(0);
  p.d = static_cast<int>(call.x.size(1));
  p.out_scale = call.norm.out_scale;
  p.eps = call.norm.eps;
  p.weight_offset = call.norm.weight_offset;
  constexpr int kVec = 16 / sizeof(T);
  const bool wide = is_wide(call.x) && is_wide(call.out, 16 * sizeof(O) / sizeof(T)) &&
                    is_wide(call.weight, 16 * sizeof(W) / sizeof(T)) &&
                    (!call.residual.defined() || is_wide(call.residual));
  const auto kernel = wide ? norm_kernel<T, W, O, kVec> : norm_kernel<T, W, O, 1>;
  const dim3 grid(static_cast<unsigned>(call.x.size(0)));
  // As many pieces a thread as it keeps: several loads under way, few sums to add up.
  const std::int64_t pieces = p.d / (wide ? kVec : 1);
  const unsigned threads = threads_for((pieces + kHeld - 1) / kHeld, kMaxNormThreads);
  check(launch(LaunchConfig(grid, threads, 0, stream).programmatic(), kernel, p), "norm_kernel");
}

template <class T, Activation kActivation>
void launch_gate(const GateCall& call, cudaStream_t stream) {
  GateParams<T> p{};
  p.gate_up = call.gate_up.ptr<const T>();
  p.in_stride = call.gate_up.stride(0);
  p.out = call.out.ptr<T>();
  p.out_stride = call.out.stride(0);
  p.d = static_cast<int>(call.out.size(1));
  constexpr int kVec = 16 / sizeof(T);
  const bool wide = is_wide(call.gate_up) && is_wide(call.out);
  const auto kernel = wide ? gate_kernel<T, kActivation, kVec> : gate_kernel<T, kActivation, 1>;
  const std::int64_t pieces = p.d / (wide ? kVec : 1);
  const unsigned threads = threads_for(pieces, kMaxThreads);
  const dim3 grid(static_cast<unsigned>(call.out.size(0)),
                  static_cast<unsigned>((pieces + threads - 1) / threads));
  check(launch(LaunchConfig(grid, threads, 0, stream).programmatic(), kernel, p), "gate_kernel");
}

template <class T>
void launch_rope(const RopeCall& call, cudaStream_t stream) {
  RopeParams<T> p{};
  p.x = call.x.ptr<const T>();
  p.x_stride = call.x.stride(0);
  p.x_head_stride = call.x.stride(1);
  p.out = call.out.ptr<T>();
  p.out_stride = call.out.stride(0);
  p.out_head_stride = call.out.stride(1);
  p.positions = call.positions.data;
  p.position_stride = call.positions.stride(0);
  p.wide_positions = call.positions.dtype == DType::kInt64;
  if (call.cos_sin.defined()) {
    p.table = call.cos_sin.ptr<const float>();
    p.table_stride = call.cos_sin.stride(0);
  }
  p.heads = static_cast<int>(call.x.size(1));
  p.d = static_cast<int>(call.x.size(2));
  p.pairs = call.rope.rotary_dim / 2;
  p.interleaved = call.rope.interleaved;
  p.scale = call.rope.scaling == RopeScaling::kYarn ? call.rope.attention_factor : 1.0f;
  for (int i = 0; i < p.pairs && p.table == nullptr; ++i) {
    p.frequencies[i] = static_cast<float>(rope_frequency(call.rope, call.rope.rotary_dim, i));
  }
  constexpr int kVec = 16 / sizeof(T);
  const bool wide = is_wide(call.x) && is_wide(call.out) && p.pairs % kVec == 0;
  const auto kernel = wide ? rope_kernel<T, kVec> : rope_kernel<T, 1>;
  const std::int64_t pieces = std::int64_t{p.heads} * p.d / (wide ? kVec : 1);
  const dim3 grid(static_cast<unsigned>(call.x.size(0)));
  check(launch(LaunchConfig(grid, threads_for(pieces, kMaxThreads), 0, stream).programmatic(), kernel, p),
        "rope_kernel");
}

}  // namespace

void rms_norm(const NormCall& call, void* stream) {
  check_rows(call.x, "x");
  const DeviceGuard guard(call.x.device.index);
  visit_row_type(call.x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto with_weight = [&]<class W>(W) {
      if (call.out.dtype == DType::kUInt8) {
        launch_norm<T, W, std::uint8_t>(call, queue);
      } else {
        launch_norm<T, W, T>(call, queue);
      }
    };
    if (call.weight.dtype == DType::kFloat32) {
      with_weight(float{});
    } else if constexpr (!std::is_same_v<T, float>) {
      with_weight(T{});
    }
  });
}

void gated_activation(const GateCall& call, void* stream) {
  check_rows(call.gate_up, "gate_up");
  const DeviceGuard guard(call.out.device.index);
  const auto queue = static_cast<cudaStream_t>(stream);
  visit_row_type(call.out.dtype, [&](auto element) {
    using T = decltype(element);
    if (call.activation == Activation::kSilu) {
      launch_gate<T, Activation::kSilu>(call, queue);
    } else if (call.activation == Activation::kGelu) {
      launch_gate<T, Activation::kGelu>(call, queue);
    } else {
      launch_gate<T, Activation::kGeluTanh>(call, queue);
    }
  });
}

void apply_rope(const RopeCall& call, void* stream) {
  check_rows(call.x, "x");
  const DeviceGuard guard(call.x.device.index);
  visit_row_type(call.x.dtype, [&](auto element) {
    launch_rope<decltype(element)>(call, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace flash_mla::sm90
