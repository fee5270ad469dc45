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

  // A thread's four columns of a block, of its four of 16 keys.
  struct Words {
    std::uint32_t key[4];
  };
  __device__ Words load_words(int slot, int block) const {
    const std::uint32_t at = ptx::smem_address(s.rows[slot]) + lane % 4 * 2 * kRowStride +
                             (2 * kWg + block) * 128 + warp * 32 + lane / 4 * 4;
    return {ptx::load_shared<std::uint32_t>(at), ptx::load_shared<std::uint32_t>(at + kRowStride),
            ptx::load_shared<std::uint32_t>(at + 8 * kRowStride),
            ptx::load_shared<std::uint32_t>(at + 9 * kRowStride)};
  }
  // A of the first (pair 0) or the last two columns.
  __device__ static void widen(std::uint32_t (&a)[4], const Words& w, int pair) {
    const std::uint32_t low = __byte_perm(w.key[0], w.key[1], pair == 0 ? 0x5140 : 0x7362);
    const std::uint32_t high = __byte_perm(w.key[2], w.key[3], pair == 0 ? 0x5140 : 0x7362);
    a[0] = widen_low(low);
    a[1] = widen_high(low);
    a[2] = widen_low(high);
    a[3] = widen_high(high);
  }

  // O (+)= P V of a tile: 16 instructions, of 16 keys, a block and a pair of its columns each. The registers of one are
  // filled while the one before it runs; more on their way at a time than two, ptxas would not have (it counts them
  // against the 128 registers of the start).
  __device__ void add_tile(float (&o)[4][kSums], RingPlace<kHeads>& place, int tile, bool accumulate) {
    const int buffer = tile % kWeightBuffers<kHeads>;
    std::uint32_t a[2][4];
    Words w;
#pragma unroll
    for (int u = 0; u < 16; ++u) {
      const int step = u / 4, block = u / 2 % 2, pair = u % 2;
      if (u % 4 == 0) ptx::mbarrier_wait(&s.rows_full[place.slot], place.phase);
      if (pair == 0) w = load_words(place.slot, block);
      if (u >= 2) ptx::wgmma_wait<1>();  // unit u - 2 has read its registers
      widen(a[pair], w, pair);
      if (u % 4 == 3) {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&s.rows_empty[place.slot]);
        place.advance(1);
      }
      if (u == 0) {
        ptx::mbarrier_wait(&s.weights_full[buffer], tile / kWeightBuffers<kHeads> & 1);
        if (accumulate && s.rescaled[buffer] != 0) rescale(o, buffer);
      }
      ptx::wgmma_fence();
      ptx::wgmma(o[2 * block + pair], a[pair], s.weights[buffer][2 * kWg + block].k_major().step(step),
                 accumulate || step > 0);
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
              uint2{pack2<Work::kBf16>(x[4 * j + e], x[4 * j + 2 + e]),
                    pack2<Work::kBf16>(y[4 * j + e], y[4 * j + 2 + e])};
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
