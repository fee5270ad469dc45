// Made-up int4 weights.
//
// Tile: a word of 8 codes for each thread. Threads: 256, all alike. Memory: none.

#include <algorithm>

#include "base/cuda/launch.h"
#include "kernels/gemm/sm90/int4_weights.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 8 * 132;

__device__ unsigned long long mix(unsigned long long x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

__global__ __launch_bounds__(kThreads) void fill(std::uint32_t* out, std::int64_t count,
                                                 unsigned long long seed) {
  const std::int64_t stride = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const unsigned long long bits =
        mix(mix(seed) + static_cast<unsigned long long>(i) * 0x9e3779b97f4a7c15ull);
    std::uint32_t word = 0;
    for (int j = 0; j < 8; ++j) {
      const unsigned code = 1 + ((static_cast<unsigned>(bits >> (8 * j)) & 0xFF) * 15 >> 8);
      word |= code << (4 * j);
    }
    out[i] = word;
  }
}

}  // namespace

cudaError_t fill_random_int4(void* codes, std::int64_t words, std::uint64_t seed, cudaStream_t stream) {
  if (words < 0 || (words > 0 && codes == nullptr)) return cudaErrorInvalidValue;
  const auto blocks =
      static_cast<unsigned>(std::clamp<std::int64_t>((words + kThreads - 1) / kThreads, 1, kMaxBlocks));
  return launch(LaunchConfig(blocks, kThreads, 0, stream), fill, static_cast<std::uint32_t*>(codes), words,
                static_cast<unsigned long long>(seed));
}

}  // namespace flash_mla::sm90
