#pragma once
#include "kernels/ptx/mbarrier.cuh"

namespace flash_mla::sm90::ptx {
inline void cluster_arrive() {}
inline void cluster_arrive_relaxed() {}
inline void cluster_wait() {}
inline bool elect_one() { return Block::current().thread() % 32 == 0; }
template <int>
void set_max_registers_down() {}
template <int>
void set_max_registers_up() {}
}  // namespace flash_mla::sm90::ptx
