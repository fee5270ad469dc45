#pragma once
#include "kernels/ptx/mbarrier.cuh"

namespace flash_mla::sm90::ptx {
inline void cp_async_16(std::uint32_t smem, const void* global, std::uint32_t bytes) {
  std::byte* const to = Block::current().shared_at(smem, 16);
  if (smem % 16 != 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0)
    throw std::logic_error("an asynchronous copy that is not aligned");
  Block::current().copies().push_back([=] {
    std::memset(to, 0, 16);
    std::memcpy(to, global, bytes);
  });
}
/// The copies happen all together, at some later switch.
inline void cp_async_arrive(std::uint64_t* barrier) {
  auto& block = Block::current();
  block.later([barrier, &block, copies = std::exchange(block.copies(), {})] {
    for (const auto& copy : copies) copy();
    auto& x = block.barrier(barrier);
    x.pending -= 1;
    Block::settle(x);
  });
}
}  // namespace flash_mla::sm90::ptx
