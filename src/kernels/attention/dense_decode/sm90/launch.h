#pragma once

#include <cuda.h>

#include "kernels/attention/dense_decode/sm90/plan.h"

namespace flash_mla::sm90 {

struct DecodeMaps {
  CUtensorMap q, q_rope;   ///< the latter of Q's last chunk, where copies bring one each; may be the former
  CUtensorMap k, k_piece;  ///< see producer.cuh
  CUtensorMap out;
  int q_rope_chunk;  ///< where that chunk lies in its map
};

/// Decode and, with more than one part, combine.
void launch_dense_decode(const DecodeParams& params, const DecodeMaps& maps, bool bf16,
                         const DecodePlan& plan, void* stream);

/// Combine alone, for a kernel that leaves partial results as dense decode does.
void launch_combine_parts(const DecodeParams& params, bool bf16, const DecodePlan& plan, void* stream);

/// The same for lists, for a kernel that leaves partial results of bfloat16 rows as dense decode does. A row of no
/// weight has seen no key: p.cache_seqlens is not read.
void launch_combine_lists(const DecodeParams& params, const ListsOfCombine& lists, bool bf16,
                          const DecodePlan& plan, void* stream);

}  // namespace flash_mla::sm90
