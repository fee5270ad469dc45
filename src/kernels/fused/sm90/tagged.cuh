#pragma once

// Vectors that CTAs hand to each other without a barrier: every element carries the number of its round, and
// who wants it reads until the number is right. That takes one trip to L2 and back where a barrier and the
// reads behind it take three.
//
// A round's elements must have been read before the next round's are written to the same place: the writer of
// the next round has to depend on all readers of this one.

#include <cuda_bf16.h>

#include <cstdint>

namespace flash_mla::sm90 {

/// A bfloat16 in the lower half, the round in the upper.
using Tagged = std::uint32_t;

__device__ __forceinline__ void store_tagged(Tagged* to, __nv_bfloat16 value, unsigned round) {
  const unsigned word = reinterpret_cast<const unsigned short&>(value) | round << 16;
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

__device__ __forceinline__ float value_of(Tagged word) { return __uint_as_float(word << 16); }

/// One element, of a round that is known to be there.
__device__ __forceinline__ float load_tagged(const Tagged* from) {
  Tagged word;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return value_of(word);
}

/// Two neighbouring elements.
__device__ __forceinline__ std::uint32_t await_2(const Tagged* from, unsigned round) {
  unsigned a, b;
  do {
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(from) : "memory");
  } while ((a >> 16) != round || (b >> 16) != round);
  return __byte_perm(a, b, 0x5410);
}

/// Eight neighbouring elements, kCount times, from `from(i)` where `wanted(i)`; else 0. Aligned to 32 bytes.
template <int kCount, class From, class Wanted>
__device__ __forceinline__ void await_8(unsigned round, From&& from, Wanted&& wanted, uint4 (&out)[kCount]) {
  const unsigned tag = round << 16;
  for (bool missing = true; missing;) {
    uint4 v[kCount][2];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        v[i][j] = make_uint4(tag, tag, tag, tag);
        if (!wanted(i)) continue;
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[i][j].x), "=r"(v[i][j].y), "=r"(v[i][j].z), "=r"(v[i][j].w)
                     : "l"(from(i) + 4 * j)
                     : "memory");
      }
    }
    unsigned wrong = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        wrong |= (v[i][j].x ^ tag) | (v[i][j].y ^ tag) | (v[i][j].z ^ tag) | (v[i][j].w ^ tag);
      }
      out[i] =
          make_uint4(__byte_perm(v[i][0].x, v[i][0].y, 0x5410), __byte_perm(v[i][0].z, v[i][0].w, 0x5410),
                     __byte_perm(v[i][1].x, v[i][1].y, 0x5410), __byte_perm(v[i][1].z, v[i][1].w, 0x5410));
    }
    missing = (wrong >> 16) != 0;
  }
}
__device__ __forceinline__ uint4 await_8(const Tagged* from, unsigned round) {
  uint4 out[1];
  await_8<1>(
      round, [&](int) { return from; }, [](int) { return true; }, out);
  return out[0];
}

}  // namespace flash_mla::sm90
