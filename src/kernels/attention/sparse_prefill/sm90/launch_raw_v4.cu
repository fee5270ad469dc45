// The sparse prefill kernel over V4's rows as they lie in the cache.

#include "kernels/attention/sparse_prefill/sm90/launch.cuh"

namespace flash_mla::sm90::sparse_prefill {

template Launch of_raw_rows<raw_rows::V4Rows, true>(int);
template Launch of_raw_rows<raw_rows::V4Rows, false>(int);

}  // namespace flash_mla::sm90::sparse_prefill
