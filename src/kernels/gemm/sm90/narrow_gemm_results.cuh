#pragma once

// Of narrow_gemm.cuh: what becomes of a tile's sums. They lie in registers as wgmma leaves them: of a warp's 16 rows of W a
// thread has lane / 4 and lane / 4 + 8, which are two neighbours of the matrix (row_of), and of every 8 rows
// of x the two from lane % 4 * 2 on: sums[4 j + 2 half + i] is of row `half` of W and row 8 j + lane % 4 * 2 + i of x.

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/gemm/sm90/narrow_gemm_tiles.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/words.cuh"
#include "kernels/quant/sm90/narrow_e4m3.cuh"

namespace flash_mla::sm90::narrow {

template <class C>
__device__ __forceinline__ void store(const Params& p, const Tile& tile, const float (&sums)[2][C::kSums],
                                      int group, int warp, int lane) {
  const NarrowGemm& g = p.gemm;
#pragma unroll
  for (int j = 0; j < C::kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 8 * j + lane % 4 * 2 + i;
      if (row >= tile.unit.count) continue;
      std::int64_t to = tile.unit.first + row;
      if (g.scatter) to = __ldcg(g.pairs + to);
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const int column = tile.column + (2 * group + block) * kBlockRows + warp * 16 + row_of<C>(lane);
        if (column >= g.n) continue;  // n is even
        const float low = sums[block][4 * j + i], high = sums[block][4 * j + 2 + i];
        const std::int64_t at = to * g.out_stride + column;
        if (g.out_fp32) {
          *reinterpret_cast<float2*>(static_cast<float*>(g.out) + at) = make_float2(low, high);
        } else {
          *reinterpret_cast<std::uint32_t*>(static_cast<__nv_bfloat16*>(g.out) + at) = pack2<true>(low, high);
        }
      }
    }
  }
}

__device__ __forceinline__ float activate(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

/// silu(gate) * up in bfloat16.
template <class C>
__device__ __forceinline__ void store_activated(const Params& p, const Tile& tile,
                                                const float (&sums)[2][C::kSums], int group, int warp,
                                                int lane) {
  const NarrowGemm& g = p.gemm;
  const int column = tile.column + group * kBlockRows + warp * 16 + row_of<C>(lane);
  if (column >= g.n / 2) return;  // n / 2 is even
#pragma unroll
  for (int j = 0; j < C::kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 8 * j + lane % 4 * 2 + i;
      if (row >= tile.unit.count) continue;
      std::int64_t to = tile.unit.first + row;
      if (g.scatter) to = __ldcg(g.pairs + to);
      *reinterpret_cast<std::uint32_t*>(static_cast<__nv_bfloat16*>(g.out) + to * g.out_stride + column) =
          pack2<true>(activate(sums[0][4 * j + i], sums[1][4 * j + i]),
                      activate(sums[0][4 * j + 2 + i], sums[1][4 * j + 2 + i]));
    }
  }
}

/// Over the lanes that have the same rows of x.
template <class F>
__device__ __forceinline__ float over_outputs(float x, const F& f) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x = f(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}

/// silu(gate) * up of the tile's 128 outputs, quantised for the next product. `parity`: of the tile's number.
template <class C>
__device__ __forceinline__ void store_quantised(const Params& p, Shared<C>& s, const Tile& tile,
                                                float (&sums)[2][C::kSums], int parity, int group, int warp,
                                                int lane) {
  const NarrowGemm& g = p.gemm;
  const auto most = [](float a, float b) { return fmaxf(a, b); };
  const auto sum = [](float a, float b) { return a + b; };
  const int outputs = static_cast<int>(g.n) / 2, warp_of_all = 4 * group + warp;
  const int own = group * kBlockRows + warp * 16 + row_of<C>(lane);  // first of the thread's two outputs
  const bool inside = tile.column + own < outputs;
  float(&act)[C::kSums] = sums[0];
#pragma unroll
  for (int j = 0; j < C::kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      act[4 * j + i] = inside ? activate(act[4 * j + i], sums[1][4 * j + i]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float highest = over_outputs(fmaxf(fabsf(act[4 * j + i]), fabsf(act[4 * j + 2 + i])), most);
      if (lane / 4 == 0) s.highest[parity][warp_of_all][8 * j + lane * 2 + i] = highest;
    }
  }
  ptx::named_barrier_sync<1, 2 * kWarpgroup>();
  const std::int64_t width = (outputs + 127) / 128, block = tile.column / 128;
  const int place = int4_order(own);  // its neighbour's is two further
  auto* const codes_out = static_cast<std::uint8_t*>(g.out);
#pragma unroll
  for (int j = 0; j < C::kGroups; ++j) {
    std::uint32_t codes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 8 * j + lane % 4 * 2 + i;
      float highest = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, s.highest[parity][w][row]);
      const float scale = fmaxf(highest * (1.0f / kLargest), kLeastScale), factor = 1.0f / scale;
      const std::uint16_t pair = narrow_e4m3(act[4 * j + i] * factor, act[4 * j + 2 + i] * factor);
      const std::uint32_t wide = ptx::widen_e4m3(pair);
      const float2 values = __half22float2(reinterpret_cast<const __half2&>(wide));
      const float total = over_outputs(values.x + values.y, sum);
      if (lane / 4 == 0) s.code_sums[parity][warp_of_all][row] = total;
      codes[i] = (pair & 0xFFu) | static_cast<std::uint32_t>(pair >> 8) << 16;
      if (warp_of_all == 0 && lane / 4 == 0 && row < tile.unit.count)
        g.out_scales[(tile.unit.first + row) * width + block] = scale;
    }
    // Two lanes have the bytes between: each makes a word of one row of x.
    const bool second = (lane / 4 & 2) != 0;
    const std::uint32_t other = __shfl_xor_sync(~0u, second ? codes[0] : codes[1], 8);
    const std::uint32_t word = second ? other | codes[1] << 8 : codes[0] | other << 8;
    const int row = 8 * j + lane % 4 * 2 + (second ? 1 : 0);
    if (row < tile.unit.count) {
      *reinterpret_cast<std::uint32_t*>(codes_out + ((tile.unit.first + row) * width + block) * kStepK +
                                        place / 4 * 4) = word;
    }
  }
  ptx::named_barrier_sync<1, 2 * kWarpgroup>();
  for (int row = static_cast<int>(threadIdx.x); row < min(C::kRows, tile.unit.count); row += 2 * kWarpgroup) {
    float total = 0.0f, highest = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      total += s.code_sums[parity][w][row];
      highest = fmaxf(highest, s.highest[parity][w][row]);
    }
    const float scale = fmaxf(highest * (1.0f / kLargest), kLeastScale);
    g.out_offsets[(tile.unit.first + row) * width + block] = 8.0f * scale * total;
  }
}

}  // namespace flash_mla::sm90::narrow
