#include "mla_cascade_bindings.h"

#include <utility>

#include "arguments.h"
#include "flash_mla/mla_cascade.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

void py_expand_latents(nb::dict tensors, nb::handle num_threads) {
  Tensors t(std::move(tensors));
  const ExpandArgs args{t("k_cache"), t("pages"), t("kv_b"), t("k"), t("v")};
  const int threads = int_argument(num_threads, "num_threads", 0);
  nb::gil_scoped_release release;
  expand_latents(args, threads);
}

void py_mla_cascade(nb::dict tensors, nb::handle softmax_scale, nb::handle causal,
                    nb::handle fixed_split_blocks, nb::handle num_threads) {
  Tensors t(std::move(tensors));
  MlaCascadeArgs args;
  args.q = t("q");
  args.prefix_k = t("prefix_k");
  args.prefix_v = t("prefix_v");
  args.kv_b = t("kv_b");
  args.k_cache = t("k_cache");
  args.block_table = t("block_table");
  args.cache_seqlens = t("cache_seqlens");
  args.out = t("out");
  args.lse = t("lse");
  DecodeScheduleView schedule;
  schedule.parts = t("parts");
  schedule.num_splits = t("num_splits");
  schedule.fixed_split_blocks = int_argument(fixed_split_blocks, "fixed_split_blocks", 0);
  MlaCascadeOptions options;
  options.softmax_scale = scale_argument(softmax_scale);
  options.causal = flag_argument(causal, "causal");
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  const std::size_t bytes = mla_cascade_workspace_size(args, schedule, options);
  with_workspace(nb::none(), bytes,
                 [&](void* workspace) { mla_cascade(args, schedule, workspace, bytes, options); });
}

}  // namespace

void bind_mla_cascade(nb::module_& m) {
  m.def("expand_latents", &py_expand_latents, "tensors"_a, "num_threads"_a.none() = 0);
  m.def("mla_cascade", &py_mla_cascade, "tensors"_a, "softmax_scale"_a.none() = nb::none(),
        "causal"_a.none() = false, "fixed_split_blocks"_a.none() = 0, "num_threads"_a.none() = 0);
}

}  // namespace flash_mla::python
