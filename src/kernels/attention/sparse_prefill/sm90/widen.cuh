#pragma once

// e4m3 with scales to bfloat16 or float16, between global and shared memory, in a producer warp's registers.
// (sparse_decode/sm90/producer.cuh has the same of its own; the two could be one.)

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "kernels/ptx/fragment.cuh"

namespace flash_mla::sm90::sparse_prefill {

/// 16 bytes at `from`, or zeros. Without a branch, so that loads on their way stay in order.
__device__ __forceinline__ uint4 load_16(const std::byte* from, bool wanted) {
  uint4 x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(from), "r"(static_cast<int>(wanted)));
  return x;
}
__device__ __forceinline__ std::uint32_t load_4(const std::byte* from, bool wanted) {
  std::uint32_t x;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.nc.u32 %0, [%1];\n}"
               : "=r"(x)
               : "l"(from), "r"(static_cast<int>(wanted)));
  return x;
}
__device__ __forceinline__ std::uint32_t load_1(const std::byte* from, bool wanted) {
  std::uint32_t x;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.nc.u8 %0, [%1];\n}"
               : "=r"(x)
               : "l"(from), "r"(static_cast<int>(wanted)));
  return x;
}
__device__ __forceinline__ void store_16(std::uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ void store_1(std::uint32_t to, std::uint32_t x) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

/// Two e4m3, times `scale` in fp32.
template <bool kBf16>
__device__ __forceinline__ std::uint32_t widen2(std::uint32_t x, float scale) {
  std::uint32_t h;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(static_cast<std::uint16_t>(x)));
  const float2 f = __half22float2(reinterpret_cast<const __half2&>(h));
  return pack2<kBf16>(f.x * scale, f.y * scale);
}
template <bool kBf16>
__device__ __forceinline__ uint4 widen8(std::uint32_t low, std::uint32_t high, float scale) {
  return {widen2<kBf16>(low, scale), widen2<kBf16>(low >> 16, scale), widen2<kBf16>(high, scale),
          widen2<kBf16>(high >> 16, scale)};
}

/// Two bfloat16 as two float16.
__device__ __forceinline__ std::uint32_t to_half2(std::uint32_t x) {
  return pack2<false>(__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u));
}

/// The scale of a tile of kFp8V4: e8m0, 0xFF is NaN.
__device__ __forceinline__ float e8m0(std::uint32_t x) {
  return __uint_as_float(x == 0 ? 0x00400000u : x == 0xFF ? 0x7FC00000u : x << 23);
}

}  // namespace flash_mla::sm90::sparse_prefill
