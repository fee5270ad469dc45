// The sparse prefill kernel over rows of e4m3 with one scale for all.

#include "kernels/attention/sparse_prefill/sm90/launch.cuh"

namespace flash_mla::sm90::sparse_prefill {

template Launch of_raw_rows<raw_rows::TensorRows, true>(int);
template Launch of_raw_rows<raw_rows::TensorRows, false>(int);

}  // namespace flash_mla::sm90::sparse_prefill
