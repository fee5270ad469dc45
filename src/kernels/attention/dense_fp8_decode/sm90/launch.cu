#include "kernels/attention/dense_fp8_decode/sm90/launch.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/launch.h"

namespace flash_mla::sm90 {

void launch_dense_fp8_decode(const DenseFp8Params& p, const TensorView& q, KvFormat format,
                             const DecodePlan& plan, void* stream) {
  const bool bf16 = q.dtype == DType::kBFloat16;
  const auto launch = format == KvFormat::kFp8V32 ? dense_fp8::launch_format<raw_rows::V32Rows>
                                                  : dense_fp8::launch_format<raw_rows::TensorRows>;
  launch(p, {q.ptr<const std::uint16_t>(), q.stride(0), q.stride(1), q.stride(2)}, bf16, plan,
         static_cast<cudaStream_t>(stream));
  if (plan.combines) launch_combine_parts(p, bf16, plan, stream);
}

}  // namespace flash_mla::sm90
