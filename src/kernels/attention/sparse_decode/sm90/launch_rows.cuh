#pragma once

// Launches of the sparse decode kernel over rows as they lie in the cache, by the heads of a CTA.

#include <cuda_runtime.h>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/dense_decode/sm90/plan.h"
#include "kernels/attention/sparse_decode/sm90/rows_kernel.cuh"

namespace flash_mla::sm90::sparse {

using RowsLaunch = void (*)(const SparseDecodeParams&, const QueryView&, const DecodePlan&, cudaStream_t);

template <class Format, int kHeads, bool kBf16>
void launch_rows(const SparseDecodeParams& p, const QueryView& q, const DecodePlan& plan,
                 cudaStream_t stream) {
  constexpr auto kKernel = sparse_decode_rows_kernel<Format, kHeads, kBf16>;
  constexpr std::size_t kSmemBytes = sizeof(raw_rows::Smem<Format, kHeads>) + 1024;
  check(allow_shared_memory<kKernel>(kSmemBytes), "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(plan.grid.x), 1, static_cast<unsigned>(plan.grid.z));
  LaunchConfig config(grid, raw_rows::kThreads, kSmemBytes, stream);
  check(launch(config.programmatic(), kKernel, q, p), "sparse_decode_rows_kernel");
}

template <class Format, bool kBf16>
RowsLaunch rows_launch(int heads) {
  return heads <= 16   ? launch_rows<Format, 16, kBf16>
         : heads <= 32 ? launch_rows<Format, 32, kBf16>
                       : launch_rows<Format, 64, kBf16>;
}

// Instantiated in launch_v32_rows.cu, launch_v4_rows.cu, launch_tensor_rows.cu and launch_wide_rows_*.cu.
extern template RowsLaunch rows_launch<raw_rows::V32Rows, true>(int);
extern template RowsLaunch rows_launch<raw_rows::V32Rows, false>(int);
extern template RowsLaunch rows_launch<raw_rows::V4Rows, true>(int);
extern template RowsLaunch rows_launch<raw_rows::V4Rows, false>(int);
extern template RowsLaunch rows_launch<raw_rows::TensorRows, true>(int);
extern template RowsLaunch rows_launch<raw_rows::TensorRows, false>(int);
extern template RowsLaunch rows_launch<raw_rows::WideRows<576>, true>(int);
extern template RowsLaunch rows_launch<raw_rows::WideRows<576>, false>(int);
extern template RowsLaunch rows_launch<raw_rows::WideRows<512>, true>(int);
extern template RowsLaunch rows_launch<raw_rows::WideRows<512>, false>(int);

}  // namespace flash_mla::sm90::sparse
