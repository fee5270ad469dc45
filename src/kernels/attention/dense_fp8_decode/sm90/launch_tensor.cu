// The kernels over rows of e4m3 with one scale for all.

#include "kernels/attention/dense_fp8_decode/sm90/launch.cuh"

namespace flash_mla::sm90::dense_fp8 {

template void launch_format<raw_rows::TensorRows>(const DenseFp8Params&, const QueryView&, bool,
                                                  const DecodePlan&, cudaStream_t);

}  // namespace flash_mla::sm90::dense_fp8
