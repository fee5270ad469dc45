// The C ABI of hyper-connections.

#include "flash_mla/c_mhc.h"

#include "api/c_guard.h"
#include "flash_mla/mhc.h"

namespace {

using namespace flash_mla;
using api::guarded;
using api::optional_view;
using api::required;
using api::view;

MhcWeights weights_of(const flash_mla_mhc_weights* given) {
  const flash_mla_mhc_weights& w = required(given, "weights");
  return {view(w.fn, "fn"), view(w.scale, "scale"), view(w.base, "base"), optional_view(w.norm, "norm")};
}

MhcMixes mixes_of(const flash_mla_mhc_mixes* given) {
  const flash_mla_mhc_mixes& m = required(given, "mixes");
  return {view(m.post, "post"), view(m.comb, "comb"), view(m.layer_input, "layer_input")};
}

MhcOptions options_of(const flash_mla_mhc_options* given) {
  flash_mla_mhc_options o;
  flash_mla_mhc_options_init(&o);
  if (given != nullptr) o = *given;
  MhcOptions options;
  options.rms_eps = o.rms_eps;
  options.pre_eps = o.pre_eps;
  options.post_mult = o.post_mult;
  options.sinkhorn_eps = o.sinkhorn_eps;
  options.norm_eps = o.norm_eps;
  options.sinkhorn_repeat = o.sinkhorn_repeat;
  options.num_threads = o.num_threads;
  options.stream = o.stream;
  return options;
}

}  // namespace

void flash_mla_mhc_options_init(flash_mla_mhc_options* options) {
  if (options == nullptr) return;
  const MhcOptions o;
  *options = {o.rms_eps,  o.pre_eps,         o.post_mult,   o.sinkhorn_eps,
              o.norm_eps, o.sinkhorn_repeat, o.num_threads, o.stream};
}

flash_mla_status flash_mla_mhc_pre(const DLTensor* residual, const flash_mla_mhc_weights* weights,
                                   const flash_mla_mhc_mixes* mixes, const flash_mla_mhc_options* options) {
  return guarded([&] {
    mhc_pre(view(residual, "residual"), weights_of(weights), mixes_of(mixes), options_of(options));
  });
}

flash_mla_status flash_mla_mhc_post(const DLTensor* x, const DLTensor* residual, const DLTensor* post,
                                    const DLTensor* comb, DLTensor* out, int32_t num_threads, void* stream) {
  return guarded([&] {
    MhcOptions options;
    options.num_threads = num_threads;
    options.stream = stream;
    mhc_post(view(x, "x"), view(residual, "residual"), view(post, "post"), view(comb, "comb"),
             view(out, "out"), options);
  });
}

flash_mla_status flash_mla_mhc_post_pre(const DLTensor* x, const DLTensor* residual, const DLTensor* post,
                                        const DLTensor* comb, DLTensor* out,
                                        const flash_mla_mhc_weights* weights,
                                        const flash_mla_mhc_mixes* mixes,
                                        const flash_mla_mhc_options* options) {
  return guarded([&] {
    mhc_post_pre(view(x, "x"), view(residual, "residual"), view(post, "post"), view(comb, "comb"),
                 view(out, "out"), weights_of(weights), mixes_of(mixes), options_of(options));
  });
}
