#include "mhc_bindings.h"

#include <string>
#include <utility>

#include "arguments.h"
#include "flash_mla/mhc.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

/// pre where there are weights, post where there is x, and both in one pass where there are both.
void py_mhc(nb::dict tensors, double rms_eps, double pre_eps, double post_mult, double sinkhorn_eps,
            nb::handle sinkhorn_repeat, double norm_eps, nb::handle num_threads, bool reference,
            std::uintptr_t stream) {
  MhcOptions options;
  options.rms_eps = static_cast<float>(rms_eps);
  options.pre_eps = static_cast<float>(pre_eps);
  options.post_mult = static_cast<float>(post_mult);
  options.sinkhorn_eps = static_cast<float>(sinkhorn_eps);
  options.sinkhorn_repeat = int_argument(sinkhorn_repeat, "sinkhorn_repeat", 1);
  options.norm_eps = static_cast<float>(norm_eps);
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  Tensors t(std::move(tensors));
  const TensorView residual = t("residual"), x = t("x"), post = t("post"), comb = t("comb"), out = t("out");
  const MhcWeights weights{t("fn"), t("scale"), t("base"), t("norm")};
  const MhcMixes mixes{t("next_post"), t("next_comb"), t("layer_input")};
  nb::gil_scoped_release release;
  if (!out.defined()) {
    return reference ? reference::mhc_pre(residual, weights, mixes, options)
                     : mhc_pre(residual, weights, mixes, options);
  }
  if (!weights.fn.defined()) {
    return reference ? reference::mhc_post(x, residual, post, comb, out, options)
                     : mhc_post(x, residual, post, comb, out, options);
  }
  mhc_post_pre(x, residual, post, comb, out, weights, mixes, options);
}

}  // namespace

void bind_mhc(nb::module_& m) {
  m.def("mhc", &py_mhc, "tensors"_a, "rms_eps"_a = 1e-6, "pre_eps"_a = 1e-6, "post_mult"_a = 2.0,
        "sinkhorn_eps"_a = 1e-6, "sinkhorn_repeat"_a.none() = 20, "norm_eps"_a = 1e-6,
        "num_threads"_a.none() = 0, "reference"_a = false, "stream"_a = 0);
}

}  // namespace flash_mla::python
