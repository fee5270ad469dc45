#pragma once

// Launches of the sparse prefill kernel, by type of the queries and format of the cache.

#include <cuda_runtime.h>

#include <algorithm>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/sparse_prefill/sm90/kernel.cuh"
#include "kernels/attention/sparse_prefill/sm90/raw_rows.cuh"

namespace flash_mla::sm90::sparse_prefill {

using Launch = void (*)(const SparsePrefillParams&, const QueryView& q, const CUtensorMap& q_map,
                        const CUtensorMap& out_map, int sms, cudaStream_t);

template <bool kBf16, int kHeadDim>
void launch_as(const SparsePrefillParams& p, const QueryView&, const CUtensorMap& q_map,
               const CUtensorMap& out_map, int sms, cudaStream_t stream) {
  constexpr auto kKernel = sparse_prefill_kernel<kBf16, kHeadDim>;
  constexpr std::size_t kSmemBytes = sizeof(Smem<ptx::Element<kBf16>>) + 1024;
  check(allow_shared_memory<kKernel>(kSmemBytes), "cudaFuncSetAttribute");
  const auto ctas = static_cast<unsigned>(std::min(p.items, sms));
  check(launch(LaunchConfig(ctas, kThreads, kSmemBytes, stream), kKernel, q_map, out_map, p),
        "sparse_prefill_kernel");
}

/// Over rows as they lie in the cache.
template <class F, int kHeads, bool kBf16>
void launch_raw_rows(const SparsePrefillParams& p, const QueryView& q, const CUtensorMap&, const CUtensorMap&,
                     int sms, cudaStream_t stream) {
  constexpr auto kKernel = sparse_prefill_rows_kernel<F, kHeads, kBf16>;
  constexpr std::size_t kSmemBytes = sizeof(raw_rows::Smem<F, kHeads>) + 1024;
  check(allow_shared_memory<kKernel>(kSmemBytes), "cudaFuncSetAttribute");
  const auto ctas = static_cast<unsigned>(std::min(p.items, sms));
  check(launch(LaunchConfig(ctas, raw_rows::kThreads, kSmemBytes, stream), kKernel, q, p),
        "sparse_prefill_rows_kernel");
}
template <class F, bool kBf16>
Launch of_raw_rows(int h_q) {
  return h_q <= 16   ? launch_raw_rows<F, 16, kBf16>
         : h_q <= 32 ? launch_raw_rows<F, 32, kBf16>
                     : launch_raw_rows<F, 64, kBf16>;
}

/// Over rows of 16-bit elements.
template <bool kBf16>
Launch of_rows(int head_dim) {
  return head_dim == 576 ? launch_as<kBf16, 576> : launch_as<kBf16, 512>;
}
// Instantiated in launch_rows.cu, launch_fp16.cu and launch_raw_*.cu.
extern template Launch of_rows<true>(int);
extern template Launch of_rows<false>(int);
extern template Launch of_raw_rows<raw_rows::V32Rows, true>(int);
extern template Launch of_raw_rows<raw_rows::V32Rows, false>(int);
extern template Launch of_raw_rows<raw_rows::V4Rows, true>(int);
extern template Launch of_raw_rows<raw_rows::V4Rows, false>(int);
extern template Launch of_raw_rows<raw_rows::TensorRows, true>(int);
extern template Launch of_raw_rows<raw_rows::TensorRows, false>(int);

}  // namespace flash_mla::sm90::sparse_prefill
