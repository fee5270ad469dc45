#include "flash_mla/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "api/call.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/rows/row_ops.h"

namespace flash_mla {
namespace {

using api::check_last_dim_contiguous;
using api::check_no_overlap;
using api::check_same_device;
using api::check_size;
using api::check_tensor;

/// An output or a second input of the shape of `like`, of its dtype or of `other`.
void check_like(const TensorView& t, const char* name, const TensorView& like, const char* like_name,
                DType other) {
  check_tensor(t, name, like.rank, {like.dtype, other});
  for (int d = 0; d < like.rank; ++d) check_size(t, name, d, like.size(d), like_name);
  check_last_dim_contiguous(t, name);
  check_same_device(t, name, like, like_name);
}

void check_output(const TensorView& t, const char* name, const TensorView& like, const char* like_name) {
  check_like(t, name, like, like_name, like.dtype);
  check_no_overlap(t, name);
}

void check_input(const TensorView& t, const char* name, int rank) {
  check_tensor(t, name, rank, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  check_last_dim_contiguous(t, name);
}

int threads_of(const RowOptions& o) {
  if (o.num_threads < 0) api::invalid("num_threads is {}, expected >= 0", o.num_threads);
  return cpu::threads_of_call(o.num_threads);
}

void run_norm(const NormCall& call, const RowOptions& options) {
  check_input(call.x, "x", 2);
  if (call.residual.defined()) check_output(call.residual, "residual", call.x, "x");
  check_like(call.out, "out", call.x, "x", DType::kUInt8);
  check_no_overlap(call.out, "out");
  if (call.residual.defined() && call.out.data == call.residual.data && call.out.numel() > 0) {
    api::invalid("out is residual, expected another tensor");
  }
  if (call.out.dtype == DType::kUInt8 && call.out.data == call.x.data && call.out.numel() > 0) {
    api::invalid("out is x, expected another tensor for e4m3");
  }
  if (!(call.norm.out_scale > 0.0f) || !std::isfinite(call.norm.out_scale)) {
    api::invalid("out_scale is {}, expected a positive finite number", call.norm.out_scale);
  }
  check_tensor(call.weight, "weight", 1, {call.x.dtype, DType::kFloat32});
  check_size(call.weight, "weight", 0, call.x.size(1), "x.shape[1] (d)");
  check_last_dim_contiguous(call.weight, "weight");
  check_same_device(call.weight, "weight", call.x, "x");
  if (!(call.norm.eps >= 0.0f) || !std::isfinite(call.norm.eps)) {
    api::invalid("eps is {}, expected a finite number >= 0", call.norm.eps);
  }
  const int threads = threads_of(options);
  const Backend backend = api::backend_of(options.backend, call.x, "x");
  if (call.x.numel() == 0) return;
  if (backend == Backend::kSm90) return sm90::rms_norm(call, options.stream);
  cpu::rms_norm(call, threads);
}

void check_rope(const RopeOptions& o, int rotary_dim, std::int64_t d) {
  if (rotary_dim < 2 || rotary_dim % 2 != 0 || rotary_dim > d || rotary_dim > 2 * sm90::kMaxRopePairs) {
    api::invalid("rotary_dim is {}, expected an even number up to x.shape[2] (d) = {} and {}", rotary_dim, d,
                 2 * sm90::kMaxRopePairs);
  }
  const auto positive = [](double value, const char* name) {
    if (!(value > 0) || !std::isfinite(value))
      api::invalid("{} is {}, expected a positive finite number", name, value);
  };
  positive(o.theta, "theta");
  positive(o.factor, "factor");
  if (o.scaling == RopeScaling::kLlama3 || o.scaling == RopeScaling::kYarn) {
    if (o.original_max_position < 1) {
      api::invalid("original_max_position is {}, expected >= 1", o.original_max_position);
    }
  }
  if (o.scaling == RopeScaling::kLlama3 &&
      !(o.high_freq_factor > o.low_freq_factor && o.low_freq_factor > 0)) {
    api::invalid("high_freq_factor is {}, expected more than low_freq_factor = {}, which is positive",
                 o.high_freq_factor, o.low_freq_factor);
  }
  if (o.scaling == RopeScaling::kYarn) {
    positive(o.beta_fast, "beta_fast");
    positive(o.beta_slow, "beta_slow");
    if (o.theta == 1) api::invalid("theta is 1, expected another base with YaRN");
  }
  if (static_cast<int>(o.scaling) > static_cast<int>(RopeScaling::kYarn)) {
    api::invalid("scaling is {}, expected one of RopeScaling", static_cast<int>(o.scaling));
  }
}

void check_positions(const TensorView& positions, const TensorView& cos_sin) {
  for (std::int64_t i = 0; i < positions.size(0); ++i) {
    const std::int64_t at = i * positions.stride(0);
    const std::int64_t position = positions.dtype == DType::kInt64 ? positions.ptr<const std::int64_t>()[at]
                                                                   : positions.ptr<const std::int32_t>()[at];
    if (position < 0 || position >= cos_sin.size(0)) {
      api::invalid("positions[{}] is {}, expected 0 to {} (rows of cos_sin)", i, position,
                   cos_sin.size(0) - 1);
    }
  }
}

/// The pair, as a real number, that turns so many times in the original positions.
double yarn_pair(const RopeOptions& o, int rotary_dim, double turns) {
  return rotary_dim *
         std::log(static_cast<double>(o.original_max_position) / (turns * 2 * std::numbers::pi)) /
         (2 * std::log(o.theta));
}

}  // namespace

void rms_norm(const TensorView& x, const TensorView& weight, const TensorView& out,
              const RmsNormOptions& norm, const RowOptions& options) {
  run_norm({x, {}, weight, out, norm}, options);
}

void add_rms_norm(const TensorView& x, const TensorView& residual, const TensorView& weight,
                  const TensorView& out, const RmsNormOptions& norm, const RowOptions& options) {
  if (!residual.defined()) api::invalid("residual is not given");
  run_norm({x, residual, weight, out, norm}, options);
}

void gated_activation(const TensorView& gate_up, const TensorView& out, Activation activation,
                      const RowOptions& options) {
  check_input(gate_up, "gate_up", 2);
  check_tensor(out, "out", 2, {gate_up.dtype});
  check_size(out, "out", 0, gate_up.size(0), "gate_up.shape[0] (n)");
  if (out.size(1) > std::numeric_limits<std::int64_t>::max() / 2) {
    api::invalid("out.shape[1] (d) is {}, expected half of gate_up.shape[1] = {}", out.size(1),
                 gate_up.size(1));
  }
  check_size(gate_up, "gate_up", 1, 2 * out.size(1), "2 * out.shape[1] (d)");
  check_last_dim_contiguous(out, "out");
  check_no_overlap(out, "out");
  check_same_device(out, "out", gate_up, "gate_up");
  if (static_cast<int>(activation) > static_cast<int>(Activation::kGeluTanh)) {
    api::invalid("activation is {}, expected one of Activation", static_cast<int>(activation));
  }
  const int threads = threads_of(options);
  const Backend backend = api::backend_of(options.backend, gate_up, "gate_up");
  if (out.numel() == 0) return;
  if (backend == Backend::kSm90) return sm90::gated_activation({gate_up, out, activation}, options.stream);
  cpu::gated_activation({gate_up, out, activation}, threads);
}

void apply_rope(const TensorView& x, const TensorView& positions, const TensorView& cos_sin,
                const TensorView& out, const RopeOptions& rope, const RowOptions& options) {
  check_input(x, "x", 3);
  check_output(out, "out", x, "x");
  check_tensor(positions, "positions", 1, {DType::kInt32, DType::kInt64});
  check_size(positions, "positions", 0, x.size(0), "x.shape[0] (n)");
  check_same_device(positions, "positions", x, "x");
  RopeCall call{x, positions, cos_sin, out, rope};
  if (rope.rotary_dim == 0)
    call.rope.rotary_dim = static_cast<int>(std::min<std::int64_t>(x.size(2), 1 << 20));
  check_rope(call.rope, call.rope.rotary_dim, x.size(2));
  if (cos_sin.defined()) {
    check_tensor(cos_sin, "cos_sin", 2, {DType::kFloat32});
    check_size(cos_sin, "cos_sin", 1, call.rope.rotary_dim, "rotary_dim");
    check_last_dim_contiguous(cos_sin, "cos_sin");
    check_same_device(cos_sin, "cos_sin", x, "x");
  }
  const int threads = threads_of(options);
  const Backend backend = api::backend_of(options.backend, x, "x");
  if (x.numel() == 0) return;
  if (backend == Backend::kSm90) return sm90::apply_rope(call, options.stream);
  if (cos_sin.defined()) check_positions(positions, cos_sin);
  cpu::apply_rope(call, threads);
}

double rope_frequency(const RopeOptions& o, int rotary_dim, int pair) {
  const double plain = std::pow(o.theta, -2.0 * pair / rotary_dim);
  switch (o.scaling) {
    case RopeScaling::kNone:
      return plain;
    case RopeScaling::kLinear:
      return plain / o.factor;
    case RopeScaling::kLlama3: {
      const double turns = static_cast<double>(o.original_max_position) * plain / (2 * std::numbers::pi);
      const double kept =
          std::clamp((turns - o.low_freq_factor) / (o.high_freq_factor - o.low_freq_factor), 0.0, 1.0);
      return (1 - kept) * plain / o.factor + kept * plain;
    }
    case RopeScaling::kYarn:
      break;
  }
  const double last = rotary_dim - 1;
  const double low = std::max(std::floor(yarn_pair(o, rotary_dim, o.beta_fast)), 0.0);
  const double high = std::min(std::ceil(yarn_pair(o, rotary_dim, o.beta_slow)), last);
  const double kept = 1 - std::clamp((pair - low) / std::max(high - low, 1e-3), 0.0, 1.0);
  return (1 - kept) * plain / o.factor + kept * plain;
}

}  // namespace flash_mla
