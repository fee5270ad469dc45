#pragma once

#include <cuda.h>

#include "flash_mla/kv_cache.h"
#include "kernels/attention/dense_decode/sm90/plan.h"
#include "kernels/attention/sparse_decode/sm90/params.h"

namespace flash_mla::sm90 {

/// Decode without combine; the lists of `params` are of caches of this format.
void launch_sparse_decode(const SparseDecodeParams& params, const TensorView& q, const CUtensorMap& q_map,
                          KvFormat format, const DecodePlan& plan, void* stream);

}  // namespace flash_mla::sm90
