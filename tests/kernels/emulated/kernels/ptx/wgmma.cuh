#pragma once
#include "kernels/ptx/mbarrier.cuh"

namespace flash_mla::sm90::ptx {
inline void wgmma_fence() {}
inline void wgmma_commit() { Block::current().commit(); }
template <int kPending>
void wgmma_wait() {
  Block::current().wait_for_products(kPending);
}
inline std::uint64_t swizzled_descriptor(const void* smem, std::uint32_t leading, std::uint32_t stride) {
  const std::uint32_t address = (smem_address(smem) & 0x3FFFF) >> 4;
  return 1ull << 62 | address | static_cast<std::uint64_t>(leading >> 4) << 16 |
         static_cast<std::uint64_t>(stride >> 4) << 32;
}
inline std::uint64_t advance(std::uint64_t descriptor, std::uint32_t units) { return descriptor + units; }
template <bool kBf16, bool kMnMajor, int kSums>
void wgmma_rs(float (&d)[kSums], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  Block::current().issue(
      {d, kSums, {a[0], a[1], a[2], a[3]}, b, kBf16, accumulate, false, 0, false, kMnMajor});
}
template <bool kBf16, bool kMnMajor, int kSums>
void wgmma_ss(float (&d)[kSums], std::uint64_t a, std::uint64_t b, bool accumulate) {
  Block::current().issue({d, kSums, {}, b, kBf16, accumulate, false, a, true, kMnMajor});
}
}  // namespace flash_mla::sm90::ptx
