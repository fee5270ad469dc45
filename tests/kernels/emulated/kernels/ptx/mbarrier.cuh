#pragma once
#include <string>
#include <utility>

#include "cuda_stand_in.h"

namespace flash_mla::sm90::ptx {
using emulated::Block;

inline std::uint32_t smem_address(const void* p) { return Block::current().shared_address(p); }

inline void mbarrier_init(std::uint64_t* b, std::uint32_t arrivals) {
  const int n = static_cast<int>(arrivals);
  Block::current().barrier(b) = {n, n, 0, 0};
}
inline void fence_barrier_init() {}
inline void mbarrier_arrive(std::uint64_t* b, std::uint32_t count = 1) {
  auto& x = Block::current().barrier(b);
  x.pending -= static_cast<int>(count);
  Block::settle(x);
}
inline void mbarrier_arrive_expect_tx(std::uint64_t* b, std::uint32_t bytes) {
  auto& x = Block::current().barrier(b);
  x.bytes += bytes;
  x.pending -= 1;
  Block::settle(x);
}
inline void mbarrier_wait(std::uint64_t* b, std::uint32_t parity) {
  auto& x = Block::current().barrier(b);
  if (x.phase == parity) {
    Block::current().wait_until([&x, parity] { return x.phase != parity; },
                                "mbarrier at " + std::to_string(smem_address(b)));
  }
}

inline bool mbarrier_test_wait(std::uint64_t* b, std::uint32_t parity) {
  return Block::current().barrier(b).phase != parity;
}

template <int kId, int kThreads>
void named_barrier_sync() {
  Block::current().meet(kId, kThreads, true);
}
template <int kId, int kThreads>
void named_barrier_arrive() {
  Block::current().meet(kId, kThreads, false);
}
template <int kThreads>
void named_barrier_sync(int id) {
  Block::current().meet(id, kThreads, true);
}
template <int kThreads>
void named_barrier_arrive(int id) {
  Block::current().meet(id, kThreads, false);
}
template <int kId, int kThreads>
bool named_barrier_or(bool any) {
  return Block::current().meet(kId, kThreads, true, any);
}

inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}
}  // namespace flash_mla::sm90::ptx
