// The C ABI of sparse attention and FP8 caches.

#include <cmath>

#include "api/c_guard.h"
#include "flash_mla/dense_fp8.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/quantise.h"
#include "flash_mla/sparse.h"

namespace {

using namespace flash_mla;
using api::guarded;
using api::optional_view;
using api::required;
using api::view;

/// Format and recipe are checked by whoever takes them; what an enum of 8 bits cannot hold, here.
KvCacheView cache_view(const flash_mla_kv_cache& cache, const char* name) {
  if (cache.format < 0 || cache.format > FLASH_MLA_KV_FP8_TENSOR) {
    api::invalid("{}.format is {}, expected 0 to {}", name, cache.format,
                 static_cast<int>(FLASH_MLA_KV_FP8_TENSOR));
  }
  KvCacheView v;
  v.data = view(cache.data, name);
  v.format = static_cast<KvFormat>(cache.format);
  v.scale = cache.scale;
  return v;
}

Fp8Recipe recipe_of(flash_mla_fp8_recipe recipe) {
  if (recipe < 0 || recipe > FLASH_MLA_FP8_VLLM_INDEXER) {
    api::invalid("recipe is {}, expected 0 to {}", recipe, static_cast<int>(FLASH_MLA_FP8_VLLM_INDEXER));
  }
  return static_cast<Fp8Recipe>(recipe);
}

flash_mla_sparse_options or_defaults(const flash_mla_sparse_options* options) {
  flash_mla_sparse_options o;
  flash_mla_sparse_options_init(&o);
  return options != nullptr ? *options : o;
}

std::optional<float> scale_of(const flash_mla_sparse_options& o) {
  return std::isnan(o.softmax_scale) ? std::nullopt : std::optional<float>(o.softmax_scale);
}

struct SparseDecodeCall {
  SparseDecodeArgs args;
  SparseDecodeOptions options;

  SparseDecodeCall(const flash_mla_sparse_decode_args* a, const flash_mla_sparse_options* given) {
    required(a, "args");
    args.q = view(a->q, "q");
    args.keys = {cache_view(a->keys.cache, "keys.cache"), view(a->keys.indices, "keys.indices"),
                 optional_view(a->keys.topk_length, "keys.topk_length")};
    if (a->extra.cache.data != nullptr) {
      args.extra = {cache_view(a->extra.cache, "extra.cache"), view(a->extra.indices, "extra.indices"),
                    optional_view(a->extra.topk_length, "extra.topk_length")};
    } else {
      args.extra.indices = optional_view(a->extra.indices, "extra.indices");
      args.extra.topk_length = optional_view(a->extra.topk_length, "extra.topk_length");
    }
    args.attn_sink = optional_view(a->attn_sink, "attn_sink");
    args.out = view(a->out, "out");
    args.lse = optional_view(a->lse, "lse");
    const flash_mla_sparse_options o = or_defaults(given);
    options.softmax_scale = scale_of(o);
    options.fixed_split_blocks = o.fixed_split_blocks;
    options.num_threads = o.num_threads;
    options.stream = o.stream;
  }
};

struct SparsePrefillCall {
  SparsePrefillArgs args;
  SparsePrefillOptions options;

  SparsePrefillCall(const flash_mla_sparse_prefill_args* a, const flash_mla_sparse_options* given) {
    required(a, "args");
    args.q = view(a->q, "q");
    args.cache = cache_view(a->cache, "cache");
    args.indices = view(a->indices, "indices");
    args.topk_length = optional_view(a->topk_length, "topk_length");
    args.attn_sink = optional_view(a->attn_sink, "attn_sink");
    args.cu_seqlens_q = optional_view(a->cu_seqlens_q, "cu_seqlens_q");
    args.cu_seqlens_k = optional_view(a->cu_seqlens_k, "cu_seqlens_k");
    args.block_table = optional_view(a->block_table, "block_table");
    args.cache_seqlens = optional_view(a->cache_seqlens, "cache_seqlens");
    args.out = view(a->out, "out");
    args.max_logits = optional_view(a->max_logits, "max_logits");
    args.lse = optional_view(a->lse, "lse");
    const flash_mla_sparse_options o = or_defaults(given);
    options.softmax_scale = scale_of(o);
    options.num_threads = o.num_threads;
    options.stream = o.stream;
  }
};

struct DenseFp8Call {
  DenseFp8DecodeArgs args;
  DecodeScheduleView schedule;
  DenseFp8DecodeOptions options;

