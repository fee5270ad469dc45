#pragma once

// Words of shared memory, and pairs of e4m3.

#include <cuda_fp16.h>

#include <cstdint>

namespace flash_mla::sm90::ptx {

/// T of 4, 8 or 16 bytes at an address that is a multiple of them. By its own instruction: where the compiler
/// has lost sight of what a pointer points to, loads are generic, and their addresses take 64 bits.
template <class T>
__device__ __forceinline__ T load_shared(std::uint32_t from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  union {
    std::uint32_t words[sizeof(T) / 4];
    T value;
  } x;
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x.words[0]) : "r"(from) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x.words[0]), "=r"(x.words[1])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.words[0]), "=r"(x.words[1]), "=r"(x.words[2]), "=r"(x.words[3])
                 : "r"(from)
                 : "memory");
  }
  return x.value;
}
__device__ __forceinline__ std::uint32_t load_shared_2(std::uint32_t from) {
  std::uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared_4(std::uint32_t to, std::uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
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

/// (x & mask) | bits in one instruction; of two constants the compiler makes two.
__device__ __forceinline__ std::uint32_t and_or(std::uint32_t x, std::uint32_t mask, std::uint32_t bits) {
  std::uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

}  // namespace flash_mla::sm90::ptx
