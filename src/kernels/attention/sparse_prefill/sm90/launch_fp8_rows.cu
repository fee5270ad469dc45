// The sparse prefill kernel over 656-byte rows.

#include "kernels/attention/sparse_prefill/sm90/launch.cuh"

namespace flash_mla::sm90::sparse_prefill {

template Launch of_fp8_rows<true, true>(int);
template Launch of_fp8_rows<true, false>(int);
template Launch of_fp8_rows<false, true>(int);

}  // namespace flash_mla::sm90::sparse_prefill
