#pragma once

// Launches the kernels over caches of one format: each is a compilation of its own.

#include <cuda_runtime.h>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/dense_decode/sm90/launch.h"
#include "kernels/attention/dense_fp8_decode/sm90/kernel.cuh"

namespace flash_mla::sm90::dense_fp8 {

template <class F, int kHeads, bool kBf16>
void launch_kernel(const DenseFp8Params& p, const QueryView& q, const DecodePlan& plan, cudaStream_t stream) {
  constexpr std::size_t kSmemBytes = sizeof(raw_rows::Smem<F, kHeads>) + 1024;
  constexpr auto kKernel = dense_fp8_decode_kernel<F, kHeads, kBf16>;
  check(allow_shared_memory<kKernel>(kSmemBytes), "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(plan.grid.x), 1, static_cast<unsigned>(plan.grid.z));
  LaunchConfig config(grid, raw_rows::kThreads, kSmemBytes, stream);
  check(launch(config.programmatic(), kKernel, q, p), "dense_fp8_decode_kernel");
}

template <class F>
void launch_format(const DenseFp8Params& p, const QueryView& q, bool bf16, const DecodePlan& plan,
                   cudaStream_t stream) {
  const auto with_heads = [&]<bool kBf16>() {
    const int rows = p.blocks.tokens * p.blocks.heads;
    const auto launch = rows <= 16   ? launch_kernel<F, 16, kBf16>
                        : rows <= 32 ? launch_kernel<F, 32, kBf16>
                                     : launch_kernel<F, 64, kBf16>;
    launch(p, q, plan, stream);
  };
  bf16 ? with_heads.template operator()<true>() : with_heads.template operator()<false>();
}

// Instantiated in launch_v32.cu and launch_tensor.cu.
extern template void launch_format<raw_rows::V32Rows>(const DenseFp8Params&, const QueryView&, bool,
                                                      const DecodePlan&, cudaStream_t);
extern template void launch_format<raw_rows::TensorRows>(const DenseFp8Params&, const QueryView&, bool,
                                                         const DecodePlan&, cudaStream_t);

}  // namespace flash_mla::sm90::dense_fp8
