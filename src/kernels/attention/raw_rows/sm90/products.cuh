#pragma once

// S^T = K Q^T of a tile of 64 keys for a warpgroup, by formats of rows.
//
// Warp w has keys 16 w to 16 w + 15, a slot of the ring; the thread of lane 4 g + c has keys g and g + 8 of them and, of
// every eight heads, 2 c and 2 c + 1. It loads 16 bytes of a row at a time (query.cuh says which; the eight lanes of a
// load's phase hit all banks) and takes four bytes of e4m3, or two words of 16-bit elements, for an instruction's k.
// A unit of two instructions is made while the one before it runs.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/raw_rows/sm90/query.cuh"
#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace flash_mla::sm90::raw_rows {

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
struct KeyProducts;

/// Scales are applied to the sums of a block, in fp32.
template <int kHeads, bool kBf16>
struct KeyProducts<V32Rows, kHeads, kBf16> : KeyProductsBase<V32Rows, kHeads, kBf16> {
  using F = V32Rows;
  using Base = KeyProductsBase<F, kHeads, kBf16>;
  using Base::Base, Base::kSums, Base::s, Base::rows, Base::widen;

  // x = scale_log2 q k: 16 units for the latent, two for the rope part.
  __device__ void score(float (&x)[kSums], KeyScales<F>& scales, float scale_log2) const {
    float sums[kSums];
    std::uint32_t a[2][2][4];
    const auto q = s.q.k_major();
    KeyWords w = this->load_e4m3(0);
    load_scales(scales);
#pragma unroll
    for (int u = 0; u < 16; ++u) {
      const int b = u / 4;
      if (u >= 2) ptx::wgmma_wait<1>();  // unit u - 2 has read its registers
      if (u % 2 == 0) {
        widen(a[0][0], w.first.x, w.second.x);
        widen(a[0][1], w.first.y, w.second.y);
      } else {
        widen(a[1][0], w.first.z, w.second.z);
        widen(a[1][1], w.first.w, w.second.w);
        w = u < 15 ? this->load_e4m3((u + 1) / 2) : this->load_rope(0);
      }
      if (u % 4 == 0 && u > 0) add_block(x, sums, scales, b - 1);
      ptx::wgmma_fence();
      ptx::wgmma(sums, a[u % 2][0], q.step(2 * u), u % 4 > 0);
      ptx::wgmma(sums, a[u % 2][1], q.step(2 * u + 1), true);
      ptx::wgmma_commit();
    }
    add_block(x, sums, scales, 3);
    this->multiply_rope(sums, w);
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      const float2 f = this->factors(j, scale_log2);
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) x[i] *= i % 2 == 0 ? f.x : f.y;
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] = fmaf(sums[i], scale_log2, x[i]);
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
  // x (+)= scale * sums of block b, once they are there.
  __device__ void add_block(float (&x)[kSums], const float (&sums)[kSums], const KeyScales<F>& scales,
                            int b) const {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float f = scales.of[i % 4 / 2][b];
      x[i] = b == 0 ? sums[i] * f : fmaf(sums[i], f, x[i]);
    }
  }
};

/// Elements are widened to fp16 against 2^-6 of the key's largest scale.
template <int kHeads, bool kBf16>
struct KeyProducts<V4Rows, kHeads, kBf16> : KeyProductsBase<V4Rows, kHeads, kBf16> {
  using F = V4Rows;
  using Base = KeyProductsBase<F, kHeads, kBf16>;
  using Base::Base, Base::kSums, Base::lane, Base::s, Base::slot;

