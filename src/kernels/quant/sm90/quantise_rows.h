#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash_mla::sm90 {

/// Activations to e4m3 with a scale for every row and 128 columns: the largest magnitude among them over 448.
struct QuantiseRows {
  const void* x = nullptr;             ///< (rows, columns) bfloat16, rows x_stride elements apart; 16 bytes
  std::int64_t x_stride = 0;           ///< divisible by 8
  void* codes = nullptr;               ///< out (rows, columns) e4m3, dense; 8 bytes
  float* scales = nullptr;             ///< out (rows, ceil(columns / 128)), dense
  std::int64_t rows = 0, columns = 0;  ///< columns divisible by 8
  /// Not null: as NarrowGemm::x takes it (gemm/sm90/narrow_gemm.h). Rows of codes are ceil(columns / 128) * 128 bytes, in
  /// int4_order, and these are the offsets.
  float* offsets = nullptr;
  bool programmatic_launch = false;
};

/// Queues it on `stream`: no allocation, no synchronisation; may be captured in a CUDA graph. Returns
/// cudaErrorInvalidValue for missing pointers and sizes or strides that are not so.
cudaError_t quantise_rows(const QuantiseRows& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
