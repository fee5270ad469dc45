#pragma once

// Meetings of the CTAs of one number on all ranks. Each CTA writes its count of meetings to the peers, for each of them a
// word of its own, and waits until theirs have come as far: so nothing has to be reset between calls, and a graph can be
// replayed.

#include <cstdint>

#include "kernels/exchange/sm90/peers.h"

namespace flash_mla::sm90 {

/// Words of a CTA's flags: what each peer has come to, and its own count.
inline constexpr int kFlagWords = 16;

__device__ inline void signal_peer(std::uint32_t* flag, std::uint32_t count) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(count) : "memory");
}
__device__ inline std::uint32_t seen_of_peer(const std::uint32_t* flag) {
  std::uint32_t count;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(count) : "l"(flag) : "memory");
  return count;
}
__device__ inline std::uint64_t nanoseconds() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

/// Returns once the flag has come to the count: true; or where the group has failed, or fails now: false.
__device__ inline bool wait_for_peer(const Peers& p, const std::uint32_t* flag, std::uint32_t count) {
  constexpr int kLooks = 4096;  // the host's memory is far
  std::uint64_t begin = 0;
  for (int looks = 1;; ++looks) {
    if (static_cast<std::int32_t>(seen_of_peer(flag) - count) >= 0) return true;  // counts wrap around
    if (looks < kLooks || p.failed == nullptr) continue;
    looks = 0;
    if (*static_cast<volatile std::uint32_t*>(p.failed) != 0) return false;
    const std::uint64_t now = nanoseconds();
    if (begin == 0) begin = now;
    if (p.timeout_ns == 0 || now - begin < p.timeout_ns) continue;
    *static_cast<volatile std::uint32_t*>(p.failed) = 1;
    __threadfence_system();
    return false;
  }
}

/// One CTA's part. All its threads construct it and call meet() alike.
class Meeting {
 public:
  __device__ explicit Meeting(const Peers& peers)
      : p_(peers), own_(peers.flags[peers.rank] + blockIdx.x * kFlagWords + kMaxPeers), count_(*own_) {}

  /// Waits for the CTAs of this number on all ranks; false: they do not come, and nobody's memory may be touched. The
  /// barriers of the CTA carry what its other threads have written into the release, and what the acquire has seen to them.
  __device__ bool meet() {
    ++count_;
    __syncthreads();
    bool came = true;
    const int peer = static_cast<int>(threadIdx.x);
    if (peer < p_.size) {
      signal_peer(p_.flags[peer] + blockIdx.x * kFlagWords + p_.rank, count_);
      came = wait_for_peer(p_, p_.flags[p_.rank] + blockIdx.x * kFlagWords + peer, count_);
    }
    return __syncthreads_and(came) != 0;
  }
  /// To be called last.
  __device__ void end() const {
    if (threadIdx.x == 0) *own_ = count_;
  }

 private:
  const Peers& p_;
  std::uint32_t* const own_;
  std::uint32_t count_;
};

}  // namespace flash_mla::sm90
