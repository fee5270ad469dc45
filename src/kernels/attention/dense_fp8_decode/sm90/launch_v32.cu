// The kernels over 656-byte rows.

#include "kernels/attention/dense_fp8_decode/sm90/launch.cuh"

namespace flash_mla::sm90::dense_fp8 {

template void launch_format<raw_rows::V32Rows>(const DenseFp8Params&, const QueryView&, bool,
                                               const DecodePlan&, cudaStream_t);

}  // namespace flash_mla::sm90::dense_fp8
