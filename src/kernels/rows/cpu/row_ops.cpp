#include "kernels/rows/row_ops.h"

#include <cmath>
#include <numbers>

#include "base/element.h"
#include "base/fp8.h"
#include "base/parallel.h"

namespace flash_mla::cpu {
namespace {

// Elements below which a second thread costs more than it saves.
constexpr std::int64_t kElementsForThreads = 1 << 16;

template <class F>
void for_rows(const TensorView& t, int num_threads, const F& f) {
  parallel_for(t.size(0), t.numel() < kElementsForThreads ? 1 : num_threads, f);
}

template <class T>
T* row(const TensorView& t, std::int64_t i) {
  return t.ptr<T>() + i * t.stride(0);
}

template <class T, class W>
void norm_row(const NormCall& call, std::int64_t i) {
  const std::int64_t d = call.x.size(1);
  const T* x = row<const T>(call.x, i);
  const W* weight = call.weight.ptr<const W>();
  if (call.residual.defined()) {
    T* residual = row<T>(call.residual, i);
    for (std::int64_t c = 0; c < d; ++c) residual[c] = from_double<T>(to_float(residual[c]) + to_float(x[c]));
    x = residual;
  }
  // Several sums, so that they are added in vectors; their order depends on d alone.
  constexpr std::int64_t kSums = 16;
  float squares[kSums] = {};
  for (std::int64_t c = 0; c < d; ++c) {
    const float v = static_cast<float>(to_float(x[c]));
    squares[c % kSums] += v * v;
  }
  float sum = 0;
  for (const float s : squares) sum += s;
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(d) + call.norm.eps);
  const auto normed = [&](std::int64_t c) {
    const float w = static_cast<float>(to_float(weight[c])) + call.norm.weight_offset;
    return static_cast<float>(to_float(x[c])) * factor * w;
  };
  if (call.out.dtype == DType::kUInt8) {
    std::uint8_t* out = row<std::uint8_t>(call.out, i);
    for (std::int64_t c = 0; c < d; ++c) out[c] = to_e4m3(normed(c) / call.norm.out_scale).bits;
  } else {
    T* out = row<T>(call.out, i);
    for (std::int64_t c = 0; c < d; ++c) out[c] = from_double<T>(normed(c));
  }
}

float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0f + std::exp(-x));
    case Activation::kGelu:
      return 0.5f * x * (1.0f + std::erf(x * (std::numbers::sqrt2_v<float> / 2)));
    case Activation::kGeluTanh:
      break;
  }
  const float y = std::sqrt(2 * std::numbers::inv_pi_v<float>) * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + std::tanh(y));
}

template <class T>
void rope_row(const RopeCall& call, std::int64_t i, const float* frequencies) {
  const RopeOptions& rope = call.rope;
  const int pairs = rope.rotary_dim / 2;
  const std::int64_t position = call.positions.dtype == DType::kInt64
                                    ? call.positions.ptr<const std::int64_t>()[i * call.positions.stride(0)]
                                    : call.positions.ptr<const std::int32_t>()[i * call.positions.stride(0)];
  const float* table = call.cos_sin.defined() ? row<const float>(call.cos_sin, position) : nullptr;
  for (int pair = 0; pair < pairs; ++pair) {
    const float angle = static_cast<float>(position) * frequencies[pair];
    const float scale = rope.scaling == RopeScaling::kYarn ? rope.attention_factor : 1.0f;
    const float cosine = table != nullptr ? table[pair] : std::cos(angle) * scale;
    const float sine = table != nullptr ? table[pairs + pair] : std::sin(angle) * scale;
    const int first = rope.interleaved ? 2 * pair : pair,
              second = rope.interleaved ? first + 1 : pair + pairs;
    for (std::int64_t h = 0; h < call.x.size(1); ++h) {
      const T* x = row<const T>(call.x, i) + h * call.x.stride(1);
      T* out = row<T>(call.out, i) + h * call.out.stride(1);
      const float a = static_cast<float>(to_float(x[first])), b = static_cast<float>(to_float(x[second]));
      out[first] = from_double<T>(a * cosine - b * sine);
      out[second] = from_double<T>(b * cosine + a * sine);
    }
  }
  for (std::int64_t h = 0; h < call.x.size(1); ++h) {
    const T* x = row<const T>(call.x, i) + h * call.x.stride(1);
    T* out = row<T>(call.out, i) + h * call.out.stride(1);
    for (std::int64_t c = rope.rotary_dim; c < call.x.size(2); ++c) out[c] = x[c];
  }
}

/// f(element) of a row's type.
template <class F>
void visit_row_type(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) {
    f(Bf16{});
  } else if (dtype == DType::kFloat16) {
    f(Fp16{});
  } else {
    f(float{});
  }
}

}  // namespace

void rms_norm(const NormCall& call, int num_threads) {
  visit_row_type(call.x.dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(call.x, num_threads, [&](std::int64_t i) {
      if (call.weight.dtype == DType::kFloat32) {
        norm_row<T, float>(call, i);
      } else {
        norm_row<T, T>(call, i);
      }
    });
  });
}

void gated_activation(const GateCall& call, int num_threads) {
  visit_row_type(call.out.dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(call.gate_up, num_threads, [&](std::int64_t i) {
      const std::int64_t d = call.out.size(1);
      const T* gate = row<const T>(call.gate_up, i);
      T* out = row<T>(call.out, i);
      for (std::int64_t c = 0; c < d; ++c) {
        const float g = activate(call.activation, static_cast<float>(to_float(gate[c])));
        out[c] = from_double<T>(g * static_cast<float>(to_float(gate[d + c])));
      }
    });
  });
}

void apply_rope(const RopeCall& call, int num_threads) {
  float frequencies[sm90::kMaxRopePairs];
  for (int pair = 0; pair < call.rope.rotary_dim / 2; ++pair) {
    frequencies[pair] = static_cast<float>(rope_frequency(call.rope, call.rope.rotary_dim, pair));
  }
  visit_row_type(call.x.dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(call.x, num_threads, [&](std::int64_t i) { rope_row<T>(call, i, frequencies); });
  });
}

}  // namespace flash_mla::cpu
