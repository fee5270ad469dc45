// Launches the prefill kernel. Everything a launch depends on has been decided in dense_prefill.cpp.

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "sm90/host.h"
#include "sm90/prefill/kernel.cuh"
#include "sm90/prefill/launch.h"

namespace flash_mla::sm90::prefill {
namespace {

constexpr std::size_t kSmemBytes = sizeof(Smem) + 1024;

template <bool kBf16>
void launch_as(const Params& p, const CUtensorMap& q, const CUtensorMap& k_nope, const CUtensorMap& k_rope,
               const CUtensorMap& v, unsigned ctas, cudaStream_t stream) {
  // An attribute of the kernel on the current device. Setting it twice does no harm.
  static std::array<std::atomic<bool>, kMaxDevices> ready{};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (!ready[static_cast<std::size_t>(device)].load(std::memory_order_acquire)) {
    check(cudaFuncSetAttribute(prefill_kernel<kBf16>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kSmemBytes)),
          "cudaFuncSetAttribute");
    ready[static_cast<std::size_t>(device)].store(true, std::memory_order_release);
  }
  prefill_kernel<kBf16><<<ctas, kThreads, kSmemBytes, stream>>>(q, k_nope, k_rope, v, p);
  check(cudaGetLastError(), "prefill_kernel");
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
