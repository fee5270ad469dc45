#pragma once
#include <array>
#include <deque>
#include <utility>

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
inline void cp_async_4(std::uint32_t smem, const void* global, std::uint32_t bytes) {
  std::byte* const to = Block::current().shared_at(smem, 4);
  if (smem % 4 != 0 || reinterpret_cast<std::uintptr_t>(global) % 4 != 0)
    throw std::logic_error("an asynchronous copy that is not aligned");
  Block::current().copies().push_back([=] {
    std::memset(to, 0, 4);
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
/// A thread's copies so far become a group, which is there at the latest when it is waited for: not before, here.
inline void cp_async_commit() {
  auto& block = Block::current();
  block.copy_groups().push_back(std::exchange(block.copies(), {}));
}
template <int kPending>
void cp_async_wait() {
  auto& groups = Block::current().copy_groups();
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const auto& copy : groups.front()) copy();
  }
}

/// With g = lane / 4 and t = lane % 4: a holds (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), b (2t.., g) and
/// (2t + 8.., g), d (g, 2t..) and (g + 8, 2t..).
template <bool kBf16>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  auto& block = Block::current();
  const unsigned lane = block.thread() % 32;
  std::array<std::array<std::uint64_t, 32>, 6> held;
  const std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (unsigned i = 0; i < 6; ++i) held[i] = block.exchange(mine[i]);
  const auto half = [&](std::uint64_t word, unsigned i) {
    const auto bits = static_cast<std::uint16_t>(word >> 16 * i);
    return kBf16 ? Block::bf16_to_float(bits) : Block::half_to_float(bits);
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, column = 2 * (lane % 4) + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const float x = half(held[i / 2 + k / 8 * 2][4 * row + k % 8 / 2], k % 2);
      const float y = half(held[4 + k / 8][4 * column + k % 8 / 2], k % 2);
      d[i] += x * y;
    }
  }
}
inline void mma_m16n8k16_bf16(float (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                              std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  mma_m16n8k16<true>(d, {a0, a1, a2, a3}, b0, b1);
}

/// Of a cluster of one.
inline float4 load_cluster_16(std::uint32_t smem, std::uint32_t rank) {
  if (rank != 0) throw std::logic_error("a CTA of a cluster of one has no neighbours");
  float4 out;
  std::memcpy(&out, Block::current().shared_at(smem, sizeof(out)), sizeof(out));
  return out;
}
}  // namespace flash_mla::sm90::ptx
