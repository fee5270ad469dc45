// Register tiles: 4 rows by 4 vectors of columns (a vector of w, an element of x broadcast), or 4 rows by 4 rows (vectors of both
// along the depth, added up across lanes at the end): 16 sums of 32 registers, of 16 with AVX2, where some are spilled.

#include "kernels/attention/mla_cascade/cpu/products.h"

#include <algorithm>
#include <string>

#include "flash_mla/info.h"

// This file is compiled once for each instruction set.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention/mla_cascade/cpu/products.cpp"
#include <hwy/foreach_target.h>
//
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace flash_mla::cpu {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::CappedTag<float, 16>;
constexpr int kTile = 4;

template <int kRows, int kVectors>
HWY_INLINE void ColumnTile(const float* x, std::int64_t x_stride, const float* w, std::int64_t w_stride,
                           float* y, std::int64_t y_stride, std::int64_t k) {
  const F d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  hn::Vec<F> sums[kRows][kVectors];
  for (auto& row : sums) {
    for (auto& sum : row) sum = hn::Zero(d);
  }
  for (std::int64_t i = 0; i < k; ++i) {
    hn::Vec<F> column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = hn::LoadU(d, w + i * w_stride + v * lanes);
    for (int r = 0; r < kRows; ++r) {
      const auto element = hn::Set(d, x[r * x_stride + i]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = hn::MulAdd(element, column[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sums[r][v], d, y + r * y_stride + v * lanes);
  }
}

template <int kVectors>
HWY_INLINE void ColumnTiles(const Rows& x, const float* w, std::int64_t w_stride, float* y,
                            std::int64_t y_stride, std::int64_t m, std::int64_t k) {
  std::int64_t r = 0;
  for (; r + kTile <= m; r += kTile) {
    ColumnTile<kTile, kVectors>(x.data + r * x.stride, x.stride, w, w_stride, y + r * y_stride, y_stride, k);
  }
  for (; r < m; ++r) {
    ColumnTile<1, kVectors>(x.data + r * x.stride, x.stride, w, w_stride, y + r * y_stride, y_stride, k);
  }
}

void Columns(const Rows& x, const Rows& w, const Rows& y, std::int64_t m, std::int64_t n, std::int64_t k) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(F()));
  std::int64_t c = 0;
  for (; c + kTile * lanes <= n; c += kTile * lanes) {
    ColumnTiles<kTile>(x, w.data + c, w.stride, y.data + c, y.stride, m, k);
  }
  for (; c < n; c += lanes) ColumnTiles<1>(x, w.data + c, w.stride, y.data + c, y.stride, m, k);
}

template <int kRows, int kColumns>
HWY_INLINE void RowTile(const float* x, std::int64_t x_stride, const float* w, std::int64_t w_stride,
                        float* y, std::int64_t y_stride, std::int64_t k) {
  const F d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  hn::Vec<F> sums[kRows][kColumns];
  for (auto& row : sums) {
    for (auto& sum : row) sum = hn::Zero(d);
  }
  for (std::int64_t i = 0; i < k; i += lanes) {
    hn::Vec<F> weight[kColumns];
    for (int c = 0; c < kColumns; ++c) weight[c] = hn::LoadU(d, w + c * w_stride + i);
    for (int r = 0; r < kRows; ++r) {
      const auto element = hn::LoadU(d, x + r * x_stride + i);
      for (int c = 0; c < kColumns; ++c) sums[r][c] = hn::MulAdd(element, weight[c], sums[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) y[r * y_stride + c] = hn::GetLane(hn::SumOfLanes(d, sums[r][c]));
  }
}

template <int kRows>
HWY_INLINE void RowTiles(const float* x, std::int64_t x_stride, const Rows& w, float* y,
                         std::int64_t y_stride, std::int64_t n, std::int64_t k) {
  std::int64_t c = 0;
  for (; c + kTile <= n; c += kTile) {
    RowTile<kRows, kTile>(x, x_stride, w.data + c * w.stride, w.stride, y + c, y_stride, k);
  }
  for (; c < n; ++c) RowTile<kRows, 1>(x, x_stride, w.data + c * w.stride, w.stride, y + c, y_stride, k);
}

void RowsByRows(const Rows& x, const Rows& w, const Rows& y, std::int64_t m, std::int64_t n, std::int64_t k) {
  std::int64_t r = 0;
  for (; r + kTile <= m; r += kTile) {
    RowTiles<kTile>(x.data + r * x.stride, x.stride, w, y.data + r * y.stride, y.stride, n, k);
  }
  for (; r < m; ++r) RowTiles<1>(x.data + r * x.stride, x.stride, w, y.data + r * y.stride, y.stride, n, k);
}

}  // namespace

extern const ProductKernels kProducts;
const ProductKernels kProducts{Columns, RowsByRows};

}  // namespace HWY_NAMESPACE
}  // namespace flash_mla::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_mla::cpu {

const ProductKernels& product_kernels() {
  static const ProductKernels* const kKernels = [] {
    [[maybe_unused]] const std::string isa = cpu_isa().selected;
#if HWY_TARGETS & HWY_AVX3
    if (isa.starts_with("avx512")) return &N_AVX3::kProducts;
#endif
#if HWY_TARGETS & HWY_AVX2
    if (isa == "avx2") return &N_AVX2::kProducts;
#endif
    return &HWY_NAMESPACE::kProducts;  // here that of HWY_STATIC_TARGET
  }();
  return *kKernels;
}

}  // namespace flash_mla::cpu
#endif  // HWY_ONCE
