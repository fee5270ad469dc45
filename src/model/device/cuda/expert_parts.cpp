#include "model/device/cuda/expert_parts.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "flash_mla/error.h"
#include "model/device/cuda/weight_loader.h"

namespace flash_mla::model {
namespace {

// The shared experts as one network, of the same form and `count` times the width of an expert, cut into
// experts.
class SharedExperts {
 public:
  explicit SharedExperts(const MixtureWeights& weights)
      : hidden_(weights.router.columns),
        intermediate_(weights.intermediate),
        width_(weights.shared_down.columns),
        gate_up_(read_bfloat16(weights.shared_gate_up)),
        down_(read_bfloat16(weights.shared_down)) {}

  /// The s-th: (2 * intermediate, hidden) and (hidden, intermediate).
  void copy(std::int64_t s, std::uint16_t* gate_up, std::uint16_t* down) const {
    const std::int64_t size = intermediate_ * hidden_;
    std::copy_n(gate_up_.get() + s * size, size, gate_up);
    std::copy_n(gate_up_.get() + width_ * hidden_ + s * size, size, gate_up + size);
    for (std::int64_t row = 0; row < hidden_; ++row) {
      std::copy_n(down_.get() + row * width_ + s * intermediate_, intermediate_, down + row * intermediate_);
    }
  }

 private:
  std::int64_t hidden_, intermediate_, width_;
  std::unique_ptr<std::uint16_t[]> gate_up_, down_;
};

/// Into `codes` and `scales`: as it is stored, or quantised.
void read_or_quantise(const Weight& weight, std::uint8_t* codes, float* scales) {
  if (!stored_as_e4m3(weight)) {
    quantise_e4m3(read_bfloat16(weight).get(), weight.rows, weight.columns, codes, scales);
  } else if (!read_e4m3(weight, codes, scales)) {
    throw Unsupported(
        fmt::format("tensor {}: rows within {} have different scales; device cuda takes blocks of whole {}",
                    weight.tensors.front(), kE4m3Rows, kE4m3Rows));
  }
}

/// SharedExperts in e4m3.
class SharedE4m3Experts {
 public:
  explicit SharedE4m3Experts(const MixtureWeights& weights)
      : width_(weights.shared_down.columns),
        gate_up_(weights.shared_gate_up.rows, weights.shared_gate_up.columns),
        down_(weights.shared_down.rows, weights.shared_down.columns) {
    if (width_ == 0) return;
    read_or_quantise(weights.shared_gate_up, gate_up_.codes.get(), gate_up_.scales.data());
    read_or_quantise(weights.shared_down, down_.codes.get(), down_.scales.data());
  }

  void copy(std::int64_t s, const ExpertParts& parts, std::byte* host) const {
    const std::int64_t intermediate = parts.intermediate, hidden = parts.hidden;
    const std::int64_t scales = e4m3_scales(intermediate, hidden);
    const E4m3Cut gate{s * intermediate, intermediate, 0, hidden};
    const E4m3Cut up{width_ + s * intermediate, intermediate, 0, hidden};
    std::uint8_t* const gate_up = parts.gate_up(host);
    cut_e4m3(gate_up_, gate, gate_up, parts.scales_of_gate_up(host));
    cut_e4m3(gate_up_, up, gate_up + intermediate * hidden, parts.scales_of_gate_up(host) + scales);
    cut_e4m3(down_, {0, hidden, s * intermediate, intermediate}, parts.down(host),
             parts.scales_of_down(host));
  }

