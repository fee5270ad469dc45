#pragma once

// Dense decode over FP8 caches as the consumers of raw_rows see it: the rows of a CTA are heads of one or more query
// tokens, and a key is one up to the row's limit.

#include <cstdint>

#include "kernels/attention/dense_decode/sm90/work.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/params.h"
#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"

namespace flash_mla::sm90::dense_fp8 {

/// Q by its elements: rows are read by threads, not by the copy engine.
struct QueryView {
  const std::uint16_t* data;
  std::int64_t stride_b, stride_s, stride_h;
};

template <bool kIsBf16>
struct RowsWork {
  static constexpr bool kBf16 = kIsBf16;  ///< type of Q and of the output
  static constexpr bool kMaxima = false;  ///< finish_row() is told the highest score

  const DenseFp8Params& p;
  const PartRange& part;
  const QueryView& q;

  __device__ auto walk() const { return walk_of(p, part); }
  __device__ float scale_log2() const { return p.scale_log2 * p.cache_scale; }
  __device__ int row_groups() const { return sm90::row_groups(p.blocks); }

  // Query token and head of row r of this CTA's block; false if it is padding.
  __device__ bool locate(int r, RowPlace& place) const {
    place = place_of(p.blocks, static_cast<int>(blockIdx.x), r);
    return r < p.blocks.tokens * p.blocks.heads && place.token < p.s_q && place.head < p.group;
  }
  /// Eight elements of a row of Q.
  __device__ uint4 query(const Item& item, int row, int column) const {
    RowPlace place;
    if (!locate(row, place)) return {0, 0, 0, 0};
    return __ldg(reinterpret_cast<const uint4*>(q.data + item.req * q.stride_b + place.token * q.stride_s +
                                                place.head * q.stride_h + column));
  }
  /// Scores of keys that a row does not see become -inf.
  template <int kSums>
  __device__ void mask(float (&x)[kSums], const Item& item, int tile, int warp, int lane,
                       const bool (&)[2]) const {
    const int end = (tile + 1) * kTileTokens;
    if (end <= (p.causal ? item.length - p.s_q + 1 : item.length)) return;
    const int first = tile * kTileTokens + warp * raw_rows::kGroupKeys + lane / 4;
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int limit = limit_of(p, item, 8 * j + lane % 4 * 2 + e);
        if (first >= limit) x[4 * j + e] = -INFINITY;
        if (first + 8 >= limit) x[4 * j + 2 + e] = -INFINITY;
      }
    }
  }
  __device__ std::int64_t partial_block(const Item& item) const {
    return static_cast<std::int64_t>(item.slot) * p.blocks.count() + blockIdx.x;
  }
  __device__ float4* partial(const Item& item) const {
    return reinterpret_cast<float4*>(p.partial_out) + partial_block(item) * row_groups() * 2 * kFragment;
  }
  __device__ float partial_factor() const { return p.cache_scale; }
  __device__ void store_stats(const Item& item, int row, float reference, float sum) const {
    if (row >= row_groups() * 16) return;
    reinterpret_cast<float2*>(p.partial_stats)[partial_block(item) * row_groups() * 16 + row] = {reference,
                                                                                                 sum};
  }
  /// What a row's O has to be multiplied with. Stores its lse. A row that saw no key gives 0 and +inf; one whose every
  /// score is -inf gives NaN, as NaN scores do.
  __device__ float finish_row(const Item& item, int row, float reference, float sum, float) const {
    RowPlace place;
    const bool valid = locate(row, place), none = sum == 0.0f;
    const bool unseen = none && (!valid || limit_of(p, item, row) <= 0);
    if (valid && p.lse != nullptr) {
      p.lse[item.req * p.lse_stride_b + place.head * p.lse_stride_h + place.token * p.lse_stride_s] =
          unseen ? INFINITY
          : none ? NAN
                 : (reference + log2_fast(sum)) * 0.69314718056f;
    }
    return unseen ? 0.0f : none ? NAN : p.cache_scale / sum;
  }
  /// Null if the row is padding.
  __device__ std::uint16_t* out_row(const Item& item, int row) const {
    RowPlace place;
    if (!locate(row, place)) return nullptr;
    return static_cast<std::uint16_t*>(p.out) + item.req * p.out_stride_b + place.token * p.out_stride_s +
           place.head * p.out_stride_h;
  }
};

}  // namespace flash_mla::sm90::dense_fp8
