// Tile: 64 keys x dim in fp32: element d of key t is word t of row d (256 bytes). A vector of keys is scored
// for 4 heads at a time.

#include "kernels/attention/indexer/cpu/key_tile.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/element.h"
#include "base/fp8.h"
#include "flash_mla/info.h"
#include "kernels/attention/dense_decode/cpu/isa.h"

// This file is compiled once for each instruction set.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention/indexer/cpu/key_tile.cpp"
#include <hwy/foreach_target.h>
//
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace flash_mla::cpu {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::CappedTag<float, 16>;

/// kCount heads over kVectors vectors of keys from `tile` on, added to `scores`.
template <int kCount, int kVectors>
HWY_INLINE void ScoreHeads(const float* HWY_RESTRICT tile, const float* HWY_RESTRICT query,
                           const float* weights, int dim, float* scores) {
  const F d;
  const auto lanes = static_cast<std::ptrdiff_t>(hn::Lanes(d));
  hn::Vec<F> sums[kCount][kVectors];
  for (auto& head : sums) {
    for (auto& sum : head) sum = hn::Zero(d);
  }
  for (int i = 0; i < dim; ++i) {
    hn::Vec<F> keys[kVectors];
    for (int v = 0; v < kVectors; ++v)
      keys[v] = hn::Load(d, tile + std::ptrdiff_t{i} * kTileKeys + v * lanes);
    for (int h = 0; h < kCount; ++h) {
      const auto element = hn::Set(d, query[h * dim + i]);
      for (int v = 0; v < kVectors; ++v) sums[h][v] = hn::MulAdd(keys[v], element, sums[h][v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    auto score = hn::LoadU(d, scores + v * lanes);
    for (int h = 0; h < kCount; ++h) {
      // Not a maximum: NaN must stay.
      const auto positive = hn::IfThenElse(hn::Lt(sums[h][v], hn::Zero(d)), hn::Zero(d), sums[h][v]);
      score = hn::MulAdd(hn::Set(d, weights[h]), positive, score);
    }
    hn::StoreU(score, d, scores + v * lanes);
  }
}

void Score(const void* tile, const void* query, const float* weights, int heads, int dim, float* scores) {
  constexpr int kHeads = 4, kVectors = 2;
  const auto lanes = static_cast<int>(hn::Lanes(F()));
  const auto* keys = static_cast<const float*>(tile);
  const auto* elements = static_cast<const float*>(query);
  std::fill_n(scores, kTileKeys, 0.0f);
  for (int t = 0; t < kTileKeys; t += kVectors * lanes) {
    int h = 0;
    for (; h + kHeads <= heads; h += kHeads) {
      ScoreHeads<kHeads, kVectors>(keys + t, elements + std::ptrdiff_t{h} * dim, weights + h, dim,
                                   scores + t);
    }
    for (; h < heads; ++h) {
      ScoreHeads<1, kVectors>(keys + t, elements + std::ptrdiff_t{h} * dim, weights + h, dim, scores + t);
    }
  }
}

}  // namespace

extern void (*const kIndexScore)(const void*, const void*, const float*, int, int, float*);
void (*const kIndexScore)(const void*, const void*, const float*, int, int, float*) = Score;

}  // namespace HWY_NAMESPACE
}  // namespace flash_mla::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_mla::cpu {
namespace {

std::size_t tile_bytes(int dim) { return static_cast<std::size_t>(dim) * kTileKeys * sizeof(float); }

std::size_t query_bytes(int heads, int dim) {
  return (static_cast<std::size_t>(heads) * static_cast<std::size_t>(dim) * sizeof(float) + 63) / 64 * 64;
}

float element_at(const std::byte* row, IndexElement element, int i) {
  static const std::array<float, 256> kE4m3 = [] {
    std::array<float, 256> values;
    for (std::size_t code = 0; code < 256; ++code) {
      values[code] = to_float(E4m3{static_cast<std::uint8_t>(code)});
    }
    return values;
  }();
  if (element == IndexElement::kE4m3) return kE4m3[static_cast<std::size_t>(row[i])];
  if (element == IndexElement::kBFloat16) {
    Bf16 x{};
    std::memcpy(&x, row + 2 * static_cast<std::ptrdiff_t>(i), sizeof(x));
    return to_float(x);
  }
  float x = 0;
  std::memcpy(&x, row + 4 * static_cast<std::ptrdiff_t>(i), sizeof(x));
  return x;
}

void pack_keys(const std::byte* const* keys, int n, IndexElement element, int dim, void* tile) {
  auto* to = static_cast<float*>(tile);
  for (int t = 0; t < kTileKeys; ++t) {
    const std::byte* key = keys[t < n ? t : 0];
    for (int i = 0; i < dim; ++i) to[std::ptrdiff_t{i} * kTileKeys + t] = element_at(key, element, i);
  }
}

void pack_query(const std::byte* query, IndexElement element, int heads, int dim, void* packed) {
  auto* to = static_cast<float*>(packed);
  for (int i = 0; i < heads * dim; ++i) to[i] = element_at(query, element, i);
}

}  // namespace

const IndexTileKernel& highway_index_tile_kernel() {
  static const IndexTileKernel kKernel = [] {
    IndexTileKernel kernel{tile_bytes, query_bytes, pack_keys, pack_query, HWY_NAMESPACE::kIndexScore};
    [[maybe_unused]] const std::string isa = cpu_isa().selected;
#if HWY_TARGETS & HWY_AVX3
    if (isa.starts_with("avx512")) kernel.score = N_AVX3::kIndexScore;
#endif
#if HWY_TARGETS & HWY_AVX2
    if (isa == "avx2") kernel.score = N_AVX2::kIndexScore;
#endif
    return kernel;
  }();
  return kKernel;
}

const IndexTileKernel& index_tile_kernel(IndexElement element) {
  const bool pairs = element != IndexElement::kFloat32 && has_bf16_pairs(cpu_isa().selected);
  return pairs ? avx512_bf16_index_tile_kernel() : highway_index_tile_kernel();
}

}  // namespace flash_mla::cpu
#endif  // HWY_ONCE
