// The C ABI of latent attention of requests that share a prefix.

#include "flash_mla/c_mla_cascade.h"

#include <cmath>

#include "api/c_guard.h"
#include "flash_mla/mla_cascade.h"

namespace {

using namespace flash_mla;
using api::guarded;
using api::required;
using api::view;

struct CascadeCall {
  MlaCascadeArgs args;
  DecodeScheduleView schedule;
  MlaCascadeOptions options;

  CascadeCall(const flash_mla_mla_cascade_args* given, const flash_mla_mla_cascade_options* given_options) {
    const flash_mla_mla_cascade_args& a = required(given, "args");
    args.q = view(a.q, "q");
    args.prefix_k = view(a.prefix_k, "prefix_k");
    args.prefix_v = view(a.prefix_v, "prefix_v");
    args.kv_b = view(a.kv_b, "kv_b");
    args.k_cache = view(a.k_cache, "k_cache");
    args.block_table = view(a.block_table, "block_table");
    args.cache_seqlens = view(a.cache_seqlens, "cache_seqlens");
    args.out = view(a.out, "out");
    args.lse = api::optional_view(a.lse, "lse");
    schedule.parts = view(a.parts, "parts");
    schedule.num_splits = view(a.num_splits, "num_splits");
    flash_mla_mla_cascade_options o;
    flash_mla_mla_cascade_options_init(&o);
    if (given_options != nullptr) o = *given_options;
    schedule.block_size = o.block_size;
    schedule.fixed_split_blocks = o.fixed_split_blocks;
    if (!std::isnan(o.softmax_scale)) options.softmax_scale = o.softmax_scale;
    options.causal = o.causal != 0;
    options.num_threads = o.num_threads;
  }
};

}  // namespace

flash_mla_status flash_mla_expand_latents(const DLTensor* k_cache, const DLTensor* pages,
                                          const DLTensor* kv_b, DLTensor* k, DLTensor* v,
                                          int32_t num_threads) {
  return guarded([&] {
    expand_latents(
        {view(k_cache, "k_cache"), view(pages, "pages"), view(kv_b, "kv_b"), view(k, "k"), view(v, "v")},
        num_threads);
  });
}

void flash_mla_mla_cascade_options_init(flash_mla_mla_cascade_options* options) {
  if (options == nullptr) return;
  const DecodeScheduleView schedule;
  *options = {std::nanf(""), 0, 0, schedule.block_size, schedule.fixed_split_blocks};
}

flash_mla_status flash_mla_mla_cascade_workspace_size(const flash_mla_mla_cascade_args* args,
                                                      const flash_mla_mla_cascade_options* options,
                                                      size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    const CascadeCall call(args, options);
    *bytes = mla_cascade_workspace_size(call.args, call.schedule, call.options);
  });
}

flash_mla_status flash_mla_mla_cascade(const flash_mla_mla_cascade_args* args,
                                       const flash_mla_mla_cascade_options* options, void* workspace,
                                       size_t workspace_bytes) {
  return guarded([&] {
    const CascadeCall call(args, options);
    mla_cascade(call.args, call.schedule, workspace, workspace_bytes, call.options);
  });
}