  // x = scale_log2 q k: 14 units for e4m3, two for the rope part.
  __device__ void score(float (&x)[kSums], KeyScales<F>& scales, float scale_log2) const {
    float sums[kSums];
    std::uint32_t a[2][2][4], powers[2][4];
    const auto q = s.q.k_major();
    KeyWords w = this->load_e4m3(0);
    load_scales(scales, powers);
#pragma unroll
    for (int u = 0; u < 14; ++u) {
      const int pair = u / 4;            // of chunks
      if (u >= 2) ptx::wgmma_wait<1>();  // unit u - 2 has read its registers
      if (u % 2 == 0) {
        widen(a[0][0], w.first.x, w.second.x, powers, pair);
        widen(a[0][1], w.first.y, w.second.y, powers, pair);
      } else {
        widen(a[1][0], w.first.z, w.second.z, powers, pair);
        widen(a[1][1], w.first.w, w.second.w, powers, pair);
        w = u < 13 ? this->load_e4m3((u + 1) / 2) : this->load_rope(0);
      }
      ptx::wgmma_fence();
      ptx::wgmma(x, a[u % 2][0], q.step(2 * u), u > 0);
      ptx::wgmma(x, a[u % 2][1], q.step(2 * u + 1), true);
      ptx::wgmma_commit();
    }
    this->multiply_rope(sums, w);
    ptx::wgmma_wait<1>();
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      const float2 f = this->factors(j, scale_log2);
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) x[i] *= scales.of[i % 4 / 2][0] * (i % 2 == 0 ? f.x : f.y);
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] = fmaf(sums[i], scale_log2, x[i]);
  }

 private:
  // powers[h][i], twice: what key h's elements of this thread in the i-th two chunks are multiplied with.
  __device__ void load_scales(KeyScales<F>& scales, std::uint32_t (&powers)[2][4]) const {
    const ScaleTable& table = s.scales[slot];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = lane / 4 + 8 * h;
      scales.of[h][0] = table.of_key[key];
#pragma unroll
      for (int i = 0; i < 4; ++i) powers[h][i] = table.of[i == 3 ? 6 : 2 * i + lane % 4 / 2][key] * 0x10001u;
    }
    this->find_known(scales);
  }
  __device__ static void widen(std::uint32_t (&a)[4], std::uint32_t first, std::uint32_t second,
                               const std::uint32_t (&powers)[2][4], int pair) {
    Base::widen(a, first, second);
    a[0] = times(a[0], powers[0][pair]);
    a[1] = times(a[1], powers[1][pair]);
    a[2] = times(a[2], powers[0][pair]);
    a[3] = times(a[3], powers[1][pair]);
  }
};

template <int kHeads, bool kBf16>
struct KeyProducts<TensorRows, kHeads, kBf16> : KeyProductsBase<TensorRows, kHeads, kBf16> {
  using F = TensorRows;
  using Base = KeyProductsBase<F, kHeads, kBf16>;
  using Base::Base, Base::kSums, Base::s, Base::widen;

  // x = scale_log2 q k, in 18 units.
  __device__ void score(float (&x)[kSums], KeyScales<F>& scales, float scale_log2) const {
    std::uint32_t a[2][2][4];
    const auto q = s.q.k_major();
    this->find_known(scales);
    KeyWords w = this->load_e4m3(0);
#pragma unroll
    for (int u = 0; u < 18; ++u) {
      if (u >= 2) ptx::wgmma_wait<1>();  // unit u - 2 has read its registers
      if (u % 2 == 0) {
        widen(a[0][0], w.first.x, w.second.x);
        widen(a[0][1], w.first.y, w.second.y);
      } else {
        widen(a[1][0], w.first.z, w.second.z);
        widen(a[1][1], w.first.w, w.second.w);
        if (u < 17) w = this->load_e4m3((u + 1) / 2);
      }
      if (u == 17) this->release();
      ptx::wgmma_fence();
      ptx::wgmma(x, a[u % 2][0], q.step(2 * u), u > 0);
      ptx::wgmma(x, a[u % 2][1], q.step(2 * u + 1), true);
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      const float2 f = this->factors(j, scale_log2);
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) x[i] *= i % 2 == 0 ? f.x : f.y;
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
      if (u + 1 == kUnits) break;
      if (u > 0) ptx::wgmma_wait<1>();  // unit u - 1 has read its registers
      w[(u + 1) % 2] = load_half(u + 1);
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
