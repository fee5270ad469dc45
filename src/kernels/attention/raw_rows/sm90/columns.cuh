#pragma once

// V^T as a product's A operand, by formats of rows.
//
// An instruction has 64 columns as M and 16 keys, a slot, as k. The thread of lane 4 g + c of warp w has two columns of
// it, of the keys 2 c, 2 c + 1, 2 c + 8 and 2 c + 9. Two instructions share a block of 128 columns: of that a thread
// has 32 w + 4 g to 32 w + 4 g + 3, one load of a key's row, two for each. Of a block of 64 it has 16 w + 2 g and the
// next. Byte permutations of two keys' words give the pairs of keys that A's registers hold.

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/ptx/words.cuh"

namespace flash_mla::sm90::raw_rows {

/// Words of four keys: of two columns and more.
struct FourKeys {
  std::uint32_t key[4];

  // `low`: the permutation that gives the first (or the last two) columns of the keys i and i + 1.
  __device__ std::uint32_t pair(int i, unsigned permutation) const {
    return __byte_perm(key[i], key[i + 1], permutation);
  }
  // e4m3 of two columns, the first (0) or the last (1) of four.
  __device__ void widen(std::uint32_t (&a)[4], int columns) const {
    const std::uint32_t low = pair(0, columns == 0 ? 0x5140 : 0x7362);
    const std::uint32_t high = pair(2, columns == 0 ? 0x5140 : 0x7362);
    a[0] = widen_low(low);
    a[1] = widen_high(low);
    a[2] = widen_low(high);
    a[3] = widen_high(high);
  }
  // Two columns of 16 bits.
  __device__ void select(std::uint32_t (&a)[4]) const {
    a[0] = pair(0, 0x5410);
    a[1] = pair(0, 0x7632);
    a[2] = pair(2, 0x5410);
    a[3] = pair(2, 0x7632);
  }
};

struct ColumnsOfLane {
  const int warp, lane;
  __device__ ColumnsOfLane(int w, int l) : warp(w), lane(l) {}

  // Where this thread has its columns of a block, elements.
  __device__ int in_128() const { return warp * 32 + lane / 4 * 4; }
  __device__ int in_64() const { return warp * 16 + lane / 4 * 2; }

  template <class S>
  __device__ std::uint32_t row(const S& s, int slot) const {
    return ptx::smem_address(s.rows[slot]) + lane % 4 * 2 * S::Format::kStride;
  }
  template <int kStride>
  __device__ static FourKeys load(std::uint32_t at) {
    using ptx::load_shared;
    return {load_shared<std::uint32_t>(at), load_shared<std::uint32_t>(at + kStride),
            load_shared<std::uint32_t>(at + 8 * kStride), load_shared<std::uint32_t>(at + 9 * kStride)};
  }
};

/// What Values asks of a format: load(), then widen(), of each of a slot's instructions m in order; first(m), this
/// thread's first column of it, of the warpgroup's 256, are_four(m), whether instruction m + 1 has the next two; weight(m),
/// the tile of P.
template <class F, int kWg>
struct ValueColumns;

/// 512 columns of e4m3, as V32Rows and TensorRows have them.
template <class F, int kWg>
struct E4m3Columns : ColumnsOfLane {
  using ColumnsOfLane::ColumnsOfLane;
  FourKeys words{};

  __device__ int first(int m) const { return m / 2 * 128 + in_128() + m % 2 * 2; }
  __device__ static constexpr bool are_four(int) { return true; }
  template <class S>
  __device__ void load(const S& s, int slot, int m) {
    if (m % 2 == 0)
      words = ColumnsOfLane::load<F::kStride>(row(s, slot) + kWg * 256 + m / 2 * 128 + in_128());
  }
  __device__ void widen(std::uint32_t (&a)[4], int m) const { words.widen(a, m % 2); }
};

/// What elements of a thread's four keys are multiplied with in a block of columns: of the first and the last two keys.
struct KeyPowers {
  std::uint32_t of[2];

