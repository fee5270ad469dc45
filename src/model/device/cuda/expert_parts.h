#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "model/e4m3_weight.h"
#include "model/int4_weight.h"
#include "model/weights.h"

namespace flash_mla::model {

/// An expert's parts with scales, as they lie behind each other in memory for uploads.
struct ExpertParts {
  static ExpertParts e4m3(std::int64_t hidden, std::int64_t intermediate);
  static ExpertParts int4(std::int64_t hidden, std::int64_t intermediate);

  std::uint8_t* gate_up(std::byte* host) const { return reinterpret_cast<std::uint8_t*>(host); }
  std::uint8_t* down(std::byte* host) const { return gate_up(host) + gate_up_codes; }
  // Codes come in whole rows of 16 bytes, so that scales are aligned.
  float* scales_of_gate_up(std::byte* host) const {
    return reinterpret_cast<float*>(host + gate_up_codes + down_codes);
  }
  float* scales_of_down(std::byte* host) const {
    return scales_of_gate_up(host) + gate_up_scales / sizeof(float);
  }

  std::int64_t hidden = 0, intermediate = 0;
  std::size_t gate_up_codes = 0, down_codes = 0, gate_up_scales = 0, down_scales = 0;  // bytes
};

/// Writes the parts of expert `e`, the shared ones behind the routed ones.
using ReadExpert = std::function<void(int e, std::byte* host)>;
/// `weights` must live as long as what these return; `parts` is that of the form. They throw as the weights' readers do,
/// and Unsupported, naming the tensor, where stored scales are not of 8 rows.
ReadExpert e4m3_experts(const MixtureWeights& weights, int routed, const ExpertParts& parts);
ReadExpert int4_experts(const MixtureWeights& weights, int routed, const ExpertParts& parts);
/// In bfloat16: gate_up, then down.
ReadExpert bfloat16_experts(const MixtureWeights& weights, int routed);

/// Calls test(weight) for all matrices of the experts, until one is false.
template <class F>
bool all_experts(const MixtureWeights& weights, int routed, const F& test) {
  if (weights.shared_down.rows > 0 && !(test(weights.shared_gate_up) && test(weights.shared_down)))
    return false;
  for (int e = 0; e < routed; ++e) {
    const ExpertWeights expert = weights.expert(e);
    if (!test(expert.gate_up) || !test(expert.down)) return false;
  }
  return true;
}

}  // namespace flash_mla::model