 private:
  std::int64_t width_;
  E4m3Weight gate_up_, down_;
};

/// Gate rows from `gate` on and up rows from `up` on, and columns from `column` on of `down`, as an expert.
void pack_expert(const Int4Weight& gate_up, const Int4Weight& down, std::int64_t gate, std::int64_t up,
                 std::int64_t column, const ExpertParts& parts, std::byte* host) {
  const std::int64_t intermediate = parts.intermediate, hidden = parts.hidden;
  float* const scales = parts.scales_of_gate_up(host);
  pack_int4(gate_up, {gate, intermediate, 0, hidden}, parts.gate_up(host), scales, 2 * intermediate);
  pack_int4(gate_up, {up, intermediate, 0, hidden}, parts.gate_up(host) + int4_bytes(intermediate, hidden),
            scales + intermediate, 2 * intermediate);
  pack_int4(down, {0, hidden, column, intermediate}, parts.down(host), parts.scales_of_down(host), hidden);
}

}  // namespace

ExpertParts ExpertParts::e4m3(std::int64_t hidden, std::int64_t intermediate) {
  ExpertParts out;
  out.hidden = hidden;
  out.intermediate = intermediate;
  out.down_codes = static_cast<std::size_t>(intermediate * hidden);
  out.gate_up_codes = 2 * out.down_codes;
  out.gate_up_scales = static_cast<std::size_t>(e4m3_scales(2 * intermediate, hidden)) * sizeof(float);
  out.down_scales = static_cast<std::size_t>(e4m3_scales(hidden, intermediate)) * sizeof(float);
  return out;
}

ExpertParts ExpertParts::int4(std::int64_t hidden, std::int64_t intermediate) {
  ExpertParts out;
  out.hidden = hidden;
  out.intermediate = intermediate;
  out.down_codes = int4_bytes(hidden, intermediate);
  out.gate_up_codes = int4_bytes(2 * intermediate, hidden);
  out.gate_up_scales = static_cast<std::size_t>(int4_scales(2 * intermediate, hidden)) * sizeof(float);
  out.down_scales = static_cast<std::size_t>(int4_scales(hidden, intermediate)) * sizeof(float);
  return out;
}

ReadExpert e4m3_experts(const MixtureWeights& weights, int routed, const ExpertParts& parts) {
  return [&weights, routed, parts, shared = std::make_shared<SharedE4m3Experts>(weights)](int e,
                                                                                          std::byte* host) {
    if (e >= routed) return shared->copy(e - routed, parts, host);
    const ExpertWeights expert = weights.expert(e);
    read_or_quantise(expert.gate_up, parts.gate_up(host), parts.scales_of_gate_up(host));
    read_or_quantise(expert.down, parts.down(host), parts.scales_of_down(host));
  };
}

ReadExpert int4_experts(const MixtureWeights& weights, int routed, const ExpertParts& parts) {
  struct Shared {
    Int4Weight gate_up, down;
  };
  std::shared_ptr<Shared> shared;
  if (weights.shared_down.rows > 0) {
    shared =
        std::make_shared<Shared>(Shared{read_int4(weights.shared_gate_up), read_int4(weights.shared_down)});
  }
  return [&weights, routed, parts, shared](int e, std::byte* host) {
    const std::int64_t intermediate = parts.intermediate;
    if (e >= routed) {
      const std::int64_t first = (e - routed) * intermediate;
      pack_expert(shared->gate_up, shared->down, first, shared->down.columns + first, first, parts, host);
      return;
    }
    const ExpertWeights expert = weights.expert(e);
    pack_expert(read_int4(expert.gate_up), read_int4(expert.down), 0, intermediate, 0, parts, host);
  };
}

ReadExpert bfloat16_experts(const MixtureWeights& weights, int routed) {
  const std::int64_t down = weights.router.columns * weights.intermediate;
  return [&weights, routed, down, shared = std::make_shared<SharedExperts>(weights)](int e, std::byte* host) {
    auto* const gate_up = reinterpret_cast<std::uint16_t*>(host);
    if (e >= routed) return shared->copy(e - routed, gate_up, gate_up + 2 * down);
    const ExpertWeights expert = weights.expert(e);
    expert.gate_up.read(gate_up);
    expert.down.read(gate_up + 2 * down);
  };
}

}  // namespace flash_mla::model
