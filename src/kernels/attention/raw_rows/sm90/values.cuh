#pragma once

// The two warpgroups of values: O^T += V^T P^T, 256 columns each, as four instructions of 64 (columns.cuh).

#include <cstdint>

#include "kernels/attention/raw_rows/sm90/columns.cuh"
#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace flash_mla::sm90::raw_rows {

template <int kHeads, class F, class Work, int kWg>
struct Values {
  static constexpr int kSums = kHeads / 2;
  /// Instructions that are made at a time, and sets of registers for them. With 64 heads ptxas would have no more: it
  /// counts them against the registers of the start.
  static constexpr int kUnit = kHeads < 64 ? 2 : 1, kStages = kHeads < 64 ? 3 : 2;
  using S = Smem<F, kHeads>;
  using Columns = ValueColumns<F, kWg>;

  const Work& work;
  S& s;
  const int warp, lane;

  __device__ Values(const Work& w, S& smem)
      : work(w),
        s(smem),
        warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    float o[4][kSums];  // by instruction
    RingPlace<S::kRing> place(0);
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
      load_factors(factor, s.factor);
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

  // O (+)= P V of a tile: 16 instructions, of 16 keys and 64 columns each. The registers of one are filled while those
  // before it run, and its words are loaded behind the one before it.
  __device__ void add_tile(float (&o)[4][kSums], RingPlace<S::kRing>& place, int tile, bool accumulate) {
    const int buffer = tile % S::kBuffers;
    std::uint32_t a[kStages][kUnit][4];
    Columns columns(warp, lane);
    ptx::mbarrier_wait(&s.rows_full[place.slot], place.phase);
    columns.load(s, place.slot, 0);
#pragma unroll
    for (int u = 0; u < 16; u += kUnit) {
      const int step = u / 4, m = u % 4;
      auto& to = a[u / kUnit % kStages];
      if (u >= kStages * kUnit) ptx::wgmma_wait<kStages - 1>();  // kStages units ago has read its registers
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (i > 0) columns.load(s, place.slot, m + i);
        columns.widen(to[i], m + i);
      }
      if (u == 0) {
        ptx::mbarrier_wait(&s.weights_full[buffer], tile / S::kBuffers & 1);
        if (accumulate && s.rescaled[buffer] != 0) rescale(o, buffer);
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kUnit; ++i) multiply(o[m + i], to[i], buffer, m + i, step, accumulate || step > 0);
      ptx::wgmma_commit();
      if (m + kUnit == 4) {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&s.rows_empty[place.slot]);
        place.advance(1);
        if (step < 3) ptx::mbarrier_wait(&s.rows_full[place.slot], place.phase);
      }
      if (u + kUnit < 16) columns.load(s, place.slot, (m + kUnit) % 4);
    }
    ptx::wgmma_wait<0>();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&s.weights_empty[buffer]);
  }
  __device__ void multiply(float (&sums)[kSums], const std::uint32_t (&a)[4], int buffer, int m, int step,
                           bool adds) {
    auto& weights = s.weights[buffer][Columns::weight(m)];
    if (F::is_bf16_weight(Columns::weight(m), Work::kBf16)) {
      using Tile = ptx::Tile<__nv_bfloat16, kHeads, kTileKeys>;
      ptx::wgmma(sums, a, reinterpret_cast<Tile&>(weights).k_major().step(step), adds);
    } else {
      ptx::wgmma(sums, a, weights.k_major().step(step), adds);
    }
  }
  __device__ void load_factors(float (&factor)[kHeads / 4], const float* of_head) const {
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      const float2 f = *reinterpret_cast<const float2*>(&of_head[8 * j + lane % 4 * 2]);
      factor[2 * j] = f.x;
      factor[2 * j + 1] = f.y;
    }
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
    load_factors(factor, s.rescale[buffer]);
    scale(o, factor);
  }

  // ---- the end of an item

  // A split's result, as combining reads it (dense_decode/sm90/params.h): lane 4 (row % 8) + column % 8 / 2 has two
  // columns of rows `row` and `row + 8`.
  template <class Item>
  __device__ void store_partial(const Item& item, const float (&o)[4][kSums]) const {
    float4* const to = work.partial(item);
    const int groups = work.row_groups();
    const Columns columns(warp, lane);
#pragma unroll
    for (int j = 0; j < kHeads / 8; j += 2) {
      if (j / 2 >= groups) break;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = columns.first(m), place = (lane % 4 * 2 + e) * 4 + column % 8 / 2;
          to[((j / 2 * 2 + kWg) * 32 + column / 8) * 32 + place] =
              float4{o[m][4 * j + e], o[m][4 * j + 2 + e], o[m][4 * j + 4 + e], o[m][4 * j + 6 + e]};
        }
      }
    }
  }
  template <class Item>
  __device__ void store(const Item& item, const float (&o)[4][kSums]) const {
    const Columns columns(warp, lane);
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        std::uint16_t* const to = work.out_row(item, 8 * j + lane % 4 * 2 + e);
        if (to == nullptr) continue;
        const auto pair = [&](int m) { return pack2<Work::kBf16>(o[m][4 * j + e], o[m][4 * j + 2 + e]); };
#pragma unroll
        for (int m = 0; m < 4; m += 2) {
          std::uint16_t* const at = to + kWg * 256 + columns.first(m);
          if (Columns::are_four(m)) {
            *reinterpret_cast<uint2*>(at) = uint2{pair(m), pair(m + 1)};
          } else {
            *reinterpret_cast<std::uint32_t*>(at) = pair(m);
            *reinterpret_cast<std::uint32_t*>(to + kWg * 256 + columns.first(m + 1)) = pair(m + 1);
          }
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

}  // namespace flash_mla::sm90::raw_rows
