#pragma once

#include "flash_mla/kv_cache.h"
#include "flash_mla/tensor.h"
#include "kernels/attention/dense_decode/sm90/plan.h"
#include "kernels/attention/dense_fp8_decode/sm90/params.h"

namespace flash_mla::sm90 {

/// Decode over a cache of `format`, kFp8V32 or kFp8Tensor, and with more than one part dense decode's combine.
void launch_dense_fp8_decode(const DenseFp8Params& params, const TensorView& q, KvFormat format,
                             const DecodePlan& plan, void* stream);

}  // namespace flash_mla::sm90
