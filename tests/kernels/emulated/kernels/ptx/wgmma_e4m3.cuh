#pragma once
#include "kernels/ptx/wgmma.cuh"

namespace flash_mla::sm90::ptx {
template <int kSums>
void wgmma_e4m3(float (&d)[kSums], std::uint64_t a, std::uint64_t b, bool accumulate) {
  Block::current().issue({d, kSums, {}, b, false, accumulate, true, a});
}
}  // namespace flash_mla::sm90::ptx
