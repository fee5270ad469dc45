#pragma once

// int4 weights (int4_weights.h) to bfloat16 in registers.

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/ptx/words.cuh"

namespace flash_mla::sm90 {

/// Eight columns of a row, exactly. A code of 4 bits below the exponent of 128 is 128 + code.
__device__ __forceinline__ uint4 expand_int4(std::uint32_t codes) {
  const __nv_bfloat162 zero =
      __float2bfloat162_rn(136.0f);  // 128 and the 8 that codes are above their values
  std::uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t bits = ptx::and_or(codes >> (4 * i), 0x000F000Fu, 0x43004300u);
    const __nv_bfloat162 value = __hsub2(reinterpret_cast<const __nv_bfloat162&>(bits), zero);
    out[i] = reinterpret_cast<const std::uint32_t&>(value);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

/// The same times their scale, rounded to bfloat16 as base/element.h does.
__device__ __forceinline__ uint4 widen_int4(std::uint32_t codes, float scale) {
  const uint4 exact = expand_int4(codes);
  const std::uint32_t in[4] = {exact.x, exact.y, exact.z, exact.w};
  std::uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = __uint_as_float(in[i] << 16), high = __uint_as_float(in[i] & 0xFFFF0000u);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low * scale, high * scale);
    out[i] = reinterpret_cast<const std::uint32_t&>(pair);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

}  // namespace flash_mla::sm90
