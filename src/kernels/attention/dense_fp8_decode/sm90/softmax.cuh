#pragma once

// The softmax of a tile as a product with the keys as rows leaves it: lane 4 g + t of warp w holds the scores of keys
// (rows) 16 w + g and + 8 for heads 8 n + 2 t and the next one, x[4 n + 2 * key + head].
//
// A head's keys lie in all four warps, so a reference of its own for each warp will not do: the warpgroup votes whether
// any score exceeds its head's reference by more than kMaxGrowth, and almost never one does.

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/dense_fp8_decode/sm90/fragments.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/words.cuh"

namespace flash_mla::sm90::dense_fp8 {

/// Reduces by head over the warp's keys: v[2 n + head] of heads 8 n + 2 t + head, as every lane has them, to those of
/// n = kept_group(g).
template <int kHeads, class Op>
__device__ __forceinline__ float2 reduce_heads(float (&v)[kHeads / 4], int g, Op op) {
  int count = kHeads / 8;  // groups of 8 heads that a lane still has
#pragma unroll
  for (int bit = 4; bit > 0; bit /= 2) {
    const bool upper = (g & bit) != 0;
    if (count > 1) {
      count /= 2;
#pragma unroll
      for (int i = 0; i < kHeads / 8; ++i) {
        if (i >= 2 * count) continue;
        const float sent = upper ? v[i] : v[i + 2 * count], kept = upper ? v[i + 2 * count] : v[i];
        v[i] = op(kept, __shfl_xor_sync(0xFFFFFFFFu, sent, bit * 4));
      }
    } else {
      v[0] = op(v[0], __shfl_xor_sync(0xFFFFFFFFu, v[0], bit * 4));
      v[1] = op(v[1], __shfl_xor_sync(0xFFFFFFFFu, v[1], bit * 4));
    }
  }
  return {v[0], v[1]};
}

/// Of warpgroup kWg's tiles, which lie in slot kWg.
template <int kHeads, int kWg>
struct Softmax {
  static constexpr int kGroups = kHeads / 8, kScores = kHeads / 2;
  static constexpr int kBarrier = kWg == 0 ? kWg0 : kWg1;
  using Scores = float[kScores];

  Smem<kHeads>& s;
  const int warp, g, t;

  /// The first of the two heads whose sums this lane keeps.
  __device__ int kept_head() const { return 8 * kept_group<kHeads>(g) + 2 * t; }

