// The sparse prefill kernel for float16 queries.

#include "kernels/attention/sparse_prefill/sm90/launch.cuh"

namespace flash_mla::sm90::sparse_prefill {

template Launch of_rows<false>(int);

}  // namespace flash_mla::sm90::sparse_prefill