  DenseFp8Call(const flash_mla_dense_fp8_decode_args* a, const flash_mla_sparse_options* given) {
    required(a, "args");
    args.q = view(a->q, "q");
    args.cache = cache_view(a->cache, "cache");
    args.block_table = view(a->block_table, "block_table");
    args.cache_seqlens = view(a->cache_seqlens, "cache_seqlens");
    args.out = view(a->out, "out");
    args.lse = optional_view(a->lse, "lse");
    schedule.parts = view(a->parts, "parts");
    schedule.num_splits = view(a->num_splits, "num_splits");
    const flash_mla_sparse_options o = or_defaults(given);
    schedule.block_size = o.block_size;
    schedule.fixed_split_blocks = o.fixed_split_blocks;
    options.softmax_scale = scale_of(o);
    options.causal = o.causal != 0;
    options.num_threads = o.num_threads;
    options.stream = o.stream;
    options.fp8_mma = o.fp8_mma != 0;
  }
};

}  // namespace

void flash_mla_sparse_options_init(flash_mla_sparse_options* options) {
  if (options == nullptr) return;
  options->softmax_scale = std::nanf("");
  options->fixed_split_blocks = 0;
  options->num_threads = 0;
  options->stream = nullptr;
  options->causal = 0;
  options->block_size = DecodeScheduleView{}.block_size;
  options->fp8_mma = 0;
}

flash_mla_status flash_mla_sparse_decode_workspace_size(const flash_mla_sparse_decode_args* args,
                                                        const flash_mla_sparse_options* options,
                                                        size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    const SparseDecodeCall call(args, options);
    *bytes = sparse_decode_workspace_size(call.args, call.options);
  });
}

flash_mla_status flash_mla_sparse_decode(const flash_mla_sparse_decode_args* args,
                                         const flash_mla_sparse_options* options, void* workspace,
                                         size_t workspace_bytes) {
  return guarded([&] {
    const SparseDecodeCall call(args, options);
    sparse_decode(call.args, workspace, workspace_bytes, call.options);
  });
}

flash_mla_status flash_mla_sparse_prefill_workspace_size(const flash_mla_sparse_prefill_args* args,
                                                         const flash_mla_sparse_options* options,
                                                         size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    const SparsePrefillCall call(args, options);
    *bytes = sparse_prefill_workspace_size(call.args, call.options);
  });
}

flash_mla_status flash_mla_sparse_prefill(const flash_mla_sparse_prefill_args* args,
                                          const flash_mla_sparse_options* options, void* workspace,
                                          size_t workspace_bytes) {
  return guarded([&] {
    const SparsePrefillCall call(args, options);
    sparse_prefill(call.args, workspace, workspace_bytes, call.options);
  });
}

flash_mla_status flash_mla_dense_fp8_decode_workspace_size(const flash_mla_dense_fp8_decode_args* args,
                                                           const flash_mla_sparse_options* options,
                                                           size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    const DenseFp8Call call(args, options);
    *bytes = dense_fp8_decode_workspace_size(call.args, call.schedule, call.options);
  });
}

flash_mla_status flash_mla_dense_fp8_decode(const flash_mla_dense_fp8_decode_args* args,
                                            const flash_mla_sparse_options* options, void* workspace,
                                            size_t workspace_bytes) {
  return guarded([&] {
    const DenseFp8Call call(args, options);
    dense_fp8_decode(call.args, call.schedule, workspace, workspace_bytes, call.options);
  });
}

flash_mla_status flash_mla_append_kv(const flash_mla_append_kv_args* args, int32_t num_threads,
                                     void* stream) {
  return guarded([&] {
    const flash_mla_append_kv_args& a = required(args, "args");
    KvAppendArgs append;
    append.latent = view(a.latent, "latent");
    append.rope = view(a.rope, "rope");
    append.slot_mapping = view(a.slot_mapping, "slot_mapping");
    append.cache = cache_view(a.cache, "cache");
    append.recipe = recipe_of(a.recipe);
    append.norm_weight = optional_view(a.norm_weight, "norm_weight");
    append.norm_eps = a.norm_eps;
    append.positions = optional_view(a.positions, "positions");
    append.cos_sin = optional_view(a.cos_sin, "cos_sin");
    append_kv(append, {num_threads, stream, Backend::kAuto});
  });
}

flash_mla_status flash_mla_gather_kv(const flash_mla_kv_cache* cache, const DLTensor* slots, DLTensor* out,
                                     int32_t num_threads, void* stream) {
  return guarded([&] {
    const KvGatherArgs gather{cache_view(required(cache, "cache"), "cache"), view(slots, "slots"),
                              view(out, "out")};
    gather_kv(gather, {num_threads, stream, Backend::kAuto});
  });
}

flash_mla_status flash_mla_quantise_fp8(const DLTensor* x, int32_t tile, flash_mla_fp8_recipe recipe,
                                        DLTensor* values, DLTensor* scales, void* stream) {
  return guarded([&] {
    quantise_fp8(view(x, "x"), tile, recipe_of(recipe), view(values, "values"), view(scales, "scales"),
                 stream);
  });
}
