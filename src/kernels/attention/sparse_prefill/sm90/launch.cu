// Launches the sparse prefill kernel. Everything a launch depends on has been decided in sparse_prefill.cpp.

#include "kernels/attention/sparse_prefill/sm90/launch.cuh"
#include "kernels/attention/sparse_prefill/sm90/launch.h"
#include "kv/format.h"

namespace flash_mla::sm90 {
namespace {

template <bool kBf16>
sparse_prefill::Launch launch_of(KvFormat format, int head_dim, int h_q) {
  using namespace sparse_prefill;
  switch (format) {
    case KvFormat::kFp8V32:
      return of_raw_rows<raw_rows::V32Rows, kBf16>(h_q);
    case KvFormat::kFp8V4:
      return of_raw_rows<raw_rows::V4Rows, kBf16>(h_q);
    case KvFormat::kFp8Tensor:
      return of_raw_rows<raw_rows::TensorRows, kBf16>(h_q);
    default:
      return of_rows<kBf16>(head_dim);
  }
}

}  // namespace

void launch_sparse_prefill(const SparsePrefillParams& p, const QueryView& q, const CUtensorMap& q_map,
                           const CUtensorMap& out_map, bool bf16, KvFormat format, int head_dim, int sms,
                           void* stream) {
  const auto prefill =
      bf16 ? launch_of<true>(format, head_dim, p.h_q) : launch_of<false>(format, head_dim, p.h_q);
  prefill(p, q, q_map, out_map, sms, static_cast<cudaStream_t>(stream));
}

}  // namespace flash_mla::sm90
