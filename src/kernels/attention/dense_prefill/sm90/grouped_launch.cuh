#pragma once

// Launches the prefill kernel for keys and values of their own; a file for each head dimension instantiates it. Everything a
// launch depends on has been decided in grouped.cpp.

#include <cuda_runtime.h>

#include <algorithm>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/dense_prefill/sm90/grouped_kernel.cuh"
#include "kernels/attention/dense_prefill/sm90/grouped_launch.h"

namespace flash_mla::sm90::prefill {

template <class C, bool kBf16>
void launch_grouped_as(const GroupedLaunch& call, const GroupedParams& p, unsigned ctas) {
  constexpr std::size_t kBytes = sizeof(Smem<C, ptx::Element<kBf16>>) + 1024;
  constexpr auto kKernel = grouped_prefill_kernel<C, kBf16>;
  check(allow_shared_memory<kKernel>(kBytes), "cudaFuncSetAttribute");
  const auto stream = static_cast<cudaStream_t>(call.stream);
  check(launch(LaunchConfig(ctas, kThreads, kBytes, stream), kKernel, call.q, call.k, call.v, p),
        "grouped_prefill_kernel");
  if constexpr (!C::kSplits) return;
  constexpr int kRowsPerBlock = kCombineThreads / 32;
  const std::int64_t blocks = (p.total_q * p.problem.h_q + kRowsPerBlock - 1) / kRowsPerBlock;
  check(launch(LaunchConfig(static_cast<unsigned>(std::min<std::int64_t>(blocks, 16 * call.sms)),
                            kCombineThreads, 0, stream),
               grouped_combine<C, kBf16>, p),
        "grouped_combine");
}

template <class C>
void launch_grouped_heads(const GroupedLaunch& call) {
  GroupedParams p = call.params;
  const std::int64_t items = call.max_items * p.splits;
  if (items <= call.sms) {
    p.taken = nullptr;
  } else {
    check(cudaMemsetAsync(p.taken, 0, sizeof(*p.taken), static_cast<cudaStream_t>(call.stream)),
          "cudaMemsetAsync");
  }
  const auto ctas = static_cast<unsigned>(std::min<std::int64_t>(items, call.sms));
  if (call.bf16) {
    launch_grouped_as<C, true>(call, p, ctas);
  } else {
    launch_grouped_as<C, false>(call, p, ctas);
  }
}

template <int kDqk, int kDv>
void launch_grouped(const GroupedLaunch& call) {
  if (call.params.splits > 1) {
    launch_grouped_heads<GroupedHeads<kDqk, kDv, true>>(call);
  } else {
    launch_grouped_heads<GroupedHeads<kDqk, kDv, false>>(call);
  }
}

}  // namespace flash_mla::sm90::prefill
