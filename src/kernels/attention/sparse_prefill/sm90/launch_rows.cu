// The sparse prefill kernel for bfloat16 queries over a bfloat16 cache.

#include "kernels/attention/sparse_prefill/sm90/launch.cuh"

namespace flash_mla::sm90::sparse_prefill {

template Launch of_rows<true>(int);

}  // namespace flash_mla::sm90::sparse_prefill
