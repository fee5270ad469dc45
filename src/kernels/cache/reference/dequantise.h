#pragma once

#include <cstring>

#include "base/element.h"
#include "base/fp8.h"
#include "kv/format.h"

namespace flash_mla::reference {

/// The token in `slot` as d_qk float64, nothing rounded.
inline void dequantise(const kv::Pool& pool, std::int64_t slot, double* out) {
  const kv::Token token = kv::locate(pool, slot);
  const auto load = [](const std::byte* from, auto& value) { std::memcpy(&value, from, sizeof(value)); };
  const auto e4m3 = [&](const std::byte* from, double scale) {
    E4m3 x{};
    load(from, x);
    return double{to_float(x)} * scale;
  };
  const int latent = pool.latent();
  for (int i = 0; i < latent; ++i) {
    if (pool.format == KvFormat::kFp8V32) {
      float scale = 0;
      load(token.scales + i / kv::Fp8V32::kTile * sizeof(scale), scale);
      out[i] = e4m3(token.latent + i, scale);
    } else if (pool.format == KvFormat::kFp8V4) {
      E8m0 scale{};
      load(token.scales + i / kv::Fp8V4::kTile, scale);
      out[i] = e4m3(token.latent + i, to_float(scale));
    } else if (pool.format == KvFormat::kFp8Tensor) {
      out[i] = e4m3(token.latent + i, pool.scale);
    }
  }
  // Rows, and the rope parts of kFp8V32 and kFp8V4, are 16-bit numbers one after the other.
  const auto halves = [&](const std::byte* from, double* to, int n) {
    for (int i = 0; i < n; ++i) {
      if (pool.format == KvFormat::kFloat16) {
        Fp16 x{};
        load(from + 2 * i, x);
        to[i] = to_float(x);
      } else {
        Bf16 x{};
        load(from + 2 * i, x);
        to[i] = to_float(x);
      }
    }
  };
  if (!kv::is_fp8(pool.format)) return halves(token.latent, out, pool.d_qk);
  if (pool.format == KvFormat::kFp8Tensor) {
    for (int i = 0; i < kv::kRopeWidth; ++i) out[latent + i] = e4m3(token.rope + i, pool.scale);
  } else {
    halves(token.rope, out + latent, kv::kRopeWidth);
  }
}

}  // namespace flash_mla::reference
