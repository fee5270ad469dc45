// Launches the prefill kernel. Everything a launch depends on has been decided in dense_prefill.cpp.

#include <cuda_runtime.h>

#include <algorithm>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/dense_prefill/sm90/kernel.cuh"
#include "kernels/attention/dense_prefill/sm90/launch.h"

namespace flash_mla::sm90::prefill {
namespace {

constexpr std::size_t kSmemBytes = sizeof(Smem<LatentHeads, ptx::Element<true>>) + 1024;

template <bool kBf16>
void launch_as(const Params& p, const CUtensorMap& q, const CUtensorMap& k_nope, const CUtensorMap& k_rope,
               const CUtensorMap& v, unsigned ctas, cudaStream_t stream) {
  check(allow_shared_memory<prefill_kernel<kBf16>>(kSmemBytes), "cudaFuncSetAttribute");
  check(launch(LaunchConfig(ctas, kThreads, kSmemBytes, stream), prefill_kernel<kBf16>, q, k_nope, k_rope, v,
               p),
        "prefill_kernel");
}

}  // namespace

void launch(const Params& params, const CUtensorMap& q, const CUtensorMap& k_nope, const CUtensorMap& k_rope,
            const CUtensorMap& v, bool bf16, std::int64_t max_items, int sms, void* stream) {
  Params p = params;
  auto* const on = static_cast<cudaStream_t>(stream);
  const auto ctas = static_cast<unsigned>(std::min<std::int64_t>(max_items, sms));
  if (max_items <= sms) {
    p.taken = nullptr;
  } else {
    check(cudaMemsetAsync(p.taken, 0, sizeof(*p.taken), on), "cudaMemsetAsync");
  }
  (bf16 ? launch_as<true> : launch_as<false>)(p, q, k_nope, k_rope, v, ctas, on);
}

}  // namespace flash_mla::sm90::prefill
