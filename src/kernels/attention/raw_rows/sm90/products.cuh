#pragma once

// S^T = K Q^T of a tile of 64 keys for a warpgroup, by formats of rows.
//
// Warp w has keys 16 w to 16 w + 15, a slot of the ring; the thread of lane 4 g + c has keys g and g + 8 of them and, of
// every eight heads, 2 c and 2 c + 1. It loads 16 bytes of a row at a time (query.cuh says which; the eight lanes of a
// load's phase hit all banks) and takes four bytes of e4m3, or two words of 16-bit elements, for an instruction's k.
// The registers of an instruction are filled while those before it run.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/raw_rows/sm90/query.cuh"
#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace flash_mla::sm90::raw_rows {

/// Instructions of 16 columns that are made at a time, while those made before run. With 64 heads there are no registers
/// for more.
template <int kHeads>
inline constexpr int kUnit = kHeads < 64 ? 4 : 2;

/// What P of a thread's two keys is multiplied with, and whether they are keys at all.
template <class F>
struct KeyScales {
  float of[2][F::kKeyScales > 0 ? F::kKeyScales : 1];
  bool known[2];
};

/// 16 bytes of each of the two keys' rows.
struct KeyWords {
  uint4 first, second;
};

template <class F, int kHeads, bool kBf16>
struct KeyProductsBase {
  static constexpr int kSums = kHeads / 2;
  using S = Smem<F, kHeads>;

  S& s;
  const int lane, slot;
  const std::uint32_t rows = ptx::smem_address(s.rows[slot]) + lane / 4 * F::kStride;

  __device__ KeyProductsBase(S& smem, int l, int ring_slot) : s(smem), lane(l), slot(ring_slot) {}

  __device__ KeyWords load_words(int at) const {
    return {ptx::load_shared<uint4>(rows + at), ptx::load_shared<uint4>(rows + at + 8 * F::kStride)};
  }
  __device__ KeyWords load_e4m3(int chunk) const { return load_words(e4m3_column<F>(chunk, lane % 4)); }
  // The rope part's words for its first (half 0) or last two instructions.
  __device__ KeyWords load_rope(int half) const {
    return load_words(F::kRopeOffset + lane % 4 * 32 + half * 16);
  }
  __device__ static void widen(std::uint32_t (&a)[4], std::uint32_t first, std::uint32_t second) {
    a[0] = widen_low(first);
    a[1] = widen_low(second);
    a[2] = widen_high(first);
    a[3] = widen_high(second);
  }
  __device__ static constexpr std::uint32_t word(const uint4& x, int i) {
    return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
  }
  // Of heads 8 j + 2 c and the next: what sums over e4m3 are multiplied with.
  __device__ float2 factors(int j, float scale_log2) const {
    const float2 f = *reinterpret_cast<const float2*>(&s.q_factor[8 * j + lane % 4 * 2]);
    return {f.x * scale_log2, f.y * scale_log2};
  }
  __device__ void find_known(KeyScales<F>& scales) const {
    const std::uint32_t valid = s.valid[slot];
#pragma unroll
    for (int h = 0; h < 2; ++h) scales.known[h] = (valid >> (lane / 4 + 8 * h) & 1) != 0;
  }
  // Nothing of the slot is needed any more.
  __device__ void release() const {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&s.rows_empty[slot]);
  }

  // Two bfloat16 of a row as Q's type.
  __device__ static std::uint32_t rope_pair(std::uint32_t x) {
    if constexpr (kBf16) return x;
    const float2 f = floats<true>(x);
    return pack2<false>(f.x, f.y);
  }
  // The products of the rope part, one group; the slot is released.
  __device__ void multiply_rope(float (&sums)[kSums], const KeyWords& w) const {
    const KeyWords second = load_rope(1);
    release();
    const std::uint32_t a[4][4] = {
        {rope_pair(w.first.x), rope_pair(w.second.x), rope_pair(w.first.y), rope_pair(w.second.y)},
        {rope_pair(w.first.z), rope_pair(w.second.z), rope_pair(w.first.w), rope_pair(w.second.w)},
        {rope_pair(second.first.x), rope_pair(second.second.x), rope_pair(second.first.y),
         rope_pair(second.second.y)},
        {rope_pair(second.first.z), rope_pair(second.second.z), rope_pair(second.first.w),
         rope_pair(second.second.w)}};
    const auto q = s.template own_q<ptx::Element<kBf16>>().k_major();
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::wgmma(sums, a[i], q.step(i), i > 0);
    ptx::wgmma_commit();
  }
};

