#pragma once

// Words of 16 bytes in shared memory, and pairs of e4m3.

#include <cuda_fp16.h>

#include <cstdint>

namespace flash_mla::sm90::ptx {

__device__ __forceinline__ uint4 load_shared_16(std::uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared_16(std::uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

/// Two e4m3, the first in the lower byte, as two fp16: exact, NaN stays NaN.
__device__ __forceinline__ std::uint32_t widen_e4m3(std::uint16_t x) {
  std::uint32_t h;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(x));
  return h;
}

}  // namespace flash_mla::sm90::ptx
