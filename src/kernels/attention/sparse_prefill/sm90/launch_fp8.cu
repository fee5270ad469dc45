// The sparse prefill kernel for bfloat16 queries over FP8 caches.

#include "kernels/attention/sparse_prefill/sm90/launch.cuh"

namespace flash_mla::sm90::sparse_prefill {

template Launch of_fp8<true>(KvFormat);

}  // namespace flash_mla::sm90::sparse_prefill
