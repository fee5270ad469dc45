#pragma once

// e4m3 weights to bfloat16 in registers.

#include <cuda_bf16.h>

#include <cstdint>

namespace flash_mla::sm90 {

/// Four e4m3 weights to four of bfloat16, exactly. Shifted to bfloat16's fields they are 2^-120 of themselves.
__device__ __forceinline__ uint2 expand_e4m3(std::uint32_t codes) {
  uint2 out;
  const std::uint32_t pair[2] = {__byte_perm(codes, 0, 0x1404), __byte_perm(codes, 0, 0x3424)};
  const __nv_bfloat162 factor = __float2bfloat162_rn(0x1p120f);
  std::uint32_t* const to[2] = {&out.x, &out.y};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t bits = (pair[i] & 0x80008000u) | ((pair[i] >> 4) & 0x07F007F0u);
    const __nv_bfloat162 value = __hmul2(reinterpret_cast<const __nv_bfloat162&>(bits), factor);
    *to[i] = reinterpret_cast<const std::uint32_t&>(value);
  }
  return out;
}

/// Eight e4m3 weights times their scale, rounded to bfloat16 as base/element.h does.
__device__ __forceinline__ uint4 widen_e4m3(std::uint32_t first, std::uint32_t second, float scale) {
  const uint2 half[2] = {expand_e4m3(first), expand_e4m3(second)};
  const std::uint32_t exact[4] = {half[0].x, half[0].y, half[1].x, half[1].y};
  std::uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = __uint_as_float(exact[i] << 16), high = __uint_as_float(exact[i] & 0xFFFF0000u);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low * scale, high * scale);
    out[i] = reinterpret_cast<const std::uint32_t&>(pair);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

}  // namespace flash_mla::sm90
