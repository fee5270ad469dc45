#pragma once

// The two warpgroups of values: O^T += V^T P^T, 256 columns each, two blocks of 128.
//
// Of a block the thread of lane 4 g + c of warp w has columns 32 w + 4 g to 32 w + 4 g + 3, one load of a key's row: the
// first two are its rows in one instruction's 64, the others in another's. A load of each of two keys and one byte
// permutation give the pairs of two keys that A's registers hold; their conversion is exact, for scales are in P.

#include <cstdint>

#include "kernels/attention/fp8_decode/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace flash_mla::sm90::fp8_decode {

template <int kHeads, class Work, int kWg>
struct Values {
  static constexpr int kSums = kHeads / 2;

  const Work& work;
  Smem<kHeads>& s;
  const int warp, lane;

  __device__ Values(const Work& w, Smem<kHeads>& smem)
      : work(w),
        s(smem),
        warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    float o[4][kSums];  // by 2 * block + pair of columns
    RingPlace<kHeads> place(0);
    int tiles = 0, items = 0;
    const auto walk = work.walk();
    for (auto item = walk.first(); walk.holds(item); item = walk.next(item)) {
      if (item.begin_block >= item.end_block) {
        if (!item.is_split) store_zeros(item);
        continue;
      }
      for (int tile = item.begin_block; tile < item.end_block; ++tile, ++tiles) {
        add_tile(o, place, tiles, tile > item.begin_block);
      }
      ptx::mbarrier_wait(&s.end_full, items++ & 1);
      float factor[kHeads / 4];
#pragma unroll
      for (int j = 0; j < kHeads / 8; ++j) {
        const float2 f = *reinterpret_cast<const float2*>(&s.factor[8 * j + lane % 4 * 2]);
        factor[2 * j] = f.x;
        factor[2 * j + 1] = f.y;
      }
      scale(o, factor);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&s.end_empty);
      if (item.is_split) {
        store_partial(item, o);
      } else {
        store(item, o);
      }
    }
  }

  // A of two instructions: 16 keys, the two pairs of columns of a block.
  __device__ void load_values(std::uint32_t (&a)[2][4], int slot, int block) const {
    const std::uint32_t at = ptx::smem_address(s.rows[slot]) + lane % 4 * 2 * kRowStride +
                             (2 * kWg + block) * 128 + warp * 32 + lane / 4 * 4;
    const std::uint32_t k0 = load_shared_4(at), k1 = load_shared_4(at + kRowStride),
                        k8 = load_shared_4(at + 8 * kRowStride), k9 = load_shared_4(at + 9 * kRowStride);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const std::uint32_t low = __byte_perm(k0, k1, pair == 0 ? 0x5140 : 0x7362);
      const std::uint32_t high = __byte_perm(k8, k9, pair == 0 ? 0x5140 : 0x7362);
      a[pair][0] = widen_low(low);
      a[pair][1] = widen_high(low);
      a[pair][2] = widen_low(high);
      a[pair][3] = widen_high(high);
    }
  }

  // O (+)= P V of a tile: eight units of two instructions, of 16 keys and a block each. A unit is made while the one
  // before it runs.
  __device__ void add_tile(float (&o)[4][kSums], RingPlace<kHeads>& place, int tile, bool accumulate) {
    const int buffer = tile % kWeightBuffers<kHeads>;
    std::uint32_t a[2][2][4];
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      const int step = u / 2, block = u % 2;
      if (u >= 2) ptx::wgmma_wait<1>();  // unit u - 2 has read its registers
      if (block == 0) ptx::mbarrier_wait(&s.rows_full[place.slot], place.phase);
      load_values(a[u % 2], place.slot, block);
      if (block == 1) {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&s.rows_empty[place.slot]);
        place.advance(1);
      }
      if (u == 0) {
        ptx::mbarrier_wait(&s.weights_full[buffer], tile / kWeightBuffers<kHeads> & 1);
        if (accumulate && s.rescaled[buffer] != 0) rescale(o, buffer);
      }
      const auto weights = s.weights[buffer][2 * kWg + block].k_major().step(step);
      ptx::wgmma_fence();
      ptx::wgmma(o[2 * block], a[u % 2][0], weights, accumulate || step > 0);
      ptx::wgmma(o[2 * block + 1], a[u % 2][1], weights, accumulate || step > 0);
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
    if (lane == 0) ptx::mbarrier_arrive(&s.weights_empty[buffer]);
  }
  __device__ static void scale(float (&o)[4][kSums], const float (&factor)[kHeads / 4]) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) o[m][i] *= factor[i / 4 * 2 + i % 2];
    }
  }
  __device__ void rescale(float (&o)[4][kSums], int buffer) {
    float factor[kHeads / 4];
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      const float2 f = *reinterpret_cast<const float2*>(&s.rescale[buffer][8 * j + lane % 4 * 2]);
      factor[2 * j] = f.x;
      factor[2 * j + 1] = f.y;
    }
    scale(o, factor);
  }

  // ---- the end of an item

  // A split's result, as combining reads it (dense_decode/sm90/params.h): lane 4 (row % 8) + column % 8 / 2 has two
  // columns of rows `row` and `row + 8`.
  template <class Item>
  __device__ void store_partial(const Item& item, const float (&o)[4][kSums]) const {
    float4* const to = work.partial(item);
    const int groups = work.row_groups();
#pragma unroll
    for (int j = 0; j < kHeads / 8; j += 2) {
      if (j / 2 >= groups) break;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int columns = m / 2 * 16 + warp * 4 + lane / 8;
          const int place = (lane % 4 * 2 + e) * 4 + lane / 4 % 2 * 2 + m % 2;
          to[((j / 2 * 2 + kWg) * 32 + columns) * 32 + place] =
              float4{o[m][4 * j + e], o[m][4 * j + 2 + e], o[m][4 * j + 4 + e], o[m][4 * j + 6 + e]};
        }
      }
    }
  }
  template <class Item>
  __device__ void store(const Item& item, const float (&o)[4][kSums]) const {
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        std::uint16_t* const to = work.out_row(item, 8 * j + lane % 4 * 2 + e);
        if (to == nullptr) continue;
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          const float *x = o[2 * block], *y = o[2 * block + 1];
          *reinterpret_cast<uint2*>(to + kWg * 256 + block * 128 + warp * 32 + lane / 4 * 4) =
              uint2{pack2<true>(x[4 * j + e], x[4 * j + 2 + e]), pack2<true>(y[4 * j + e], y[4 * j + 2 + e])};
        }
      }
    }
  }
  template <class Item>
  __device__ void store_zeros(const Item& item) const {
    for (int row = warp; row < kHeads; row += kWarpsOfGroup) {
      std::uint16_t* const to = work.out_row(item, row);
      if (to != nullptr) *reinterpret_cast<uint4*>(to + kWg * 256 + lane * 8) = uint4{0, 0, 0, 0};
    }
  }
};

}  // namespace flash_mla::sm90::fp8_decode
