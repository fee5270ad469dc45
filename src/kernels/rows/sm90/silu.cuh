#pragma once

namespace flash_mla::sm90 {

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

}  // namespace flash_mla::sm90
