#pragma once

// Scores as a call brings them: any element type, logits or probabilities, or what of a target's probabilities a draft's leave.

#include "base/cuda/element.cuh"
#include "kernels/sampling/sm90/row.cuh"

namespace flash_mla::sm90::draws {

template <class T>
struct Scores {
  const T* row;
  const T* minus = nullptr;  ///< taken off, down to 0
  bool probabilities = false;
  bool counted = false;  ///< every token that is possible has the weight 1
  float largest = 0, scale = 1;
  u64 min_weight = 1;

  __device__ float at(int i) const {
    const float x = as_float(row[i]);
    return minus == nullptr ? x : fmaxf(x - as_float(minus[i]), 0.0f);
  }
  /// A NaN is not.
  __device__ bool possible(float x) const { return x > (probabilities ? 0.0f : -INFINITY); }
  __device__ u64 weight(float x) const {
    if (!possible(x)) return 0;
    if (counted) return 1;
    const u64 w = probabilities ? probability_weight(x, largest) : draw_weight(x - largest, scale);
    return w >= min_weight ? w : 0;
  }
  /// Of probabilities by their exponents and the first four bits behind the point: 16 bins an octave.
  __device__ int bin(float x) const {
    if (probabilities) {
      return static_cast<int>(
          min((__float_as_uint(largest) - __float_as_uint(x)) >> 19, static_cast<unsigned>(kBins - 1)));
    }
    return static_cast<int>(fminf(plain_mul(x - largest, -scale) * kBinsPerUnit, kBins - 1));
  }
  __device__ u64 least_weight(int bin) const {
    if (!probabilities) return draw_weight(static_cast<float>(-1 - bin) / kBinsPerUnit, 1.0f);
    const unsigned below = static_cast<unsigned>(bin + 1) << 19, bits = __float_as_uint(largest);
    if (bin == kBins - 1 || below >= bits) return 0;
    return probability_weight(__uint_as_float(bits - below), largest);
  }
  template <class F>
  __device__ void for_range(int begin, int end, int /*size*/, int lane, const F& f) const {
#pragma unroll 4
    for (int i = begin + lane; i < end; i += kWarp) f(at(i), i);
  }
};

}  // namespace flash_mla::sm90::draws
