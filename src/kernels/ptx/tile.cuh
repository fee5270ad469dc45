#pragma once

// Tiles of 16-bit elements in shared memory, as types, and products of them. A tile knows its element type,
// its shape and how it lies: chunks of 64 columns, one behind the other, each of kRows rows of 128 bytes with
// 128-byte swizzle, as the copy engine writes and wgmma reads it. As an operand a tile is K-major (its
// columns are summed over: both factors of S = Q K^T) or MN-major (its rows are: V of O = P V); step(i) is
// the slice of 16 of them that one instruction takes.
//
//   wgmma(scores, q.k_major().step(i), k.k_major().step(i), i > 0);  // S (+)= Q K^T, i to kColumns / 16
//   wgmma(out, weights[i], v.mn_major().step(i), true);              // O += P V, i to kRows / 16, P in
//   registers

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace flash_mla::sm90::ptx {

template <bool kBf16>
using Element = std::conditional_t<kBf16, __nv_bfloat16, __half>;

/// What lies contiguously in an operand: the dimension that is summed over, or the other one.
enum class Major { kK, kMn };

/// 16 elements along k of an operand in shared memory: what one instruction takes.
template <class T, Major kMajor>
struct Slice {
  std::uint64_t descriptor;
};

inline constexpr int kChunkColumns = 64;

/// In how many bits step(i) is added to a descriptor. The result is the same, the compiler's register
/// allotment is not: with 32 the dense decode kernel gets 48 instructions longer, with 64 prefill gets 104.
enum class StepBits { k32, k64 };

/// An operand in shared memory; kRows is the tile's.
template <class T, Major kMajor, int kRows, StepBits kBits>
struct Operand {
  std::uint64_t first;

  __device__ __forceinline__ Slice<T, kMajor> step(int i) const {
    // In units of 16 bytes: 2 to 16 columns, or 8 to a row.
    const std::uint32_t at = kMajor == Major::kK ? i / 4 * (kRows * 8) + i % 4 * 2 : i * 16 * 8;
    return {kBits == StepBits::k32 ? advance(first, at) : first + at};
  }
};

template <class T, int kRows, int kColumns, StepBits kBits = StepBits::k32>
struct alignas(1024) Tile {
  static_assert(sizeof(T) == 2 && kRows % 8 == 0 && kColumns % kChunkColumns == 0);
  static constexpr int kChunks = kColumns / kChunkColumns;
  static constexpr int kChunkElements = kRows * kChunkColumns;
  static constexpr std::uint32_t kChunkBytes = kChunkElements * sizeof(T);
  static constexpr std::uint32_t kAtom = 1024;  // 8 rows of 128 bytes

  T elements[kChunks][kChunkElements];

  /// Where row `row` of chunk `chunk` begins.
  __device__ __forceinline__ T* at(int chunk, int row = 0) { return &elements[chunk][row * kChunkColumns]; }

  /// The columns from `first` on, a multiple of 64.
  template <int kCount>
  __device__ __forceinline__ Tile<T, kRows, kCount, kBits>& columns(int first) {
    return reinterpret_cast<Tile<T, kRows, kCount, kBits>&>(elements[first / kChunkColumns]);
  }

  /// The rows from `first_row` on with k along the columns.
  __device__ __forceinline__ Operand<T, Major::kK, kRows, kBits> k_major(int first_row = 0) {
    return {swizzled_descriptor(at(0, first_row), 0, kAtom)};
  }
  /// All columns with k along the rows.
  __device__ __forceinline__ Operand<T, Major::kMn, kRows, kBits> mn_major() {
    return {swizzled_descriptor(at(0), kChunkBytes, kAtom)};
  }
};

/// Shared-memory address of 16-byte word `word` (8 columns) of row `row` of the chunk at `chunk`.
__device__ __forceinline__ std::uint32_t swizzled_word(std::uint32_t chunk, int row, int word) {
  return chunk + static_cast<std::uint32_t>(row * 128 + ((word ^ (row % 8)) * 16));
}

/// d (+)= A B of one slice each; d as the instruction's accumulators, whose number says how wide B is.
template <class T, Major kMajor, int kSums>
__device__ __forceinline__ void wgmma(float (&d)[kSums], Slice<T, Major::kK> a, Slice<T, kMajor> b,
                                      bool accumulate) {
  wgmma_ss<std::is_same_v<T, __nv_bfloat16>, kMajor == Major::kMn>(d, a.descriptor, b.descriptor, accumulate);
}
/// The same with A in registers.
template <class T, Major kMajor, int kSums>
__device__ __forceinline__ void wgmma(float (&d)[kSums], const std::uint32_t (&a)[4], Slice<T, kMajor> b,
                                      bool accumulate) {
  wgmma_rs<std::is_same_v<T, __nv_bfloat16>, kMajor == Major::kMn>(d, a, b.descriptor, accumulate);
}

}  // namespace flash_mla::sm90::ptx
