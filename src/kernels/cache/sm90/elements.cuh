#pragma once

// Elements of rows and tokens, a lane's 16 neighbours at a time, in fp32 registers.

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "base/cuda/element.cuh"
#include "flash_mla/error.h"
#include "kernels/cache/row.h"

namespace flash_mla::sm90::cache {

using flash_mla::cache::kLaneElements;

inline constexpr int kWarp = 32;
inline constexpr int kWarps = 4;  ///< of a block, a token each

/// The largest of 16, 8, 4, 2 and 1 that divides all of them.
constexpr int common_alignment(std::initializer_list<std::int64_t> numbers) {
  int unit = 16;
  for (const std::int64_t n : numbers) {
    while (n % unit != 0) unit /= 2;
  }
  return unit;
}

/// kCount elements as they lie in memory: loads are all under way before one is used.
template <class T, int kCount>
struct Raw {
  static constexpr int kWords = kCount * static_cast<int>(sizeof(T)) / 4;
  std::uint32_t words[kWords];

  /// From an address that is a multiple of `kAlignment` bytes where `aligned`, else of an element's.
  template <int kAlignment>
  __device__ __forceinline__ void load(const T* from, bool aligned) {
    if (aligned) {
      if constexpr (kAlignment == 16) {
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
          const uint4 v = reinterpret_cast<const uint4*>(from)[i];
          words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const std::uint32_t*>(from)[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if constexpr (sizeof(T) == 4) {
          words[i] = reinterpret_cast<const std::uint32_t*>(from)[i];
        } else {
          words[i] = from[2 * i].bits | static_cast<std::uint32_t>(from[2 * i + 1].bits) << 16;
        }
      }
    }
  }
  __device__ __forceinline__ void to_floats(float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) {
        x[i] = __uint_as_float(words[i]);
      } else {
        unpack<T>(words[i], x[2 * i], x[2 * i + 1]);
      }
    }
  }
};

/// kBytes of `from`, 4 or 16, to an address that is a multiple of `unit`.
template <int kBytes>
__device__ __forceinline__ void store(std::byte* to, const void* from, int unit) {
  const auto* words = static_cast<const std::uint32_t*>(from);
  if constexpr (kBytes == 16) {
    if (unit >= 16) {
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      return;
    }
    if (unit == 8) {
      reinterpret_cast<uint2*>(to)[0] = make_uint2(words[0], words[1]);
      reinterpret_cast<uint2*>(to)[1] = make_uint2(words[2], words[3]);
      return;
    }
  }
  for (int i = 0; i < kBytes / 4; ++i) {
    if (unit >= 4) {
      reinterpret_cast<std::uint32_t*>(to)[i] = words[i];
    } else {
      for (int j = 0; j < 4; ++j) to[4 * i + j] = static_cast<std::byte>(words[i] >> 8 * j);
    }
  }
}

/// The same for reading.
template <int kBytes>
__device__ __forceinline__ void load(void* to, const std::byte* from, int unit) {
  auto* words = static_cast<std::uint32_t*>(to);
  if constexpr (kBytes == 16) {
    if (unit >= 16) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      return;
    }
    if (unit == 8) {
      const uint2 low = reinterpret_cast<const uint2*>(from)[0],
                  high = reinterpret_cast<const uint2*>(from)[1];
      words[0] = low.x, words[1] = low.y, words[2] = high.x, words[3] = high.y;
      return;
    }
  }
  for (int i = 0; i < kBytes / 4; ++i) {
    if (unit >= 4) {
      words[i] = reinterpret_cast<const std::uint32_t*>(from)[i];
    } else {
      words[i] = 0;
      for (int j = 0; j < 4; ++j) words[i] |= static_cast<std::uint32_t>(from[4 * i + j]) << 8 * j;
    }
  }
}

/// Two neighbours in one word, the first in its low half.
template <class T>
__device__ __forceinline__ std::uint32_t halves(float first, float second) {
  return from_float<T>(first).bits | static_cast<std::uint32_t>(from_float<T>(second).bits) << 16;
}

/// How slots become pages: a division of 64 bits, one of 32 where that is enough, a shift where pages are powers of
/// two. What a division costs is a quarter of what the rest of a token does.
struct SlotDivision {
  bool small;
  int shift;  ///< -1: none
};
inline SlotDivision slot_division(const kv::Pool& pool) {
  SlotDivision d{pool.num_slots() <= INT32_MAX, -1};
  for (int shift = 0; shift < 31; ++shift) {
    if (pool.page_size == std::int64_t{1} << shift) d.shift = shift;
  }
  return d;
}

/// Where a token of a pool in this format lies.
template <KvFormat kFormat>
__device__ __forceinline__ kv::Token locate(const kv::Pool& any, std::int64_t slot, const SlotDivision& d) {
  kv::Pool pool = any;
  pool.format = kFormat;  // which decides what is computed
  if (d.small) {
    const auto s = static_cast<std::uint32_t>(slot), page_size = static_cast<std::uint32_t>(pool.page_size);
    if (d.shift >= 0) return kv::locate(pool, s >> d.shift, s & (page_size - 1));
    const std::uint32_t page = s / page_size;
    return kv::locate(pool, page, s - page * page_size);
  }
  return kv::locate(pool, slot);
}

/// Alignment of every token of a pool, but for single bytes of scales.
inline int pool_alignment(const kv::Pool& pool) {
  const auto address = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(pool.data));
  return common_alignment({address, pool.page_stride, pool.token_stride});
}

/// An integer tensor of 32 or 64 bits. What is loaded becomes a number apart from it, so that nothing waits for it before
/// it has to.
struct Integers {
  const void* data;
  bool wide;

  struct Raw {
    std::uint32_t low, high;
  };
  __device__ __forceinline__ Raw load(std::uint32_t i) const {
    const auto* at =
        static_cast<const std::uint32_t*>(data) + (static_cast<std::size_t>(i) << (wide ? 1 : 0));
    return {at[0], wide ? at[1] : 0};
  }
  __device__ __forceinline__ std::int64_t value(Raw raw) const {
    return static_cast<std::int64_t>(
               wide ? raw.high : static_cast<std::uint32_t>(static_cast<std::int32_t>(raw.low) >> 31))
               << 32 |
           raw.low;
  }
};
inline Integers integers(const TensorView& t) { return {t.data, t.dtype == DType::kInt64}; }

/// Rows of t, of which 32 bits count the warps.
inline std::uint32_t count_of(const TensorView& t, const char* name) {
  if (t.size(0) > INT32_MAX) {
    throw Unsupported(std::string(name) + ".shape[0] is " + std::to_string(t.size(0)) +
                      "; the sm90 backend takes up to 2147483647 tokens");
  }
  return static_cast<std::uint32_t>(t.size(0));
}

}  // namespace flash_mla::sm90::cache
