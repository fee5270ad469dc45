#pragma once

// What the timing programs queue ahead of a measured launch: a read pass, so that L2 is cold, and a kernel
// that spins, so that the host is ahead.

#include <cstddef>
#include <cstdint>

namespace {

__global__ void read_pass(const uint4* p, std::size_t n, std::uint32_t* sink) {
  std::uint32_t x = 0;
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < n;
       i += std::size_t(gridDim.x) * blockDim.x) {
    const uint4 v = p[i];
    x ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (x == 0x12345678u) *sink = x;
}

__global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

}  // namespace
