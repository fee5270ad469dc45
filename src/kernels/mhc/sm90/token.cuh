#pragma once

// What kernels of hyper-connections do with one token, one thread a token: weights of its streams out of sums. The post step's
// arithmetic is here too, so that every kernel has its bits.

#include <cstdint>

#include "base/cuda/element.cuh"
#include "flash_mla/mhc.h"
#include "kernels/rows/sm90/piece.cuh"

namespace flash_mla::sm90::mhc {

/// A tensor's data and strides in elements; `row` is the token's.
template <class T>
struct Plane {
  T* data;
  std::int64_t row, inner, last;
  __device__ T* at(std::int64_t token) const { return data + token * row; }
};

struct TokenParams {
  const float *scale, *base;
  std::int64_t scale_stride, base_stride;
  Plane<float> post, comb;  ///< comb: inner is its second dimension's stride
  float rms_eps, pre_eps, post_mult, sinkhorn_eps, norm_eps;
  int sinkhorn_repeat;
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/// comb (n, n), logits at first; n is at most kMost, rows are kMost apart.
template <int kMost>
__device__ void sinkhorn(float (&comb)[kMost * kMost], int n, float eps, int repeats) {
#pragma unroll
  for (int row = 0; row < kMost; ++row) {
    float* c = comb + row * kMost;
    float largest = c[0], sum = 0;
#pragma unroll
    for (int i = 1; i < kMost; ++i) {
      if (i < n) largest = fmaxf(largest, c[i]);
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      c[i] = i < n && row < n ? expf(c[i] - largest) : 0.0f;
      sum += c[i];
    }
    const float factor = row < n ? 1.0f / sum : 0.0f;
#pragma unroll
    for (int i = 0; i < kMost; ++i) c[i] = i < n && row < n ? fmaf(c[i], factor, eps) : 0.0f;
  }
  // What is past n stays 0.
  for (int repeat = 0; repeat < repeats; ++repeat) {
    if (repeat > 0) {
#pragma unroll
      for (int row = 0; row < kMost; ++row) {
        float sum = eps;
#pragma unroll
        for (int i = 0; i < kMost; ++i) sum += comb[row * kMost + i];
        const float factor = row < n ? __fdividef(1.0f, sum) : 0.0f;
#pragma unroll
        for (int i = 0; i < kMost; ++i) comb[row * kMost + i] *= factor;
      }
    }
#pragma unroll
    for (int column = 0; column < kMost; ++column) {
      float sum = eps;
#pragma unroll
      for (int i = 0; i < kMost; ++i) sum += comb[i * kMost + column];
      const float factor = column < n ? __fdividef(1.0f, sum) : 0.0f;
#pragma unroll
      for (int i = 0; i < kMost; ++i) comb[i * kMost + column] *= factor;
    }
  }
}

/// scale (3), and base (n * (n + 2)) behind it, into shared memory, by the whole block.
__device__ inline void load_scales(const TokenParams& p, int n, float* scales) {
  for (int i = static_cast<int>(threadIdx.x); i < 3 + n * (n + 2); i += static_cast<int>(blockDim.x)) {
    scales[i] = i < 3 ? p.scale[i * p.scale_stride] : p.base[(i - 3) * p.base_stride];
  }
}

/// From the token's sums, fn f (n * (n + 2)) and f^2, to its weights: `pre` gets n; post and comb are written where `writes`.
template <int kMost>
__device__ void weigh_token(const float* sums, float squares, std::int64_t token, int n, std::int64_t d,
                            const TokenParams& p, const float* scales, float* pre, bool writes) {
  const float factor = 1.0f / sqrtf(squares / static_cast<float>(n * d) + p.rms_eps);
  const auto mix = [&](int i, int kind) { return fmaf(sums[i] * factor, scales[kind], scales[3 + i]); };
  for (int s = 0; s < n; ++s) pre[s] = sigmoid(mix(s, 0)) + p.pre_eps;
  if (!writes) return;
  for (int s = 0; s < n; ++s) p.post.at(token)[s * p.post.last] = sigmoid(mix(n + s, 1)) * p.post_mult;
  float comb[kMost * kMost];
#pragma unroll
  for (int i = 0; i < kMost * kMost; ++i) {
    const int row = i / kMost, column = i % kMost;
    comb[i] = row < n && column < n ? mix(2 * n + row * n + column, 2) : 0.0f;
  }
  sinkhorn<kMost>(comb, n, p.sinkhorn_eps, p.sinkhorn_repeat);
#pragma unroll
  for (int i = 0; i < kMost * kMost; ++i) {
    const int row = i / kMost, column = i % kMost;
    if (row < n && column < n) p.comb.at(token)[row * p.comb.inner + column * p.comb.last] = comb[i];
  }
}

/// An element of stream t of the next residual: `comb` points to comb[0][t], whose rows are `step` apart.
template <int kMost>
__device__ float mix_streams(float post, const float* comb, int step, float y, const float (&streams)[kMost],
                             int n) {
  float sum = __fmul_rn(post, y);
#pragma unroll
  for (int s = 0; s < kMost; ++s) {
    if (s < n) sum = fmaf(comb[s * step], streams[s], sum);
  }
  return sum;
}

template <class T>
struct PostParams {
  Plane<const T> x, residual;  ///< residual, out: inner is a stream's stride
  Plane<T> out;
  Plane<const float> post, comb;
  std::int64_t tokens;
  int n;
  int d;
};

/// kVec columns from `at` on of all streams of a token.
template <class T, int kVec, int kMost>
struct PostPiece {
  using P = Piece<T, kVec>;
  P x, streams[kMost];

  __device__ PostPiece(const PostParams<T>& p, std::int64_t token, int at) {
    x = *reinterpret_cast<const P*>(p.x.at(token) + at);
#pragma unroll
    for (int s = 0; s < kMost; ++s) {
      if (s < p.n) streams[s] = *reinterpret_cast<const P*>(p.residual.at(token) + s * p.residual.inner + at);
    }
  }
  /// Their next residual to its place. `weights`: post (n), and comb (n, n) behind it.
  __device__ void store(const PostParams<T>& p, std::int64_t token, int at, const float* weights) const {
    float out[kMost][kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      float from[kMost];
#pragma unroll
      for (int s = 0; s < kMost; ++s) {
        if (s < p.n) from[s] = as_float(streams[s].v[i]);
      }
      const float y = as_float(x.v[i]);
#pragma unroll
      for (int t = 0; t < kMost; ++t) {
        if (t < p.n) out[t][i] = mix_streams(weights[t], weights + p.n + t, p.n, y, from, p.n);
      }
    }
#pragma unroll
    for (int t = 0; t < kMost; ++t) {
      if (t < p.n) *reinterpret_cast<P*>(p.out.at(token) + t * p.out.inner + at) = narrow<T, kVec>(out[t]);
    }
  }
};

/// Weight i of a token, in the order that post_piece takes them.
template <class T>
__device__ float post_weight(const PostParams<T>& p, std::int64_t token, int i) {
  if (i < p.n) return p.post.at(token)[i * p.post.last];
  const int from = (i - p.n) / p.n, to = (i - p.n) % p.n;
  return p.comb.at(token)[from * p.comb.inner + to * p.comb.last];
}

}  // namespace flash_mla::sm90::mhc
