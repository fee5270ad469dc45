#pragma once

#include <cuda.h>

#include "sm90/decode/params.h"

namespace flash_mla::sm90 {

/// Decode and, with more than one part, combine.
void launch_dense_decode(const DecodeParams& params, const CUtensorMap& q_map, const CUtensorMap& k_map,
                         const CUtensorMap& k_piece_map, const CUtensorMap& out_map, bool bf16, int cluster,
                         int h_kv, void* stream);

void launch_schedule(const ScheduleParams& params, void* stream);

}  // namespace flash_mla::sm90
