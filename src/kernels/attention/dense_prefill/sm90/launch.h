#pragma once

#include <cuda.h>

#include "kernels/attention/dense_prefill/sm90/params.h"

namespace flash_mla::sm90::prefill {

/// At most `max_items` items on `sms` multiprocessors; clears params.taken, which may be left out of use.
void launch(const Params& params, const CUtensorMap& q, const CUtensorMap& k_nope, const CUtensorMap& k_rope,
            const CUtensorMap& v, bool bf16, std::int64_t max_items, int sms, void* stream);

}  // namespace flash_mla::sm90::prefill
