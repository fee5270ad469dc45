#pragma once

// Of fp8_gemm.cuh: what becomes of a tile's sums. They lie in registers as wgmma leaves them: of 64 rows a thread has
// rows lane / 4 and lane / 4 + 8 of its warp's 16, and of every 8 columns the two from lane % 4 * 2 on.

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/gemm/sm90/fp8_gemm_tiles.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/quant/sm90/narrow_e4m3.cuh"

namespace flash_mla::sm90::fp8 {

/// Two sums of every group of 8 columns 4 g to 4 g + 3 plus what `before` holds of them, as eight neighbours for each lane
/// of a quad: those of the group of its own number.
template <int kSums>
__device__ __forceinline__ uint4 pack_eight(const float (&sums)[kSums], int g, int half, uint4 before) {
  std::uint32_t words[4] = {before.x, before.y, before.z, before.w};
  quad_transpose(words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = 4 * (4 * g + i) + 2 * half;
    words[i] = pack2<true>(sums[at] + __uint_as_float(words[i] << 16),
                           sums[at + 1] + __uint_as_float(words[i] & 0xFFFF0000u));
  }
  quad_transpose(words);
  return {words[0], words[1], words[2], words[3]};
}

/// Results of 64 rows from `first_row` on.
template <class C>
__device__ __forceinline__ void store(const Params& p, const Tile& tile, const float (&sums)[C::kSums],
                                      int first_row, int group, int warp, int lane) {
  const Fp8Gemm& g = p.gemm;
  const int first = tile.column + group * C::kOwnColumns;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + warp * 16 + half * 8 + lane / 4;
    const bool inside = row < tile.unit.count;
    std::int64_t to = tile.unit.first + row;
    if (inside && g.scatter) to = __ldcg(g.pairs + to);
    if (g.out_fp32) {
      float* const out = static_cast<float*>(g.out) + to * g.out_stride;
#pragma unroll
      for (int j = 0; j < C::kGroups; ++j) {
        const int column = first + 8 * j + lane % 4 * 2;
        if (!inside || column >= g.n) continue;
        auto* const at = reinterpret_cast<float2*>(out + column);
        float2 value{sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]};
        if (g.accumulate) {
          const float2 before = *at;
          value = {before.x + value.x, before.y + value.y};
        }
        *at = value;
      }
    } else {
      auto* const out = static_cast<__nv_bfloat16*>(g.out) + to * g.out_stride;
#pragma unroll
      for (int j = 0; j < C::kGroups / 4; ++j) {
        const int column = first + 32 * j + lane % 4 * 8;
        const bool valid = inside && column < g.n;
        auto* const at = reinterpret_cast<uint4*>(out + column);
        uint4 before{0, 0, 0, 0};
        if (g.accumulate && valid) before = *at;
        const uint4 value = pack_eight(sums, j, half, before);
        if (valid) *at = value;
      }
    }
  }
}

/// silu(gate) * up in place of the gate's sums; 0 beyond the last output.
template <class C>
__device__ __forceinline__ void activate(const Params& p, const Tile& tile, float (&sums)[C::kSums],
                                         int group, int lane) {
  const int outputs = static_cast<int>(p.gemm.n) / 2;
#pragma unroll
  for (int j = 0; j < C::kGroups / 2; ++j) {
    const int column = tile.column + group * 64 + 8 * j + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float gate = sums[4 * j + i];
      const float value = __fdividef(gate, 1.0f + __expf(-gate)) * sums[4 * j + i + C::kSums / 2];
      sums[4 * j + i] = column < outputs ? value : 0.0f;
    }
  }
}

/// The highest magnitude of a row in the 64 columns of a warpgroup.
template <class C>
__device__ __forceinline__ float highest_of(const float (&sums)[C::kSums], int half) {
  float best = 0.0f;
#pragma unroll
  for (int j = 0; j < C::kGroups / 2; ++j) {
    best = fmaxf(best, fmaxf(fabsf(sums[4 * j + 2 * half]), fabsf(sums[4 * j + 2 * half + 1])));
  }
  return quad_max(best);
}

/// A row's 64 columns as e4m3: 16 neighbours for each lane of a quad.
template <class C>
__device__ __forceinline__ uint4 narrow_row(const float (&sums)[C::kSums], int half, float factor) {
  std::uint32_t words[4];  // of 2 columns of group 2 i and of group 2 i + 1
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int low = 8 * i + 2 * half, high = low + 4;
    words[i] = static_cast<std::uint32_t>(narrow_e4m3(sums[low] * factor, sums[low + 1] * factor)) |
               static_cast<std::uint32_t>(narrow_e4m3(sums[high] * factor, sums[high + 1] * factor)) << 16;
  }
  quad_transpose(words);
  return {__byte_perm(words[0], words[1], 0x5410), __byte_perm(words[2], words[3], 0x5410),
          __byte_perm(words[0], words[1], 0x7632), __byte_perm(words[2], words[3], 0x7632)};
}

/// The rows of a tile, quantised in the 128 columns that it has of them. `parity`: of the tile's number.
template <class C>
__device__ __forceinline__ void store_quantised(const Params& p, Shared<C>& s, const Tile& tile,
                                                float (&sums)[2][C::kSums], int parity, int group, int warp,
                                                int lane) {
  const Fp8Gemm& g = p.gemm;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    activate<C>(p, tile, sums[m], group, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float own = highest_of<C>(sums[m], half);
      if (lane % 4 == 0) s.highest[parity][group][m * 64 + warp * 16 + half * 8 + lane / 4] = own;
    }
  }
  ptx::named_barrier_sync<1, 2 * kWarpgroup>();
  const std::int64_t outputs = g.n / 2, width = (outputs + 127) / 128;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 64 + warp * 16 + half * 8 + lane / 4;
      const float highest = fmaxf(s.highest[parity][0][row], s.highest[parity][1][row]);
      const float scale = fmaxf(highest * (1.0f / kLargest), kLeastScale);
      const uint4 codes = narrow_row<C>(sums[m], half, 1.0f / scale);
      const int column = tile.column + group * 64 + lane % 4 * 16;
      if (row >= tile.unit.count || column >= outputs) continue;
      const std::int64_t to = tile.unit.first + row;
      *reinterpret_cast<uint4*>(static_cast<std::uint8_t*>(g.out) + to * outputs + column) = codes;
      if (group == 0 && lane % 4 == 0) g.out_scales[to * width + tile.column / 128] = scale;
    }
  }
}

}  // namespace flash_mla::sm90::fp8