template <class F, int kHeads, bool kBf16>
struct KeyProducts : KeyProductsBase<F, kHeads, kBf16> {
  using Base = KeyProductsBase<F, kHeads, kBf16>;
  using Base::Base, Base::kSums, Base::lane, Base::s, Base::slot, Base::word;

  static constexpr int kSteps = 4 * F::kE4m3Chunks;
  using Powers = std::uint32_t[2][4];

  // x = scale_log2 q k.
  __device__ void score(float (&x)[kSums], KeyScales<F>& scales, float scale_log2) const {
    float rope[F::kHasRope ? kSums : 1];
    std::uint32_t a[2][kUnit<kHeads>][4];
    Powers powers;
    KeyWords w = this->load_e4m3(0);
    if constexpr (F::kTable) load_scales(scales, powers);
    this->find_known(scales);
    const auto q = s.q.k_major();
#pragma unroll
    for (int t = 0; t < kSteps; t += kUnit<kHeads>) {
      auto& to = a[t / kUnit<kHeads> % 2];
      if (t >= 2 * kUnit<kHeads>) ptx::wgmma_wait<1>();  // the unit before the last has read its registers
#pragma unroll
      for (int i = 0; i < kUnit<kHeads>; ++i)
        widen(to[i], word(w.first, (t + i) % 4), word(w.second, (t + i) % 4), powers, t / 8);
      const int next = t + kUnit<kHeads>;
      if (next == kSteps) {
        if constexpr (F::kHasRope) {
          w = this->load_rope(0);
        } else {
          this->release();
        }
      } else if (next % 4 == 0) {
        w = this->load_e4m3(next / 4);
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kUnit<kHeads>; ++i) ptx::wgmma(x, to[i], q.step(t + i), t + i > 0);
      ptx::wgmma_commit();
    }
    if constexpr (F::kHasRope) this->multiply_rope(rope, w);
    ptx::wgmma_wait<F::kHasRope ? 1 : 0>();
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      const float2 f = this->factors(j, scale_log2);
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) x[i] *= of_key(scales, i) * (i % 2 == 0 ? f.x : f.y);
    }
    if constexpr (F::kHasRope) {
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < kSums; ++i) x[i] = fmaf(rope[i], scale_log2, x[i]);
    }
  }

 private:
  __device__ static float of_key(const KeyScales<F>& scales, int i) {
    if constexpr (F::kTable) return scales.of[i % 4 / 2][0];
    return 1.0f;
  }
  // powers[h][i], twice: what key h's elements of this thread in the i-th two chunks are multiplied with.
  __device__ void load_scales(KeyScales<F>& scales, Powers& powers) const {
    const ScaleTable<F>& table = s.scales(slot);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = lane / 4 + 8 * h;
      scales.of[h][0] = table.of_key[key];
#pragma unroll
      for (int i = 0; i < 4; ++i) powers[h][i] = table.of[F::scale_block(i, lane % 4)][key] * 0x10001u;
    }
  }
  __device__ static void widen(std::uint32_t (&a)[4], std::uint32_t first, std::uint32_t second,
                               const Powers& powers, int pair) {
    Base::widen(a, first, second);
    if constexpr (F::kTable) {
      a[0] = times(a[0], powers[0][pair]);
      a[1] = times(a[1], powers[1][pair]);
      a[2] = times(a[2], powers[0][pair]);
      a[3] = times(a[3], powers[1][pair]);
    }
  }
};

/// Scales are applied to the sums of a block, in fp32.
template <int kHeads, bool kBf16>
struct KeyProducts<V32Rows, kHeads, kBf16> : KeyProductsBase<V32Rows, kHeads, kBf16> {
  using F = V32Rows;
  using Base = KeyProductsBase<F, kHeads, kBf16>;
  using Base::Base, Base::kSums, Base::s, Base::rows, Base::widen, Base::word;

