#include <cstdlib>

#include "kernels/attention/dense_fp8_decode/sm90/launch.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/launch.h"

namespace flash_mla::sm90 {

void launch_dense_fp8_decode(const DenseFp8Params& p, const TensorView& q, const CUtensorMap& q_map,
                             KvFormat format, const DecodePlan& plan, void* stream) {
  const bool bf16 = q.dtype == DType::kBFloat16, v32 = format == KvFormat::kFp8V32;
  // For a first comparison: 0 the kernel of consumer.cuh, else the consumers of raw_rows.
  const char* const rows = std::getenv("FLASH_MLA_ROWS");
  if (rows != nullptr && *rows == '0') {
    const auto launch =
        v32 ? dense_fp8::launch_format<KvFormat::kFp8V32> : dense_fp8::launch_format<KvFormat::kFp8Tensor>;
    launch(p, q_map, bf16, plan, static_cast<cudaStream_t>(stream));
  } else {
    const auto launch =
        v32 ? dense_fp8::launch_rows<raw_rows::V32Rows> : dense_fp8::launch_rows<raw_rows::TensorRows>;
    launch(p, {q.ptr<const std::uint16_t>(), q.stride(0), q.stride(1), q.stride(2)}, bf16, plan,
           static_cast<cudaStream_t>(stream));
  }
  if (plan.combines) launch_combine_parts(p, bf16, plan, stream);
}

}  // namespace flash_mla::sm90
