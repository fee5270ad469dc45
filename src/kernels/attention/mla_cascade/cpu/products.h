#pragma once

// Products of fp32 rows that fit a cache: of a block of rows with what a head has of kv_b.

#include <cstddef>
#include <cstdint>

namespace flash_mla::cpu {

/// Rows lie `stride` elements apart and are padded with zeros to multiples of kPad.
struct Rows {
  float* data;
  std::int64_t stride;
};

struct ProductKernels {
  static constexpr std::int64_t kPad = 16;
  /// y (m, n) = x (m, k) · w (k, n); n a multiple of kPad.
  void (*columns)(const Rows& x, const Rows& w, const Rows& y, std::int64_t m, std::int64_t n,
                  std::int64_t k);
  /// y (m, n) = x (m, k) · w (n, k)^T; k a multiple of kPad.
  void (*rows)(const Rows& x, const Rows& w, const Rows& y, std::int64_t m, std::int64_t n, std::int64_t k);
};

/// For the selected instruction set.
const ProductKernels& product_kernels();

}  // namespace flash_mla::cpu
