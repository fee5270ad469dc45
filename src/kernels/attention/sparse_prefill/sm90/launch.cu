// Launches the sparse prefill kernel. Everything a launch depends on has been decided in sparse_prefill.cpp.

#include <cstdlib>

#include "kernels/attention/sparse_prefill/sm90/launch.cuh"
#include "kernels/attention/sparse_prefill/sm90/launch.h"
#include "kv/format.h"

namespace flash_mla::sm90 {
namespace {

template <bool kBf16>
sparse_prefill::Launch launch_of(KvFormat format, int head_dim, int h_q) {
  // For a first comparison: 0 the kernel that widens keys into shared memory, 1 bulk copies, 2 copies of 16 bytes.
  const char* const rows = std::getenv("FLASH_MLA_ROWS");
  if (format == KvFormat::kFp8V32 && (rows == nullptr || *rows != '0')) {
    if constexpr (kBf16) {
      if (rows != nullptr && *rows == '2') return sparse_prefill::of_fp8_rows<true, false>(h_q);
    }
    return sparse_prefill::of_fp8_rows<kBf16, true>(h_q);
  }
  return kv::is_fp8(format) ? sparse_prefill::of_fp8<kBf16>(format)
                            : sparse_prefill::of_rows<kBf16>(head_dim);
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
