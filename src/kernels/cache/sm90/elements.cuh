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

/// 16 elements as they lie in memory, so that loads are all under way before one is used.
template <class T>
struct Raw {
  alignas(16) T x[kLaneElements];
};

/// `wide`: the address is a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void load(Raw<T>& to, const T* from, bool wide) {
  if (wide) {
    for (int i = 0; i < static_cast<int>(sizeof(to) / 16); ++i) {
      reinterpret_cast<uint4*>(to.x)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
    for (int i = 0; i < kLaneElements; ++i) to.x[i] = from[i];
  }
}

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

/// Where a token of a pool in this format lies; `small`: slots fit into 32 bits, whose division is a third as
/// long.
template <KvFormat kFormat>
__device__ __forceinline__ kv::Token locate(const kv::Pool& any, std::int64_t slot, bool small) {
  kv::Pool pool = any;
  pool.format = kFormat;  // which decides what is computed
  if (small) {
    const auto s = static_cast<std::uint32_t>(slot), page_size = static_cast<std::uint32_t>(pool.page_size);
    const std::uint32_t page = s / page_size;
    return kv::locate(pool, page, s - page * page_size);
  }
  return kv::locate(pool, slot);
}

/// Alignment of every part of every token of a pool.
inline int pool_alignment(const kv::Pool& pool) {
  const auto address = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(pool.data));
  std::int64_t scales = 0;
  if (pool.format == KvFormat::kFp8V4) scales = kv::Fp8V4::kScaleBytes;  // of which a token's are 8
  return common_alignment({address, pool.page_stride, pool.token_stride, scales});
}

/// An integer tensor of 32 or 64 bits.
struct Integers {
  const void* data;
  bool wide;
  __device__ std::int64_t operator[](std::uint32_t i) const {
    return wide ? static_cast<const std::int64_t*>(data)[i] : static_cast<const std::int32_t*>(data)[i];
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
