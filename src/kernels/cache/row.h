#pragma once

// What append does to a token's row, one operation of float32 at a time and in one order: its bits are every
// backend's. Usable in device code.

#include <cmath>

#include "kernels/quant/recipe.h"
#include "kv/format.h"

namespace flash_mla::cache {

/// Elements of the latent that a lane of a warp holds, next to each other. Lane l holds the rope part's pair l
/// as well.
inline constexpr int kLaneElements = 16;
inline constexpr int kLanes = 32;

// No product and sum of these may become one operation.
FLASH_MLA_QUANT_FUNCTION float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
FLASH_MLA_QUANT_FUNCTION float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
FLASH_MLA_QUANT_FUNCTION float square_root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

/// The squares of kLaneElements elements, summed by halves: a tree, so that sums do not wait for each other.
FLASH_MLA_QUANT_FUNCTION float lane_squares(const float* x) {
  float y[kLaneElements];
  for (int i = 0; i < kLaneElements; ++i) y[i] = multiply(x[i], x[i]);
  for (int half = kLaneElements / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) y[i] = add(y[i], y[i + half]);
  }
  return y[0];
}

/// That and the squares of the lane's pair of the rope part.
FLASH_MLA_QUANT_FUNCTION float with_pair_squares(float squares, const float* pair) {
  return add(add(squares, multiply(pair[0], pair[0])), multiply(pair[1], pair[1]));
}

/// What the norm multiplies by: `squares` is the sum of all lanes', summed by halves too, and `share` 1 / n,
/// rounded, of n elements.
FLASH_MLA_QUANT_FUNCTION float norm_factor(float squares, float share, float eps) {
  const float root = square_root(add(multiply(squares, share), eps));
#ifdef __CUDA_ARCH__
  return __frcp_rn(root);
#else
  return 1.0f / root;
#endif
}

/// Turns a pair.
FLASH_MLA_QUANT_FUNCTION void rotate(float* pair, float cosine, float sine) {
  const float a = pair[0], b = pair[1];
  pair[0] = add(multiply(a, cosine), -multiply(b, sine));
  pair[1] = add(multiply(a, sine), multiply(b, cosine));
}

}  // namespace flash_mla::cache
