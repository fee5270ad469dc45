#include "rows_bindings.h"

#include <nanobind/stl/string.h>

#include <string>
#include <utility>

#include "arguments.h"
#include "flash_mla/rows.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

RowOptions row_options(nb::handle num_threads, std::uintptr_t stream) {
  RowOptions options;
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  return options;
}

void py_rms_norm(nb::dict tensors, double eps, double weight_offset, double out_scale, nb::handle num_threads,
                 std::uintptr_t stream) {
  Tensors t(std::move(tensors));
  const TensorView x = t("x"), residual = t("residual"), weight = t("weight"), out = t("out");
  const RmsNormOptions norm{static_cast<float>(eps), static_cast<float>(weight_offset),
                            static_cast<float>(out_scale)};
  const RowOptions options = row_options(num_threads, stream);
  nb::gil_scoped_release release;
  if (residual.defined()) {
    add_rms_norm(x, residual, weight, out, norm, options);
  } else {
    rms_norm(x, weight, out, norm, options);
  }
}

void py_gated_activation(nb::dict tensors, const std::string& activation, nb::handle num_threads,
                         std::uintptr_t stream) {
  Activation function{};
  if (activation == "silu") {
    function = Activation::kSilu;
  } else if (activation == "gelu") {
    function = Activation::kGelu;
  } else if (activation == "gelu_tanh") {
    function = Activation::kGeluTanh;
  } else {
    throw InvalidArgument("activation is '" + activation + "', expected 'silu', 'gelu' or 'gelu_tanh'");
  }
  Tensors t(std::move(tensors));
  const TensorView gate_up = t("gate_up"), out = t("out");
  const RowOptions options = row_options(num_threads, stream);
  nb::gil_scoped_release release;
  gated_activation(gate_up, out, function, options);
}

RopeScaling rope_scaling(const std::string& name) {
  if (name == "none") return RopeScaling::kNone;
  if (name == "linear") return RopeScaling::kLinear;
  if (name == "llama3") return RopeScaling::kLlama3;
  if (name == "yarn") return RopeScaling::kYarn;
  throw InvalidArgument("scaling is '" + name + "', expected 'none', 'linear', 'llama3' or 'yarn'");
}

void py_apply_rope(nb::dict tensors, bool interleaved, nb::handle rotary_dim, double theta,
                   const std::string& scaling, double factor, std::int64_t original_max_position,
                   double low_freq_factor, double high_freq_factor, double beta_fast, double beta_slow,
                   double attention_factor, nb::handle num_threads, std::uintptr_t stream) {
  RopeOptions rope;
  rope.interleaved = interleaved;
  rope.rotary_dim = int_argument(rotary_dim, "rotary_dim", 0);
  rope.theta = theta;
  rope.scaling = rope_scaling(scaling);
  rope.factor = factor;
  rope.original_max_position = original_max_position;
  rope.low_freq_factor = low_freq_factor;
  rope.high_freq_factor = high_freq_factor;
  rope.beta_fast = beta_fast;
  rope.beta_slow = beta_slow;
  rope.attention_factor = static_cast<float>(attention_factor);
  Tensors t(std::move(tensors));
  const TensorView x = t("x"), positions = t("positions"), cos_sin = t("cos_sin"), out = t("out");
  const RowOptions options = row_options(num_threads, stream);
  nb::gil_scoped_release release;
  apply_rope(x, positions, cos_sin, out, rope, options);
}

}  // namespace

void bind_rows(nb::module_& m) {
  m.def("rms_norm", &py_rms_norm, "tensors"_a, "eps"_a, "weight_offset"_a, "out_scale"_a,
        "num_threads"_a.none() = 0, "stream"_a = 0);
  m.def("gated_activation", &py_gated_activation, "tensors"_a, "activation"_a, "num_threads"_a.none() = 0,
        "stream"_a = 0);
  m.def("apply_rope", &py_apply_rope, "tensors"_a, "interleaved"_a, "rotary_dim"_a.none(), "theta"_a,
        "scaling"_a, "factor"_a, "original_max_position"_a, "low_freq_factor"_a, "high_freq_factor"_a,
        "beta_fast"_a, "beta_slow"_a, "attention_factor"_a, "num_threads"_a.none() = 0, "stream"_a = 0);
}

}  // namespace flash_mla::python
