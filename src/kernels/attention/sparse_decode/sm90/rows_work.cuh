#pragma once

// Sparse decode as the consumers of raw_rows see it: the rows of a CTA are up to 64 heads of one query token, and a
// key is one if its list names it.

#include <cstdint>

#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/attention/sparse_decode/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"

namespace flash_mla::sm90::sparse {

template <bool kIsBf16>
struct RowsWork {
  static constexpr bool kBf16 = kIsBf16;  ///< type of Q and of the output
  static constexpr bool kMaxima = false;  ///< finish_row() is told the highest score

  const SparseDecodeParams& p;
  const PartRange& part;
  const std::uint16_t* q;
  std::int64_t q_stride_b, q_stride_s, q_stride_h;

  __device__ auto walk() const { return walk_of(p, part); }
  __device__ float scale_log2() const { return p.scale_log2 * p.cache_scale; }
  __device__ int row_groups() const { return sm90::row_groups(p.blocks); }

  // Head of row r of this CTA's block; false if it is padding.
  __device__ bool locate(int r, int& head) const {
    head = (static_cast<int>(blockIdx.x) - token_of_block(p) * p.blocks.head_chunks) * kTileRows + r;
    return r < p.blocks.heads && head < p.h_q;
  }
  /// Eight elements of a row of Q.
  __device__ uint4 query(const Item& item, int row, int column) const {
    int head;
    if (!locate(row, head)) return {0, 0, 0, 0};
    return __ldg(reinterpret_cast<const uint4*>(q + item.req * q_stride_b + token_of_block(p) * q_stride_s +
                                                head * q_stride_h + column));
  }
  /// Scores of keys that are none become -inf.
  template <int kSums, class Item>
  __device__ void mask(float (&x)[kSums], const Item&, int, int, int, const bool (&known)[2]) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] = known[i % 4 / 2] ? x[i] : -INFINITY;
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
  /// What a row's O has to be multiplied with. Stores its lse, which knows nothing of the sink.
  __device__ float finish_row(const Item& item, int row, float reference, float sum, float) const {
    int head;
    const bool valid = locate(row, head), none = sum == 0.0f,
               unseen = reference == -INFINITY;  // else every score of the row is -inf
    if (valid && p.lse != nullptr) {
      p.lse[item.req * p.lse_stride_b + head * p.lse_stride_h + token_of_block(p) * p.lse_stride_s] =
          unseen ? INFINITY
          : none ? NAN
                 : (reference + log2_fast(sum)) * 0.69314718056f;
    }
    if (none) return unseen ? 0.0f : NAN;
    if (valid && p.attn_sink != nullptr) sum += exp2f(p.attn_sink[head] * 1.44269504089f - reference);
    return p.cache_scale / sum;
  }
  /// Null if the row is padding.
  __device__ std::uint16_t* out_row(const Item& item, int row) const {
    int head;
    if (!locate(row, head)) return nullptr;
    return static_cast<std::uint16_t*>(p.out) + item.req * p.out_stride_b +
           token_of_block(p) * p.out_stride_s + head * p.out_stride_h;
  }
};

}  // namespace flash_mla::sm90::sparse
