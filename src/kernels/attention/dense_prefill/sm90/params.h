#pragma once

#include <cstdint>

namespace flash_mla::sm90::prefill {

inline constexpr int kTileRows = 128;  ///< query rows of an item, half of them for each consumer warpgroup
inline constexpr int kTileKeys = 128;
inline constexpr int kHeadDim = 192, kHeadDimNope = 128, kHeadDimV = 128;

/// What the kernel needs beside the tensor maps. Strides count elements.
struct Params {
  int num_seqs, num_heads;
  int causal;
  float scale_log2;  ///< softmax_scale * log2(e)
  const std::int32_t *cu_seqlens_q, *cu_seqlens_k;
  /// Items taken beyond the first of every CTA; zero at the start. Null if there are no more items than CTAs.
  std::int32_t* taken;

  void* out;
  std::int64_t out_stride_token, out_stride_head;
  float* lse;  ///< may be null
  std::int64_t lse_stride_head, lse_stride_token;
};

}  // namespace flash_mla::sm90::prefill