  /// S -> P, in fp16 times 2^exponent of its key, to the slot; `sum` grows by that of the heads that this lane keeps.
  /// `limited`: some head does not see all of the tile, which begins at key `first_key`. True if the reference moved:
  /// O and the other warpgroup's sums have to be multiplied with s.alpha[kWg].
  template <bool kScaled>
  __device__ bool run(Scores& x, const KeyScales<kScaled>& scales, bool limited, int first_key,
                      float (&sum)[2]) const {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const auto scale =
          ptx::load_shared<float2>(ptx::smem_address(&s.q_scale[2 * t]) + n * 8 * sizeof(float));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto e = static_cast<float>(scales.exponent[h]);
        x[4 * n + 2 * h] = fmaf(x[4 * n + 2 * h], scale.x * scales.power(h), e);
        x[4 * n + 2 * h + 1] = fmaf(x[4 * n + 2 * h + 1], scale.y * scales.power(h), e);
      }
    }
    if (limited) mask(x, first_key);
    bool beyond = false;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const auto base = ptx::load_shared<float4>(ptx::smem_address(&s.base[2 * t]) + n * 8 * sizeof(Base));
      beyond |= fmaxf(x[4 * n], x[4 * n + 2]) > base.y || fmaxf(x[4 * n + 1], x[4 * n + 3]) > base.w;
    }
    const bool moved = ptx::named_barrier_or<kBarrier, 128>(beyond);
    if (moved) {
      move_reference(x);
      follow(sum, kWg);
    }
    if (threadIdx.x % 128 == 0) s.moved[kWg] = moved ? 1 : 0;
    exponentiate(x, scales, sum);
    return moved;
  }

  /// Sums of this lane after a move that softmax `slot` made.
  __device__ void follow(float (&sum)[2], int slot) const {
    const auto alpha = ptx::load_shared<float2>(ptx::smem_address(&s.alpha[slot][kept_head()]));
    sum[0] *= alpha.x;
    sum[1] *= alpha.y;
  }

 private:
  // Scores that a head does not see become -inf.
  __device__ void mask(Scores& x, int first_key) const {
    const int key0 = first_key + key_of_row(warp * 16 + g), key1 = first_key + key_of_row(warp * 16 + g + 8);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const auto limit = ptx::load_shared<int2>(ptx::smem_address(&s.limit[2 * t]) + n * 8 * sizeof(int));
      if (key0 >= limit.x) x[4 * n] = -INFINITY;
      if (key0 >= limit.y) x[4 * n + 1] = -INFINITY;
      if (key1 >= limit.x) x[4 * n + 2] = -INFINITY;
      if (key1 >= limit.y) x[4 * n + 3] = -INFINITY;
    }
  }

  __device__ void move_reference(const Scores& x) const {
    float most[kHeads / 4];
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i) {
      most[i] = fmaxf(x[4 * (i / 2) + i % 2], x[4 * (i / 2) + 2 + i % 2]);
    }
    const float2 of_warp = reduce_heads<kHeads>(most, g, [](float a, float b) { return fmaxf(a, b); });
    *reinterpret_cast<float2*>(&s.warp_max[warp][kept_head()]) = of_warp;  // some lanes write the same
    ptx::named_barrier_sync<kBarrier, 128>();
    const int head = static_cast<int>(threadIdx.x) % 128;
    if (head < kHeads) {
      const float highest = fmaxf(fmaxf(s.warp_max[0][head], s.warp_max[1][head]),
                                  fmaxf(s.warp_max[2][head], s.warp_max[3][head]));
      const float from = s.reference[head], to = highest > from + kMaxGrowth ? highest : from;
      s.alpha[kWg][head] = from == to || from == -INFINITY ? 1.0f : exp2_fast(from - to);
      s.reference[head] = to;
      s.base[head] = Base{to == -INFINITY ? 0.0f : to, to + kMaxGrowth};
    }
    ptx::named_barrier_sync<kBarrier, 128>();
  }

  template <bool kScaled>
  __device__ void exponentiate(Scores& x, const KeyScales<kScaled>& scales, float (&sum)[2]) const {
    float part[kHeads / 4];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const auto base = ptx::load_shared<float4>(ptx::smem_address(&s.base[2 * t]) + n * 8 * sizeof(Base));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        x[4 * n + 2 * h] = exp2_fast(x[4 * n + 2 * h] - base.x);
        x[4 * n + 2 * h + 1] = exp2_fast(x[4 * n + 2 * h + 1] - base.z);
      }
#pragma unroll
      for (int head = 0; head < 2; ++head) {
        part[2 * n + head] =
            fmaf(x[4 * n + head], scales.inverse(0), x[4 * n + 2 + head] * scales.inverse(1));
      }
    }
    const float2 of_warp = reduce_heads<kHeads>(part, g, [](float a, float b) { return a + b; });
    sum[0] += of_warp.x;
    sum[1] += of_warp.y;
    // Lane l gives the address of row l % 8 of matrix l / 8: groups n and n + 1 of heads, of each both groups of keys.
    const int lane = 4 * g + t, matrix = lane / 8;
    const std::uint32_t chunk = ptx::smem_address(s.weights[kWg].at(0));
#pragma unroll
    for (int n = 0; n < kGroups; n += 2) {
      std::uint32_t p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* y = &x[4 * (n + i / 2) + 2 * (i % 2)];
        p[i] = pack2<false>(y[0], y[1]);
      }
      stmatrix_x4_transposed(
          ptx::swizzled_word(chunk, 8 * (n + matrix / 2) + lane % 8, 2 * warp + matrix % 2), p[0], p[1], p[2],
          p[3]);
    }
    ptx::fence_async_proxy();
  }
};

}  // namespace flash_mla::sm90::dense_fp8
