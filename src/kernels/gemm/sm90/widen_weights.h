#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash_mla::sm90 {

/// Rows and columns of weights in e4m3 that share a scale (SkinnyGemm::weight_scales).
inline constexpr std::int64_t kE4m3ScaleRows = 8, kE4m3ScaleColumns = 128;

/// out = codes times scales, rounded to bfloat16: what products of many rows multiply.
struct WidenWeights {
  const void* codes = nullptr;    ///< (rows, columns) e4m3, dense
  const float* scales = nullptr;  ///< (ceil(rows / 8), ceil(columns / 128))
  void* out = nullptr;            ///< (rows, columns) bfloat16, dense
  std::int64_t rows = 0, columns = 0;
};

/// Queues it on `stream`: no allocation, no synchronisation; may be captured in a CUDA graph. Quick where columns are
/// divisible by 16 and codes and out aligned to 16 bytes; correct for any. Returns cudaErrorInvalidValue for negative
/// sizes and missing pointers.
cudaError_t widen_weights(const WidenWeights& args, cudaStream_t stream);

/// Queues `count` codes that are normal-like with deviation 64, a function of seed and index alone.
cudaError_t fill_random_e4m3(void* codes, std::int64_t count, std::uint64_t seed, cudaStream_t stream);
inline constexpr float kRandomE4m3Deviation = 64;

}  // namespace flash_mla::sm90
