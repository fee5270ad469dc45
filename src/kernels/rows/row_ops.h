#pragma once

// The public operations on rows (include/flash_mla/rows.h) as backends take them: arguments have been checked.

#include "flash_mla/rows.h"

namespace flash_mla {

struct NormCall {
  TensorView x, residual, weight, out;  ///< residual may be undefined
  RmsNormOptions norm;
};
struct GateCall {
  TensorView gate_up, out;
  Activation activation;
};
struct RopeCall {
  TensorView x, positions, cos_sin, out;  ///< cos_sin may be undefined
  RopeOptions rope;                       ///< with rotary_dim resolved
};

namespace cpu {
void rms_norm(const NormCall& call, int num_threads);
void gated_activation(const GateCall& call, int num_threads);
void apply_rope(const RopeCall& call, int num_threads);
}  // namespace cpu

namespace sm90 {
/// Pairs of a head whose frequencies the kernel takes along.
inline constexpr int kMaxRopePairs = 256;
void rms_norm(const NormCall& call, void* stream);
void gated_activation(const GateCall& call, void* stream);
void apply_rope(const RopeCall& call, void* stream);
}  // namespace sm90

}  // namespace flash_mla
