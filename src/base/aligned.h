#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include "base/buffer.h"

namespace flash_mla {

/// Uninitialised host memory that begins at a multiple of 64 bytes, a cache line and a vector of AVX-512.
inline Buffer allocate_aligned(std::size_t bytes) {
  constexpr std::size_t kAlignment = 64;
  auto* data =
      static_cast<std::byte*>(::operator new (std::max(bytes, kAlignment), std::align_val_t{kAlignment}));
  return {std::shared_ptr<std::byte>(
              data, [](std::byte* p) { ::operator delete (p, std::align_val_t{kAlignment}); }),
          bytes};
}

}  // namespace flash_mla