  // x = scale_log2 q k. With fewer than 64 heads a block's sums are added while the next one's are on their way.
  __device__ void score(float (&x)[kSums], KeyScales<F>& scales, float scale_log2) const {
    constexpr int kSets = kHeads < 64 ? 2 : 1, kStepsOfBlock = 8;
    float sums[kSets][kSums];
    std::uint32_t a[2][kUnit<kHeads>][4];
    const auto q = s.q.k_major();
    KeyWords w = this->load_e4m3(0);
    load_scales(scales);
#pragma unroll
    for (int t = 0; t < 32; t += kUnit<kHeads>) {
      const int b = t / kStepsOfBlock;
      const bool first = t % kStepsOfBlock == 0;
      auto& to = a[t / kUnit<kHeads> % 2];
      if (t >= 2 * kUnit<kHeads>) ptx::wgmma_wait<1>();  // the unit before the last has read its registers
#pragma unroll
      for (int i = 0; i < kUnit<kHeads>; ++i)
        widen(to[i], word(w.first, (t + i) % 4), word(w.second, (t + i) % 4));
      const int next = t + kUnit<kHeads>;
      if (next % 4 == 0) w = next < 32 ? this->load_e4m3(next / 4) : this->load_rope(0);
      if (kSets == 1 && first && b > 0) {
        ptx::wgmma_wait<0>();
        add_block(x, sums[0], scales, b - 1);
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kUnit<kHeads>; ++i)
        ptx::wgmma(sums[b % kSets], to[i], q.step(t + i), !first || i > 0);
      ptx::wgmma_commit();
      if (kSets == 2 && first && b > 0) {
        ptx::wgmma_wait<1>();
        add_block(x, sums[(b - 1) % kSets], scales, b - 1);
      }
    }
    if constexpr (kSets == 1) {
      ptx::wgmma_wait<0>();
      add_block(x, sums[0], scales, 3);
    }
    this->multiply_rope(sums[0], w);
    if constexpr (kSets == 2) {
      ptx::wgmma_wait<1>();
      add_block(x, sums[1], scales, 3);
    }
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      const float2 f = this->factors(j, scale_log2);
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) x[i] *= i % 2 == 0 ? f.x : f.y;
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] = fmaf(sums[0][i], scale_log2, x[i]);
  }

 private:
  __device__ void load_scales(KeyScales<F>& scales) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto x = ptx::load_shared<uint4>(rows + 8 * h * F::kStride + F::kScaleOffset);
      scales.of[h][0] = __uint_as_float(x.x);
      scales.of[h][1] = __uint_as_float(x.y);
      scales.of[h][2] = __uint_as_float(x.z);
      scales.of[h][3] = __uint_as_float(x.w);
    }
    this->find_known(scales);
  }
  // x (+)= scale * sums of block b.
  __device__ void add_block(float (&x)[kSums], const float (&sums)[kSums], const KeyScales<F>& scales,
                            int b) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float f = scales.of[i % 4 / 2][b];
      x[i] = b == 0 ? sums[i] * f : fmaf(sums[i], f, x[i]);
    }
  }
};

/// Words go into products as they are.
template <int kDim, int kHeads, bool kBf16>
struct KeyProducts<WideRows<kDim>, kHeads, kBf16> : KeyProductsBase<WideRows<kDim>, kHeads, kBf16> {
  using F = WideRows<kDim>;
  using Base = KeyProductsBase<F, kHeads, kBf16>;
  using Base::Base, Base::kSums, Base::lane, Base::s;

  // x = scale_log2 q k, in units of half a chunk.
  __device__ void score(float (&x)[kSums], KeyScales<F>& scales, float scale_log2) const {
    constexpr int kUnits = kDim / 32;
    const auto q = s.template own_q<ptx::Element<kBf16>>().k_major();
    this->find_known(scales);
    KeyWords w[2];
    w[0] = load_half(0);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const KeyWords& v = w[u % 2];
      const std::uint32_t a[2][4] = {{v.first.x, v.second.x, v.first.y, v.second.y},
                                     {v.first.z, v.second.z, v.first.w, v.second.w}};
      ptx::wgmma_fence();
      ptx::wgmma(x, a[0], q.step(2 * u), u > 0);
      ptx::wgmma(x, a[1], q.step(2 * u + 1), true);
      ptx::wgmma_commit();
      // (A `break` here would keep the loop rolled, and the registers of a unit on its way would be written to.)
      if (u + 1 < kUnits) {
        if (u > 0) ptx::wgmma_wait<1>();  // unit u - 1 has read its registers
        w[(u + 1) % 2] = load_half(u + 1);
      }
    }
    this->release();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] *= scale_log2;
  }

 private:
  __device__ KeyWords load_half(int u) const {
    return this->load_words(u / 2 * 128 + lane % 4 * 32 + u % 2 * 16);
  }
};

}  // namespace flash_mla::sm90::raw_rows
