#pragma once

// Launches of the sparse decode kernel over 656-byte rows, by the heads of a CTA.

#include <cuda_runtime.h>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/dense_decode/sm90/plan.h"
#include "kernels/attention/sparse_decode/sm90/rows_kernel.cuh"

namespace flash_mla::sm90::sparse {

template <int kHeads, bool kBulk>
void launch_rows_of(const SparseDecodeParams& p, const QueryView& q, const DecodePlan& plan,
                    cudaStream_t stream) {
  constexpr auto kKernel = sparse_decode_rows_kernel<kHeads, kBulk>;
  constexpr std::size_t kSmemBytes = sizeof(fp8_decode::Smem<kHeads>) + 1024;
  check(allow_shared_memory<kKernel>(kSmemBytes), "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(plan.grid.x), 1, static_cast<unsigned>(plan.grid.z));
  LaunchConfig config(grid, fp8_decode::kThreads, kSmemBytes, stream);
  check(launch(config.programmatic(), kKernel, q, p), "sparse_decode_rows_kernel");
}

// Instantiated in launch_rows_16.cu, launch_rows_32.cu and launch_rows_64.cu.
#define FLASH_MLA_LAUNCH_ROWS(prefix, heads)                                                     \
  prefix template void launch_rows_of<heads, true>(const SparseDecodeParams&, const QueryView&,  \
                                                   const DecodePlan&, cudaStream_t);             \
  prefix template void launch_rows_of<heads, false>(const SparseDecodeParams&, const QueryView&, \
                                                    const DecodePlan&, cudaStream_t)
FLASH_MLA_LAUNCH_ROWS(extern, 16);
FLASH_MLA_LAUNCH_ROWS(extern, 32);
FLASH_MLA_LAUNCH_ROWS(extern, 64);

}  // namespace flash_mla::sm90::sparse
