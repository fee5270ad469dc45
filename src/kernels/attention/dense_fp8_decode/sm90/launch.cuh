#pragma once

// Launches the kernels over caches of one format: each is a compilation of its own.

#include <cuda_runtime.h>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/dense_decode/sm90/launch.h"
#include "kernels/attention/dense_fp8_decode/sm90/kernel.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/rows_kernel.cuh"

namespace flash_mla::sm90::dense_fp8 {

template <bool kBf16, KvFormat kFormat, int kHeads>
void launch_kernel(const DenseFp8Params& p, const CUtensorMap& q_map, const DecodePlan& plan,
                   cudaStream_t stream) {
  constexpr std::size_t kSmemBytes = sizeof(Smem<kHeads>) + 1024;
  static_assert(kSmemBytes <= kMaxSmem);
  constexpr auto kKernel = dense_fp8_decode_kernel<kBf16, kFormat, kHeads>;
  check(allow_shared_memory<kKernel>(kSmemBytes), "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(plan.grid.x), 1, static_cast<unsigned>(plan.grid.z));
  LaunchConfig config(grid, kThreads, kSmemBytes, stream);
  check(launch(config.programmatic(), kKernel, q_map, p), "dense_fp8_decode_kernel");
}

template <KvFormat kFormat>
void launch_format(const DenseFp8Params& p, const CUtensorMap& q_map, bool bf16, const DecodePlan& plan,
                   cudaStream_t stream) {
  const auto with_heads = [&]<bool kBf16>() {
    const int heads = heads_for(p.blocks.tokens * p.blocks.heads);
    const auto launch = heads == 16   ? launch_kernel<kBf16, kFormat, 16>
                        : heads == 32 ? launch_kernel<kBf16, kFormat, 32>
                                      : launch_kernel<kBf16, kFormat, 64>;
    launch(p, q_map, plan, stream);
  };
  bf16 ? with_heads.template operator()<true>() : with_heads.template operator()<false>();
}

/// The same by the consumers of raw_rows.
template <class F, int kHeads, bool kBf16>
void launch_rows_kernel(const DenseFp8Params& p, const QueryView& q, const DecodePlan& plan,
                        cudaStream_t stream) {
  constexpr std::size_t kSmemBytes = sizeof(raw_rows::Smem<F, kHeads>) + 1024;
  constexpr auto kKernel = dense_fp8_decode_rows_kernel<F, kHeads, kBf16>;
  check(allow_shared_memory<kKernel>(kSmemBytes), "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(plan.grid.x), 1, static_cast<unsigned>(plan.grid.z));
  LaunchConfig config(grid, raw_rows::kThreads, kSmemBytes, stream);
  check(launch(config.programmatic(), kKernel, q, p), "dense_fp8_decode_rows_kernel");
}

template <class F>
void launch_rows(const DenseFp8Params& p, const QueryView& q, bool bf16, const DecodePlan& plan,
                 cudaStream_t stream) {
  const auto with_heads = [&]<bool kBf16>() {
    const int heads = heads_for(p.blocks.tokens * p.blocks.heads);
    const auto launch = heads == 16   ? launch_rows_kernel<F, 16, kBf16>
                        : heads == 32 ? launch_rows_kernel<F, 32, kBf16>
                                      : launch_rows_kernel<F, 64, kBf16>;
    launch(p, q, plan, stream);
  };
  bf16 ? with_heads.template operator()<true>() : with_heads.template operator()<false>();
}

extern template void launch_rows<raw_rows::V32Rows>(const DenseFp8Params&, const QueryView&, bool,
                                                    const DecodePlan&, cudaStream_t);
extern template void launch_rows<raw_rows::TensorRows>(const DenseFp8Params&, const QueryView&, bool,
                                                       const DecodePlan&, cudaStream_t);

/// Instantiated by launch.cu, launch_tensor.cu and launch_rows.cu.
extern template void launch_format<KvFormat::kFp8Tensor>(const DenseFp8Params&, const CUtensorMap&, bool,
                                                         const DecodePlan&, cudaStream_t);

}  // namespace flash_mla::sm90::dense_fp8
