// Hyper-connections on Hopper: mhc_post, and mhc_pre of any dtype, number of streams and width. Those of bfloat16 in 4 streams are in
// tiles.cu.
//
// Tile:      post: a token, or a part of its columns, for each block; pre: a token for each block.
// Threads:   256. Of pre, a warp takes every eighth of the token's sums.
// Memory:    weights and sums of a token.
// Registers: post: up to 64. Reading and writing are what takes time.

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/mhc/call.h"
#include "kernels/mhc/sm90/tiles.h"

namespace flash_mla::sm90 {
namespace {

using namespace mhc;

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kMaxSums = kMaxMhcStreams * (kMaxMhcStreams + 2) + 1;

template <class T, int kVec, int kMost>
__global__ void __launch_bounds__(kThreads) post_kernel(const __grid_constant__ PostParams<T> p) {
  __shared__ float weights[kMost * (kMost + 1)];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t token = blockIdx.x;
  const int at = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kVec, within = min(at, p.d - kVec);
  const PostPiece<T, kVec, kMost> piece(p, token, within);  // under way before the weights are waited for
  for (int i = static_cast<int>(threadIdx.x); i < p.n * (p.n + 1); i += static_cast<int>(blockDim.x)) {
    weights[i] = post_weight(p, token, i);
  }
  __syncthreads();
  if (at < p.d) piece.store(p, token, at, weights);
}

template <class T>
struct RowParams {
  Plane<const T> residual;
  const float* fn;
  std::int64_t fn_stride;
  TokenParams token;
  Plane<T> input;
  const float* norm_wide;
  const T* norm_narrow;
  int n, d;
};

__device__ float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

template <class T>
__global__ void __launch_bounds__(kThreads) pre_row_kernel(const __grid_constant__ RowParams<T> p) {
  __shared__ float sums[kMaxSums], scales[3 + kMaxSums], pre[kMaxMhcStreams], squares_of[kWarps];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  load_scales(p.token, p.n, scales);
  const std::int64_t token = blockIdx.x;
  const T* residual = p.residual.at(token);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int mixes = p.n * (p.n + 2);
  for (int m = warp; m <= mixes; m += kWarps) {  // the last is the sum of squares
    float sum = 0;
    for (int s = 0; s < p.n; ++s) {
      const T* stream = residual + s * p.residual.inner;
      const float* fn = p.fn + m * p.fn_stride + std::int64_t{s} * p.d;
      for (int c = lane; c < p.d; c += kWarp) {
        const float x = as_float(stream[c]);
        sum = fmaf(m < mixes ? fn[c] : x, x, sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[m] = sum;
  }
  __syncthreads();
  if (thread == 0) {
    weigh_token<kMaxMhcStreams>(sums, sums[mixes], token, p.n, p.d, p.token, scales, pre, /*writes=*/true);
  }
  __syncthreads();
  T* input = p.input.at(token);
  float squares = 0;
  for (int c = thread; c < p.d; c += kThreads) {
    float sum = 0;
    for (int s = 0; s < p.n; ++s) sum = fmaf(pre[s], as_float(residual[s * p.residual.inner + c]), sum);
    input[c] = from_float<T>(sum);
    squares = fmaf(as_float(input[c]), as_float(input[c]), squares);
  }
  if (p.norm_wide == nullptr && p.norm_narrow == nullptr) return;
  squares = warp_sum(squares);
  if (lane == 0) squares_of[warp] = squares;
  __syncthreads();
  float total = 0;
  for (const float s : squares_of) total += s;
  const float factor = 1.0f / sqrtf(total / static_cast<float>(p.d) + p.token.norm_eps);
  for (int c = thread; c < p.d; c += kThreads) {
    const float weight = p.norm_wide != nullptr ? p.norm_wide[c] : as_float(p.norm_narrow[c]);
    input[c] = from_float<T>(as_float(input[c]) * factor * weight);
  }
}

template <class T>
Plane<T> plane(const TensorView& t) {
  const bool deep = t.rank == 3;
  return {t.ptr<T>(), t.stride(0), deep ? t.stride(1) : 0, t.stride(t.rank - 1)};
}

/// Whether all rows of `t` begin at multiples of 16 bytes and are as long as some.
bool is_wide(const TensorView& t) {
  const auto element = static_cast<std::int64_t>(dtype_size(t.dtype));
  auto all =
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.data)) | t.size(t.rank - 1) * element;
  for (int d = 0; d + 1 < t.rank; ++d) {
    if (t.size(d) > 1) all |= t.stride(d) * element;
  }
  return all % 16 == 0;
}

/// A device that this backend runs on, and sizes that the kernels take.
void check_supported(const TensorView& residual) {
  require_device(residual.device.index);
  for (const int dim : {0, 2}) {
    const std::int64_t most = dim == 0 ? INT32_MAX / 8 : 1 << 20;
    if (residual.size(dim) <= most) continue;
    throw Unsupported("residual.shape[" + std::to_string(dim) + "] is " + std::to_string(residual.size(dim)) +
                      "; hyper-connections on sm90 take up to " + std::to_string(most));
  }
}

/// f(element) of a residual's type.
template <class F>
void visit(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) {
    f(Bf16{});
  } else if (dtype == DType::kFloat16) {
    f(Fp16{});
  } else {
    f(float{});
  }
}

template <class T>
PostParams<T> post_params(const MhcPostCall& c) {
  return {plane<const T>(c.x),
          plane<const T>(c.residual),
          plane<T>(c.out),
          plane<const float>(c.post),
          plane<const float>(c.comb),
          c.residual.size(0),
          static_cast<int>(c.residual.size(1)),
          static_cast<int>(c.residual.size(2))};
}

template <class T>
void launch_post(const MhcPostCall& call, cudaStream_t stream) {
  const PostParams<T> p = post_params<T>(call);
  constexpr int kVec = 16 / sizeof(T);
  const bool wide = p.n <= 4 && is_wide(call.x) && is_wide(call.residual) && is_wide(call.out);
  const int pieces = p.d / (wide ? kVec : 1);
  const auto threads = static_cast<unsigned>(std::min((pieces + kWarp - 1) / kWarp * kWarp, kThreads));
  const dim3 grid(static_cast<unsigned>(p.tokens), (static_cast<unsigned>(pieces) + threads - 1) / threads);
  const auto kernel = wide ? post_kernel<T, kVec, 4> : post_kernel<T, 1, kMaxMhcStreams>;
  check(launch(LaunchConfig(grid, threads, 0, stream).programmatic(), kernel, p), "post_kernel");
}

TokenParams token_params(const MhcWeights& w, const MhcMixes& m, const MhcOptions& o) {
  return {w.scale.ptr<const float>(),
          w.base.ptr<const float>(),
          w.scale.stride(0),
          w.base.stride(0),
          plane<float>(m.post),
          plane<float>(m.comb),
          o.rms_eps,
          o.pre_eps,
          o.post_mult,
          o.sinkhorn_eps,
          o.norm_eps,
          o.sinkhorn_repeat};
}

template <class T>
void launch_pre_rows(const TensorView& residual, const MhcWeights& w, const MhcMixes& m,
                     const MhcOptions& o) {
  RowParams<T> p{};
  p.residual = plane<const T>(residual);
  p.fn = w.fn.ptr<const float>();
  p.fn_stride = w.fn.stride(0);
  p.token = token_params(w, m, o);
  p.input = plane<T>(m.layer_input);
  if (w.norm.defined()) {
    if (w.norm.dtype == DType::kFloat32) {
      p.norm_wide = w.norm.ptr<const float>();
    } else {
      p.norm_narrow = w.norm.ptr<const T>();
    }
  }
  p.n = static_cast<int>(residual.size(1));
  p.d = static_cast<int>(residual.size(2));
  const dim3 grid(static_cast<unsigned>(residual.size(0)));
  const auto stream = static_cast<cudaStream_t>(o.stream);
  check(launch(LaunchConfig(grid, kThreads, 0, stream).programmatic(), pre_row_kernel<T>, p),
        "pre_row_kernel");
}

bool takes_tiles(const TensorView& residual, const MhcWeights& w, const MhcMixes& m) {
  return residual.dtype == DType::kBFloat16 && residual.size(1) == kTileStreams &&
         residual.size(2) % kTileWidth == 0 && residual.size(2) <= kMaxTileWidth && is_wide(residual) &&
         is_wide(w.fn) && is_wide(m.layer_input);
}

/// `call`: the post step before it, or none.
void launch_pre_tiles(const TensorView& residual, const MhcWeights& w, const MhcMixes& m, const MhcOptions& o,
                      const MhcPostCall* call) {
  TileParams p{};
  p.residual = plane<const Bf16>(residual);
  p.fn = w.fn.ptr<const float>();
  p.fn_stride = w.fn.stride(0);
  p.token = token_params(w, m, o);
  p.input = plane<Bf16>(m.layer_input);
  if (w.norm.defined()) {
    if (w.norm.dtype == DType::kFloat32) {
      p.norm_wide = w.norm.ptr<const float>();
    } else {
      p.norm_narrow = w.norm.ptr<const Bf16>();
    }
  }
  p.tokens = residual.size(0);
  p.d = static_cast<int>(residual.size(2));
  // 33 clusters are what a device has multiprocessors for, twice: with few tokens, fewer a cluster.
  constexpr int kClusters = 32, kMaxTile = 32;
  p.tile = static_cast<int>(std::clamp<std::int64_t>((p.tokens + kClusters - 1) / kClusters, 1, kMaxTile));
  if (call != nullptr) p.post = post_params<Bf16>(*call);
  pre_tiles(p, call != nullptr, static_cast<cudaStream_t>(o.stream));
}

}  // namespace

void mhc_pre(const TensorView& residual, const MhcWeights& weights, const MhcMixes& mixes,
             const MhcOptions& options) {
  check_supported(residual);
  const DeviceGuard guard(residual.device.index);
  if (takes_tiles(residual, weights, mixes)) {
    return launch_pre_tiles(residual, weights, mixes, options, nullptr);
  }
  visit(residual.dtype,
        [&](auto element) { launch_pre_rows<decltype(element)>(residual, weights, mixes, options); });
}

void mhc_post(const MhcPostCall& call, const MhcOptions& options) {
  check_supported(call.residual);
  const DeviceGuard guard(call.residual.device.index);
  visit(call.residual.dtype, [&](auto element) {
    launch_post<decltype(element)>(call, static_cast<cudaStream_t>(options.stream));
  });
}

void mhc_post_pre(const MhcPostCall& call, const MhcWeights& weights, const MhcMixes& mixes,
                  const MhcOptions& options) {
  check_supported(call.residual);
  const DeviceGuard guard(call.residual.device.index);
  if (takes_tiles(call.residual, weights, mixes) && is_wide(call.x) && is_wide(call.out)) {
    return launch_pre_tiles(call.out, weights, mixes, options, &call);
  }
  sm90::mhc_post(call, options);
  sm90::mhc_pre(call.out, weights, mixes, options);
}

}  // namespace flash_mla::sm90
