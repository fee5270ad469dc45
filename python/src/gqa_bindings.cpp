#include "gqa_bindings.h"

#include "arguments.h"
#include "flash_mla/gqa.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

void py_gqa_attention(nb::dict tensors, nb::handle softmax_scale, nb::handle causal, nb::handle window_left,
                      nb::handle window_right, double soft_cap, nb::handle max_seqlen_q,
                      nb::handle num_scheduled, nb::handle max_scheduled_q, nb::handle fixed_split_blocks,
                      nb::handle num_threads, bool reference, std::uintptr_t stream, nb::handle allocate) {
  Tensors t(std::move(tensors));
  GqaArgs args;
  args.q = t("q");
  args.k = t("k");
  args.v = t("v");
  args.cu_seqlens_q = t("cu_seqlens_q");
  args.cu_seqlens_k = t("cu_seqlens_k");
  args.seqlens_k = t("seqlens_k");
  args.block_table = t("block_table");
  args.page_indptr = t("page_indptr");
  args.page_indices = t("page_indices");
  args.sinks = t("sinks");
  args.alibi_slopes = t("alibi_slopes");
  args.mask = t("mask");
  args.mask_indptr = t("mask_indptr");
  args.out = t("out");
  args.lse = t("lse");
  DecodeScheduleView schedule;
  schedule.parts = t("parts");
  schedule.num_splits = t("num_splits");
  schedule.fixed_split_blocks = int_argument(fixed_split_blocks, "fixed_split_blocks", 0);
  GqaOptions options;
  options.softmax_scale = scale_argument(softmax_scale);
  options.causal = flag_argument(causal, "causal");
  options.window_left = int_argument(window_left, "window_left", -1);
  options.window_right = int_argument(window_right, "window_right", -1);
  options.soft_cap = static_cast<float>(soft_cap);
  options.max_seqlen_q = int_argument(max_seqlen_q, "max_seqlen_q", 0);
  options.num_scheduled = int_argument(num_scheduled, "num_scheduled", -1);
  options.max_scheduled_q = int_argument(max_scheduled_q, "max_scheduled_q", 0);
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  if (reference) {
    nb::gil_scoped_release release;
    return reference::gqa_attention(args, options);
  }
  const std::size_t bytes = gqa_workspace_size(args, schedule, options);
  with_workspace(allocate, bytes,
                 [&](void* workspace) { gqa_attention(args, schedule, workspace, bytes, options); });
}

nb::dict py_gqa_schedule_options(int device_index, int max_seqlen_q, int num_heads_q, int num_heads_k,
                                 int head_dim) {
  const ScheduleOptions options =
      gqa_schedule_options(device_index, max_seqlen_q, num_heads_q, num_heads_k, head_dim);
  nb::dict all;
  for (const ScheduleOptionField& field : schedule_option_fields()) all[field.name] = options.*field.value;
  return all;
}

}  // namespace

void bind_gqa(nb::module_& m) {
  m.def("gqa_attention", &py_gqa_attention, "tensors"_a, "softmax_scale"_a.none() = nb::none(),
        "causal"_a.none() = false, "window_left"_a.none() = -1, "window_right"_a.none() = -1,
        "soft_cap"_a = 0.0, "max_seqlen_q"_a.none() = 0, "num_scheduled"_a.none() = -1,
        "max_scheduled_q"_a.none() = 0, "fixed_split_blocks"_a.none() = 0, "num_threads"_a.none() = 0,
        "reference"_a = false, "stream"_a = 0, "allocate"_a.none() = nb::none());
  m.def("gqa_schedule_options", &py_gqa_schedule_options, "device_index"_a, "max_seqlen_q"_a, "num_heads_q"_a,
        "num_heads_k"_a, "head_dim"_a);
}

}  // namespace flash_mla::python
