#pragma once

// What the consumers do with a finished item. Warpgroup wg holds columns 256 wg to + 255 of O, transposed: lane 4 g + t
// of warp w has of columns value_column(wg, w, g) to + 7, number 2 i + c, and of heads 8 n + 2 t + b the element
// o[i][4 n + 2 c + b]. A row goes out 16 bytes a lane; a split's share goes to the workspace as dense decode leaves it
// (DecodeParams), for the same combine kernel.

#include <cstdint>

#include "kernels/attention/dense_fp8_decode/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"

namespace flash_mla::sm90::dense_fp8 {

template <bool kBf16, int kHeads, int kWg>
struct Epilogue {
  static constexpr int kGroups = kHeads / 8;
  using Out = float[4][kHeads / 2];

  const DenseFp8Params& p;
  Smem<kHeads>& s;
  const int warp, g, t;

  /// `sum`: of the weights of this warpgroup's tiles, of the heads that this lane keeps.
  __device__ void finish(const Item& item, const Out& o, const float (&sum)[2]) const {
    const int head = 8 * kept_group<kHeads>(g) + 2 * t;
    *reinterpret_cast<float2*>(&s.warp_sum[kWg * 4 + warp][head]) = float2{sum[0], sum[1]};
    ptx::named_barrier_sync<kItem, kConsumerThreads>();
    const int row = static_cast<int>(threadIdx.x);
    if (row < kHeads) finish_row(item, row);
    if (item.is_split) {
      store_partial(item, o);
      return;
    }
    ptx::named_barrier_sync<kItem, kConsumerThreads>();
    store(o);
  }

  /// A request without keys.
  __device__ void store_empty(const Item& item) const {
    const int row = static_cast<int>(threadIdx.x) / 4, quarter = static_cast<int>(threadIdx.x) % 4;
    if (item.is_split) {
      if (quarter == 0 && row < row_groups(p.blocks) * 16) stats_of(item, row) = float2{-INFINITY, 0.0f};
      return;
    }
    std::uint16_t* const to = out_row(item, row);
    if (to == nullptr) return;
    if (quarter == 0) store_lse(item, row, INFINITY);
    for (int i = 0; i < 128; i += 8) *reinterpret_cast<uint4*>(to + quarter * 128 + i) = uint4{0, 0, 0, 0};
  }

 private:
  // Where row `row` of this CTA's block goes, null if it is padding.
  __device__ std::uint16_t* out_row(const Item& item, int row) const {
    const RowPlace place = place_of(p.blocks, static_cast<int>(blockIdx.x), row);
    if (row >= p.blocks.tokens * p.blocks.heads || place.token >= p.s_q || place.head >= p.group)
      return nullptr;
    return static_cast<std::uint16_t*>(p.out) + item.req * p.out_stride_b + place.token * p.out_stride_s +
           place.head * p.out_stride_h;
  }
  __device__ void store_lse(const Item& item, int row, float lse) const {
    if (p.lse == nullptr) return;
    const RowPlace place = place_of(p.blocks, static_cast<int>(blockIdx.x), row);
    p.lse[item.req * p.lse_stride_b + place.head * p.lse_stride_h + place.token * p.lse_stride_s] = lse;
  }
  __device__ std::int64_t partial_block(const Item& item) const {
    return static_cast<std::int64_t>(item.slot) * p.blocks.count() + blockIdx.x;
  }
  __device__ float2& stats_of(const Item& item, int row) const {
    return reinterpret_cast<float2*>(p.partial_stats)[partial_block(item) * row_groups(p.blocks) * 16 + row];
  }

  // By one thread for each row: all sums, in the same order whatever the warps did.
  __device__ void finish_row(const Item& item, int row) const {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kConsumerWarps; ++w) sum += s.warp_sum[w][row];
    const float reference = s.reference[row];
    if (item.is_split) {
      if (row < row_groups(p.blocks) * 16) stats_of(item, row) = float2{reference, sum};
      return;
    }
    // A row that saw no key gives 0 and lse = +inf. One whose every score is -inf gives NaN, as NaN scores do.
    const bool none = sum == 0.0f, unseen = none && s.limit[row] <= 0;
    std::uint16_t* const to = out_row(item, row);
    s.out_row[row] = to;
    s.out_factor[row] = unseen ? 0.0f : none ? NAN : p.cache_scale / sum;
    if (to != nullptr) {
      store_lse(item, row, unseen ? INFINITY : none ? NAN : (reference + log2_fast(sum)) * 0.69314718056f);
    }
  }

  __device__ void store(const Out& o) const {
    const int column = value_column(kWg, warp, g);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int row = 8 * n + 2 * t + b;
        std::uint16_t* const to = s.out_row[row];
        if (to == nullptr) continue;
        const float factor = s.out_factor[row];
        std::uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[i] = pack2<kBf16>(o[i][4 * n + b] * factor, o[i][4 * n + 2 + b] * factor);
        *reinterpret_cast<uint4*>(to + column) = uint4{x[0], x[1], x[2], x[3]};
      }
    }
  }

  // Group of columns value_column / 8 of the warpgroup's: lane 4 (row % 8) + i of kFragment's has columns 2 i and
  // 2 i + 1 of rows `row` and `row` + 8.
  __device__ void store_partial(const Item& item, const Out& o) const {
    const int groups = row_groups(p.blocks);
    const std::int64_t block = partial_block(item);
    const float factor = p.cache_scale;
#pragma unroll
    for (int n = 0; n < kGroups; n += 2) {
      if (n / 2 >= groups) break;
      float4* const to = reinterpret_cast<float4*>(p.partial_out) +
                         ((block * groups + n / 2) * 2 + kWg) * kFragment + (warp * 8 + g) * 32;
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[4 * (2 * t + b) + i] =
              float4{o[i][4 * n + b] * factor, o[i][4 * n + 2 + b] * factor, o[i][4 * (n + 1) + b] * factor,
                     o[i][4 * (n + 1) + 2 + b] * factor};
        }
      }
    }
  }
};

}  // namespace flash_mla::sm90::dense_fp8
