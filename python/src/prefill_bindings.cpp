#include "prefill_bindings.h"

#include "arguments.h"
#include "flash_mla/dense_prefill.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

void py_dense_prefill(nb::dict tensors, nb::handle softmax_scale, nb::handle causal, std::uintptr_t stream,
                      nb::handle allocate) {
  Tensors t(std::move(tensors));
  DensePrefillArgs args;
  args.q = t("q");
  args.k_nope = t("k_nope");
  args.k_rope = t("k_rope");
  args.v = t("v");
  args.cu_seqlens_q = t("cu_seqlens_q");
  args.cu_seqlens_k = t("cu_seqlens_k");
  args.out = t("out");
  args.lse = t("lse");
  DensePrefillOptions options;
  options.softmax_scale = scale_argument(softmax_scale);
  options.causal = flag_argument(causal, "causal");
  options.stream = reinterpret_cast<void*>(stream);
  if (args.q.device.type != DeviceType::kCuda) {
    throw Unsupported("q is " + args.q.describe() +
                      "; dense_prefill runs on Hopper GPUs alone: pass CUDA tensors");
  }
  const std::size_t bytes = dense_prefill_workspace_size();
  with_workspace(allocate, bytes, [&](void* workspace) { dense_prefill(args, workspace, bytes, options); });
}

}  // namespace

void bind_prefill(nb::module_& m) {
  m.def("dense_prefill", &py_dense_prefill, "tensors"_a, "softmax_scale"_a.none() = nb::none(),
        "causal"_a.none() = false, "stream"_a = 0, "allocate"_a.none() = nb::none());
}

}  // namespace flash_mla::python
