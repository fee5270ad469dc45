#pragma once

// Where the bytes of a token lie in a cache page: include/flash_mla/kv_cache.h in numbers. Usable in device
// code.

#include <cstddef>
#include <cstdint>

#include "flash_mla/kv_cache.h"

namespace flash_mla::kv {

/// Elements of the rope part, in every format.
inline constexpr int kRopeWidth = 64;

/// DeepSeek V3.2: 512 e4m3, 4 float32, 64 bfloat16.
struct Fp8V32 {
  static constexpr int kLatent = 512, kTile = 128, kScales = 4;
  static constexpr int kScaleOffset = 512, kRopeOffset = 528, kTokenBytes = 656;
};

/// DeepSeek V4: rows of 448 e4m3 and 64 bfloat16, and after the page's last row its scales, 8 bytes a token.
struct Fp8V4 {
  static constexpr int kLatent = 448, kTile = 64, kScales = 7;
  static constexpr int kRowBytes = 576, kRopeOffset = 448, kScaleBytes = 8, kTokenBytes = 584;
};

/// 576 e4m3.
struct Fp8Tensor {
  static constexpr int kLatent = 512, kRopeOffset = 512, kTokenBytes = 576;
};

constexpr bool is_fp8(KvFormat format) {
  return format == KvFormat::kFp8V32 || format == KvFormat::kFp8V4 || format == KvFormat::kFp8Tensor;
}

/// Bytes of a token, scales included, for one of d_qk elements.
constexpr int token_bytes(KvFormat format, int d_qk) {
  switch (format) {
    case KvFormat::kFp8V32:
      return Fp8V32::kTokenBytes;
    case KvFormat::kFp8V4:
      return Fp8V4::kTokenBytes;
    case KvFormat::kFp8Tensor:
      return Fp8Tensor::kTokenBytes;
    default:
      return 2 * d_qk;
  }
}

/// Elements of K, where the format alone says so; 0 for rows of bfloat16 and float16.
constexpr int format_d_qk(KvFormat format) {
  switch (format) {
    case KvFormat::kFp8V32:
    case KvFormat::kFp8Tensor:
      return 576;
    case KvFormat::kFp8V4:
      return 512;
    default:
      return 0;
  }
}

/// A KvCacheView that has been checked, as kernels take it: byte strides, and no stride that means nothing.
struct Pool {
  std::byte* data = nullptr;
  std::int64_t page_stride = 0;   ///< bytes
  std::int64_t token_stride = 0;  ///< bytes; of a kFp8V4 page that of its rows, 576
  std::int64_t page_size = 0;
  std::int64_t num_pages = 0;
  KvFormat format = KvFormat::kBFloat16;
  int d_qk = 0;
  float scale = 1.0f;

  constexpr std::int64_t num_slots() const { return num_pages * page_size; }
  constexpr int latent() const { return d_qk - kRopeWidth; }
};

inline Pool make_pool(const KvCacheView& view) {
  Pool p;
  if (!view.defined()) return p;
  const TensorView& t = view.data;
  const auto element = static_cast<std::int64_t>(dtype_size(t.dtype));
  p.data = static_cast<std::byte*>(t.data);
  p.num_pages = t.size(0);
  p.page_size = t.size(1);
  // The stride of a dimension of one element may be anything, and all of a tensor of none.
  const bool empty = t.numel() == 0;
  p.page_stride = t.size(0) > 1 && !empty ? t.stride(0) * element : 0;
  p.token_stride = t.size(1) > 1 && !empty ? t.stride(1) * element : 0;
  if (view.format == KvFormat::kFp8V4) p.token_stride = Fp8V4::kRowBytes;
  p.format = view.format;
  p.d_qk = is_fp8(view.format) ? format_d_qk(view.format) : static_cast<int>(t.size(3));
  p.scale = view.scale;
  return p;
}

/// Where a token's parts begin. `scales` is nullptr in formats without.
struct Token {
  std::byte* latent = nullptr;
  std::byte* rope = nullptr;
  std::byte* scales = nullptr;
};

constexpr Token locate(const Pool& pool, std::int64_t page, std::int64_t offset) {
  std::byte* const first = pool.data + page * pool.page_stride;
  std::byte* const row = first + offset * pool.token_stride;
  switch (pool.format) {
    case KvFormat::kFp8V32:
      return {row, row + Fp8V32::kRopeOffset, row + Fp8V32::kScaleOffset};
    case KvFormat::kFp8V4:
      return {row, row + Fp8V4::kRopeOffset,
              first + pool.page_size * Fp8V4::kRowBytes + offset * Fp8V4::kScaleBytes};
    case KvFormat::kFp8Tensor:
      return {row, row + Fp8Tensor::kRopeOffset, nullptr};
    default:
      return {row, row + 2 * static_cast<std::ptrdiff_t>(pool.latent()), nullptr};
  }
}

/// The token in `slot`, 0 <= slot < pool.num_slots().
constexpr Token locate(const Pool& pool, std::int64_t slot) {
  return locate(pool, slot / pool.page_size, slot % pool.page_size);
}

}  // namespace flash_mla::kv