  template <class S>
  __device__ void load(const S& s, int slot, int lane, int block) {
    const std::uint32_t at = ptx::smem_address(&s.scales(slot).of[block][lane % 4 * 2]);
    of[0] = ptx::load_shared<std::uint32_t>(at);
    of[1] = ptx::load_shared<std::uint32_t>(at + 16);
  }
  __device__ void apply(std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = times(a[i], of[i / 2]);
  }
};

template <int kWg>
struct ValueColumns<V32Rows, kWg> : E4m3Columns<V32Rows, kWg> {
  using E4m3Columns<V32Rows, kWg>::E4m3Columns;
  __device__ static constexpr int weight(int m) { return 2 * kWg + m / 2; }
};

template <int kWg>
struct ValueColumns<TensorRows, kWg> : E4m3Columns<TensorRows, kWg> {
  using E4m3Columns<TensorRows, kWg>::E4m3Columns;
  __device__ static constexpr int weight(int) { return 0; }
};

/// The second warpgroup has 128 columns, 64, and the rope part.
template <int kWg>
struct ValueColumns<V4Rows, kWg> : ColumnsOfLane {
  using ColumnsOfLane::ColumnsOfLane;
  FourKeys words{};
  KeyPowers powers{};

  __device__ static constexpr bool are_four(int m) { return kWg == 0 || m < 2; }
  __device__ static constexpr bool is_rope(int m) { return kWg == 1 && m == 3; }
  __device__ static constexpr int weight(int m) { return is_rope(m) ? 1 : 0; }
  __device__ int first(int m) const {
    return are_four(m) ? m / 2 * 128 + in_128() + m % 2 * 2 : m * 64 + in_64();
  }
  template <class S>
  __device__ void load(const S& s, int slot, int m) {
    const std::uint32_t from = row(s, slot);
    if (is_rope(m)) {
      words = ColumnsOfLane::load<V4Rows::kStride>(from + V4Rows::kRopeOffset + in_64() * 2);
    } else if (!are_four(m)) {
      const std::uint32_t at = from + kWg * 256 + m * 64 + in_64();
      words = {ptx::load_shared_2(at), ptx::load_shared_2(at + V4Rows::kStride),
               ptx::load_shared_2(at + 8 * V4Rows::kStride), ptx::load_shared_2(at + 9 * V4Rows::kStride)};
      powers.load(s, slot, lane, 6);
    } else if (m % 2 == 0) {
      words = ColumnsOfLane::load<V4Rows::kStride>(from + kWg * 256 + m / 2 * 128 + in_128());
      powers.load(s, slot, lane, kWg * 4 + m + warp / 2);
    }
  }
  __device__ void widen(std::uint32_t (&a)[4], int m) const {
    if (is_rope(m)) return words.select(a);
    words.widen(a, are_four(m) ? m % 2 : 0);
    powers.apply(a);
  }
};

template <int kDim, int kWg>
struct ValueColumns<WideRows<kDim>, kWg> : ColumnsOfLane {
  using ColumnsOfLane::ColumnsOfLane;
  using F = WideRows<kDim>;
  FourKeys words[2]{};  // of the first and the last two columns

  __device__ int first(int m) const { return m / 2 * 128 + in_128() + m % 2 * 2; }
  __device__ static constexpr bool are_four(int) { return true; }
  __device__ static constexpr int weight(int) { return 0; }
  template <class S>
  __device__ void load(const S& s, int slot, int m) {
    if (m % 2 != 0) return;
    const std::uint32_t at = row(s, slot) + (kWg * 256 + m / 2 * 128 + in_128()) * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto x = ptx::load_shared<uint2>(at + (i / 2 * 8 + i % 2) * F::kStride);
      words[0].key[i] = x.x;
      words[1].key[i] = x.y;
    }
  }
  __device__ void widen(std::uint32_t (&a)[4], int m) const { words[m % 2].select(a); }
};

}  // namespace flash_mla::sm90::raw_rows
