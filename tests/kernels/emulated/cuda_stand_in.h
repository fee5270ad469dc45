#pragma once

// What device code takes from CUDA's headers and from the compiler, for block.h.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/element.h"
#include "block.h"

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define threadIdx (emulated::Dim3{emulated::Block::current().thread()})
#define blockIdx (emulated::Block::current().block_index)
#define gridDim (emulated::Block::current().grid_size)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using std::isfinite;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline std::uint32_t max(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

inline float __uint_as_float(std::uint32_t x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline std::uint32_t __float_as_uint(float f) {
  std::uint32_t x;
  std::memcpy(&x, &f, 4);
  return x;
}

inline std::uint32_t __byte_perm(std::uint32_t a, std::uint32_t b, unsigned selector) {
  const std::uint64_t both = std::uint64_t{b} << 32 | a;
  std::uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    result |= static_cast<std::uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  }
  return result;
}
inline std::uint32_t __vmaxu2(std::uint32_t a, std::uint32_t b) {
  return max(a & 0xFFFFu, b & 0xFFFFu) | max(a >> 16, b >> 16) << 16;
}

struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

namespace emulated {
inline __half to_half(float f) { return {flash_mla::to_fp16(f).bits}; }
inline __nv_bfloat16 to_bf16(float f) { return {flash_mla::to_bf16(f).bits}; }
}  // namespace emulated

inline float2 __half22float2(__half2 h) {
  return {emulated::Block::half_to_float(h.x.bits), emulated::Block::half_to_float(h.y.bits)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 h) {
  return {emulated::Block::bf16_to_float(h.x.bits), emulated::Block::bf16_to_float(h.y.bits)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {emulated::to_half(x), emulated::to_half(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {emulated::to_bf16(x), emulated::to_bf16(y)};
}
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return __floats2bfloat162_rn(x, x); }
inline __half2 __hmul2(__half2 a, __half2 b) {
  const float2 x = __half22float2(a), y = __half22float2(b);
  return __floats2half2_rn(x.x * y.x, x.y * y.y);
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  using emulated::Block;
  return __floats2bfloat162_rn(Block::bf16_to_float(a.x.bits) * Block::bf16_to_float(b.x.bits),
                               Block::bf16_to_float(a.y.bits) * Block::bf16_to_float(b.y.bits));
}
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
  using emulated::Block;
  return __floats2bfloat162_rn(Block::bf16_to_float(a.x.bits) - Block::bf16_to_float(b.x.bits),
                               Block::bf16_to_float(a.y.bits) - Block::bf16_to_float(b.y.bits));
}
inline float __low2float(__nv_bfloat162 h) { return emulated::Block::bf16_to_float(h.x.bits); }
inline float __high2float(__nv_bfloat162 h) { return emulated::Block::bf16_to_float(h.y.bits); }
inline float __bfloat162float(__nv_bfloat16 h) { return emulated::Block::bf16_to_float(h.bits); }
inline __nv_bfloat16 __float2bfloat16(float x) { return emulated::to_bf16(x); }
inline __half2 __low2half2(__half2 h) { return {h.x, h.x}; }
inline __half2 __high2half2(__half2 h) { return {h.y, h.y}; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }

inline void __syncthreads() { emulated::Block::current().meet_block(); }
inline void __syncwarp() { emulated::Block::current().meet_warp(); }
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  auto& block = emulated::Block::current();
  const std::uint64_t other = block.exchange(bits)[(block.thread() ^ static_cast<unsigned>(mask)) % 32];
  std::memcpy(&x, &other, sizeof(T));
  return x;
}

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  const std::uint64_t other = emulated::Block::current().exchange(bits)[static_cast<unsigned>(lane) % 32];
  std::memcpy(&x, &other, sizeof(T));
  return x;
}
/// What lane - delta gives; of the first lanes their own.
template <class T>
T __shfl_up_sync(unsigned, T x, unsigned delta) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  auto& block = emulated::Block::current();
  const unsigned lane = block.thread() % 32;
  const std::uint64_t other = block.exchange(bits)[lane >= delta ? lane - delta : lane];
  std::memcpy(&x, &other, sizeof(T));
  return x;
}
inline int atomicAdd(int* to, int x) { return (*to += x) - x; }  // between two switches nobody else runs
inline unsigned __ballot_sync(unsigned, bool x) {
  const auto& of_all = emulated::Block::current().exchange(x);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= static_cast<unsigned>(of_all[i]) << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline std::uint32_t __umulhi(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>(std::uint64_t{a} * b >> 32);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }

/// A tensor of 16-bit elements for the copy engine, innermost dimension of 64 first, written with 128-byte swizzle.
struct CUtensorMap {
  const std::byte* data;
  std::int64_t size[5], stride[5];  // bytes
  int box[5];
};
