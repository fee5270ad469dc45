#pragma once
#include "kernels/ptx/wgmma.cuh"

namespace flash_mla::sm90::ptx {
template <int kSums>
void wgmma_e4m3(float (&d)[kSums], std::uint64_t a, std::uint64_t b, bool accumulate) {
  Block::current().issue({d, kSums, {}, b, false, accumulate, true, a});
}
template <int kSums>
void wgmma_e4m3(float (&d)[kSums], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  Block::current().issue({d, kSums, {a[0], a[1], a[2], a[3]}, b, false, accumulate, true});
}
}  // namespace flash_mla::sm90::ptx
