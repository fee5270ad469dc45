// The C ABI of attention over keys and values of their own.

#include <cmath>

#include "api/c_guard.h"
#include "flash_mla/gqa.h"

namespace {

using namespace flash_mla;
using api::guarded;
using api::optional_view;
using api::required;
using api::view;

struct GqaCall {
  GqaArgs args;
  DecodeScheduleView schedule;
  GqaOptions options;

  GqaCall(const flash_mla_gqa_args* given, const flash_mla_gqa_options* given_options) {
    const flash_mla_gqa_args& a = required(given, "args");
    args.q = view(a.q, "q");
    args.k = view(a.k, "k");
    args.v = view(a.v, "v");
    args.cu_seqlens_q = optional_view(a.cu_seqlens_q, "cu_seqlens_q");
    args.cu_seqlens_k = optional_view(a.cu_seqlens_k, "cu_seqlens_k");
    args.seqlens_k = optional_view(a.seqlens_k, "seqlens_k");
    args.block_table = optional_view(a.block_table, "block_table");
    args.page_indptr = optional_view(a.page_indptr, "page_indptr");
    args.page_indices = optional_view(a.page_indices, "page_indices");
    args.sinks = optional_view(a.sinks, "sinks");
    args.alibi_slopes = optional_view(a.alibi_slopes, "alibi_slopes");
    args.mask = optional_view(a.mask, "mask");
    args.mask_indptr = optional_view(a.mask_indptr, "mask_indptr");
    args.out = view(a.out, "out");
    args.lse = optional_view(a.lse, "lse");
    schedule.parts = optional_view(a.parts, "parts");
    schedule.num_splits = optional_view(a.num_splits, "num_splits");
    if (schedule.parts.defined() != schedule.num_splits.defined()) {
      api::invalid("{} is NULL, expected parts and num_splits, or neither",
                   schedule.parts.defined() ? "num_splits" : "parts");
    }
    flash_mla_gqa_options o;
    flash_mla_gqa_options_init(&o);
    if (given_options != nullptr) o = *given_options;
    schedule.block_size = o.block_size;
    schedule.fixed_split_blocks = o.fixed_split_blocks;
    if (!std::isnan(o.softmax_scale)) options.softmax_scale = o.softmax_scale;
    options.causal = o.causal != 0;
    options.window_left = o.window_left;
    options.window_right = o.window_right;
    options.soft_cap = o.soft_cap;
    options.max_seqlen_q = o.max_seqlen_q;
    options.num_scheduled = o.num_scheduled;
    options.max_scheduled_q = o.max_scheduled_q;
    options.num_threads = o.num_threads;
    options.stream = o.stream;
  }
};

}  // namespace

void flash_mla_gqa_options_init(flash_mla_gqa_options* options) {
  if (options == nullptr) return;
  const GqaOptions defaults;
  const DecodeScheduleView schedule;
  *options = {std::nanf(""),
              0,
              defaults.window_left,
              defaults.window_right,
              defaults.soft_cap,
              defaults.max_seqlen_q,
              defaults.num_scheduled,
              defaults.max_scheduled_q,
              defaults.num_threads,
              schedule.block_size,
              schedule.fixed_split_blocks,
              nullptr};
}

flash_mla_status flash_mla_gqa_workspace_size(const flash_mla_gqa_args* args,
                                              const flash_mla_gqa_options* options, size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    const GqaCall call(args, options);
    *bytes = gqa_workspace_size(call.args, call.schedule, call.options);
  });
}

flash_mla_status flash_mla_gqa_attention(const flash_mla_gqa_args* args, const flash_mla_gqa_options* options,
                                         void* workspace, size_t workspace_bytes) {
  return guarded([&] {
    const GqaCall call(args, options);
    gqa_attention(call.args, call.schedule, workspace, workspace_bytes, call.options);
  });
}
