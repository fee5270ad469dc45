#pragma once

// Random data and plain attention on the device, for cases too large for the CPU reference (which it is
// checked against on small ones).

#include <cstdint>

#include "flash_mla/decode.h"

namespace flash_mla::gpu_test {

/// q <- clamp(N(0, 1), -1, 1); the keys of every request <- clamp(N(0, 1) / 10, -1, 1), all other slots of
/// the pool <- NaN.
void fill_random(const DenseDecodeArgs& args, int max_length, std::uint64_t seed);

/// out (b, s_q, h_q, 512) and lse (b, h_q, s_q), float32 and dense, by three plain kernels in float32 (row
/// sums in float64). `scores`: b * s_q * h_q * max_length floats.
void attention(const DenseDecodeArgs& args, float softmax_scale, bool causal, int max_length, float* scores,
               float* out, float* lse);

struct Difference {
  unsigned long long wrong_out, wrong_lse;  ///< elements beyond the tolerances of the conformance suite
  double cosine;                            ///< 1 - 2 x.y / (x.x + y.y) over out
};

/// Compares args.out and args.lse with dense float32 results.
Difference compare(const DenseDecodeArgs& args, const float* out, const float* lse);

}  // namespace flash_mla::gpu_test
