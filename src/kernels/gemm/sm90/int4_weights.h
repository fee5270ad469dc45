#pragma once

// How the kernels take weights of 4 bits: expert_ffn() in moe.h, weight_stream.h, grouped_gemm.h.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash_mla::sm90 {

/// Columns that share a scale, each row on its own.
inline constexpr std::int64_t kInt4ScaleColumns = 128;

// weight[row, column] = (code - 8) * scale, of codes from 0 to 15. A matrix (rows, columns), rows divisible by 2 and
// columns by 8, is words of 32 bits, each 8 columns of a row; two rows lie together so that 16 bytes are 16 columns of
// both:
//   word ((row / 2) * (columns / 8) + column / 8) * 2 + row % 2, bits 4 * int4_place(column) and up.
// Its scales are (ceil(columns / 128), rows): those of neighbouring rows beside each other.

/// Word of a code, within its matrix.
constexpr std::int64_t int4_word(std::int64_t row, std::int64_t column, std::int64_t columns) {
  return (row / 2 * (columns / 8) + column / 8) * 2 + row % 2;
}
/// Place of a code in its word: even columns in the lower half, so that neighbours are the halves of a register.
constexpr int int4_place(std::int64_t column) { return static_cast<int>(column % 2 * 4 + column % 8 / 2); }

/// Queues `words` words of codes from 1 to 15, evenly distributed, a function of seed and index alone. Returns
/// cudaErrorInvalidValue for a negative count and a missing pointer.
cudaError_t fill_random_int4(void* codes, std::int64_t words, std::uint64_t seed, cudaStream_t stream);
inline constexpr float kRandomInt4Deviation = 4.32f;

}  // namespace flash_mla::sm90
