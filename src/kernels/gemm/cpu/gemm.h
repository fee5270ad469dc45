#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/matrix.h"
#include "base/quantized.h"

namespace flash_mla::cpu {

/// A weight matrix in oneDNN's blocked layout, or in panels for our own kernels.
class PackedWeight {
 public:
  PackedWeight();
  PackedWeight(PackedWeight&&) noexcept;
  PackedWeight& operator=(PackedWeight&&) noexcept;
  ~PackedWeight();
  std::int64_t out_features() const { return out_features_; }
  std::int64_t in_features() const { return in_features_; }
  /// Whether a product with that many rows is long enough to be shared between threads.
  bool worth_threads(std::int64_t rows) const;
  /// That it takes of memory.
  std::size_t bytes() const;

 private:
  friend class Gemm;
  struct Memory;
  std::unique_ptr<Memory> memory_;
  std::int64_t out_features_ = 0, in_features_ = 0;
};

/// How a product is cut and run.
struct GemmMode {
  int threads = 1;
  /// Rows are multiplied in zero-padded tiles of one fixed height, so that a row goes through the same
  /// instructions in the same order however many rows there are.
  bool batch_invariant = false;
  /// y += instead of y =
  bool accumulate = false;
};

/// Matrix products, by our own kernels on weights in panels and by oneDNN otherwise. Its compiled kernels are
/// kept, one for each tile height and shape; heights are powers of two, so there are few. Any thread may
/// call; inside a parallel region pass threads = 1.
class Gemm {
 public:
  Gemm();
  ~Gemm();

  /// True where this machine multiplies bfloat16 natively.
  static bool native_bfloat16();
  /// True where oneDNN has bfloat16 kernels at all.
  static bool supports_bfloat16();

  /// `weight` (out_features, in_features) row-major.
  PackedWeight pack(const float* weight, std::int64_t out_features, std::int64_t in_features,
                    DType dtype) const;

  /// The same in panels on every machine: then a sum's bits do not depend on how many output features there are, which
  /// may be some of a larger matrix's.
  PackedWeight pack_panels(const float* weight, std::int64_t out_features, std::int64_t in_features,
                           DType dtype) const;

  /// The same in 8 bits, for products with rows of `dtype`.
  PackedWeight pack_int8(const float* weight, std::int64_t out_features, std::int64_t in_features,
                         DType dtype) const;

  /// Codes as PanelWeight takes them, for products with rows of `dtype`.
  PackedWeight pack_quantized(const std::uint8_t* codes, const float* scales, const QuantizedFormat& format,
                              std::int64_t out_features, std::int64_t in_features, DType dtype) const;
  static bool takes(const QuantizedFormat& format, std::int64_t in_features, DType dtype);

  /// y = x·W^T + bias; `bias` (out_features) float32 or null. x in the weights' dtype, y in that or float32.
  void run(const Matrix& x, const PackedWeight& weight, const float* bias, const Matrix& y,
           const GemmMode& mode);

  /// y = a·b on dense operands of one fixed shape, one thread: a (m, k), b (k, n) or with `transpose_b`
  /// (n, k), all row-major; y float32.
  void run_tile(const void* a, const void* b, bool transpose_b, float* y, std::int64_t m, std::int64_t n,
                std::int64_t k, DType dtype, bool accumulate);

 private:
  struct Impl;
  // One tile of `height` rows from `first`; rows past the last are zero.
  void run_rows(const Matrix& x, const PackedWeight& weight, const float* bias, const Matrix& y,
                const GemmMode& mode, std::int64_t first, std::int64_t height, int threads);

  std::unique_ptr<Impl> impl_;
};

}  // namespace flash_mla::cpu
