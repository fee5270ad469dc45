#include "kernels/attention/dense_fp8_decode/sm90/launch.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/launch.h"

namespace flash_mla::sm90 {

void launch_dense_fp8_decode(const DenseFp8Params& p, const CUtensorMap& q_map, KvFormat format, bool bf16,
                             const DecodePlan& plan, void* stream) {
  const auto launch = format == KvFormat::kFp8V32 ? dense_fp8::launch_format<KvFormat::kFp8V32>
                                                  : dense_fp8::launch_format<KvFormat::kFp8Tensor>;
  launch(p, q_map, bf16, plan, static_cast<cudaStream_t>(stream));
  if (plan.combines) launch_combine_parts(p, bf16, plan, stream);
}

}  // namespace flash_mla::sm90
