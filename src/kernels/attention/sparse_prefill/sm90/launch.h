#pragma once

#include <cuda.h>

#include "flash_mla/kv_cache.h"
#include "kernels/attention/sparse_prefill/sm90/params.h"

namespace flash_mla::sm90 {

/// On `sms` multiprocessors.
void launch_sparse_prefill(const SparsePrefillParams& params, const QueryView& q, const CUtensorMap& q_map,
                           const CUtensorMap& out_map, bool bf16, KvFormat format, int head_dim, int sms,
                           void* stream);

}  // namespace flash_mla::sm90
