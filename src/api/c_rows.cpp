// The C ABI of norms, gates and rotations of rows.

#include "flash_mla/c_rows.h"

#include "api/c_guard.h"
#include "flash_mla/rows.h"

namespace {

using namespace flash_mla;
using api::guarded;
using api::optional_view;
using api::view;

struct Norm {
  RmsNormOptions norm;
  RowOptions rows;

  explicit Norm(const flash_mla_rms_norm_options* given) {
    flash_mla_rms_norm_options o;
    flash_mla_rms_norm_options_init(&o);
    if (given != nullptr) o = *given;
    norm = {o.eps, o.weight_offset, o.out_scale};
    rows.num_threads = o.num_threads;
    rows.stream = o.stream;
  }
};

/// An enumerator of E; wrong ones are refused by what takes it.
template <class E>
E enumerator(std::int32_t value, const char* name, E last) {
  if (value < 0 || value > static_cast<std::int32_t>(last)) {
    api::invalid("{} is {}, expected 0 to {}", name, value, static_cast<std::int32_t>(last));
  }
  return static_cast<E>(value);
}

}  // namespace

void flash_mla_rms_norm_options_init(flash_mla_rms_norm_options* options) {
  if (options == nullptr) return;
  const RmsNormOptions norm;
  const RowOptions rows;
  *options = {norm.eps, norm.weight_offset, norm.out_scale, rows.num_threads, rows.stream};
}

flash_mla_status flash_mla_rms_norm(const DLTensor* x, const DLTensor* weight, DLTensor* out,
                                    const flash_mla_rms_norm_options* options) {
  return guarded([&] {
    const Norm o(options);
    rms_norm(view(x, "x"), view(weight, "weight"), view(out, "out"), o.norm, o.rows);
  });
}

flash_mla_status flash_mla_add_rms_norm(const DLTensor* x, DLTensor* residual, const DLTensor* weight,
                                        DLTensor* out, const flash_mla_rms_norm_options* options) {
  return guarded([&] {
    const Norm o(options);
    add_rms_norm(view(x, "x"), view(residual, "residual"), view(weight, "weight"), view(out, "out"), o.norm,
                 o.rows);
  });
}

flash_mla_status flash_mla_gated_activation(const DLTensor* gate_up, DLTensor* out,
                                            flash_mla_activation activation, int32_t num_threads,
                                            void* stream) {
  return guarded([&] {
    RowOptions rows;
    rows.num_threads = num_threads;
    rows.stream = stream;
    gated_activation(view(gate_up, "gate_up"), view(out, "out"),
                     enumerator(activation, "activation", Activation::kGeluTanh), rows);
  });
}

void flash_mla_rope_options_init(flash_mla_rope_options* options) {
  if (options == nullptr) return;
  const RopeOptions rope;
  *options = {rope.theta,
              rope.factor,
              rope.low_freq_factor,
              rope.high_freq_factor,
              rope.beta_fast,
              rope.beta_slow,
              rope.original_max_position,
              rope.attention_factor,
              static_cast<flash_mla_rope_scaling>(rope.scaling),
              rope.interleaved ? 1 : 0,
              rope.rotary_dim,
              0,
              nullptr};
}

flash_mla_status flash_mla_apply_rope(const DLTensor* x, const DLTensor* positions, const DLTensor* cos_sin,
                                      DLTensor* out, const flash_mla_rope_options* options) {
  return guarded([&] {
    flash_mla_rope_options o;
    flash_mla_rope_options_init(&o);
    if (options != nullptr) o = *options;
    RopeOptions rope;
    rope.interleaved = o.interleaved != 0;
    rope.rotary_dim = o.rotary_dim;
    rope.theta = o.theta;
    rope.scaling = enumerator(o.scaling, "scaling", RopeScaling::kYarn);
    rope.factor = o.factor;
    rope.original_max_position = o.original_max_position;
    rope.low_freq_factor = o.low_freq_factor;
    rope.high_freq_factor = o.high_freq_factor;
    rope.beta_fast = o.beta_fast;
    rope.beta_slow = o.beta_slow;
    rope.attention_factor = o.attention_factor;
    RowOptions rows;
    rows.num_threads = o.num_threads;
    rows.stream = o.stream;
    apply_rope(view(x, "x"), view(positions, "positions"), optional_view(cos_sin, "cos_sin"),
               view(out, "out"), rope, rows);
  });
}
