// The C ABI of selection and of the indexer.

#include "api/c_guard.h"
#include "flash_mla/indexer.h"
#include "flash_mla/top_k.h"

namespace {

using namespace flash_mla;
using api::guarded;
using api::optional_view;
using api::required;
using api::view;

TopKOutput output_of(const flash_mla_top_k_output& o) {
  TopKOutput output;
  output.offsets = optional_view(o.offsets, "offsets");
  output.block_table = optional_view(o.block_table, "block_table");
  output.row_request = optional_view(o.row_request, "row_request");
  if (output.block_table.defined()) output.page_size = o.page_size;
  return output;
}

TopKArgs top_k_args(const flash_mla_top_k_args* args) {
  const flash_mla_top_k_args& a = required(args, "args");
  TopKArgs top;
  top.logits = view(a.logits, "logits");
  top.lengths = view(a.lengths, "lengths");
  top.row_starts = optional_view(a.row_starts, "row_starts");
  top.output = output_of(a.output);
  top.indices = view(a.indices, "indices");
  return top;
}

MqaLogitsArgs logits_args(const flash_mla_mqa_logits_args* args) {
  const flash_mla_mqa_logits_args& a = required(args, "args");
  MqaLogitsArgs logits;
  logits.q = view(a.q, "q");
  logits.weights = view(a.weights, "weights");
  logits.k = view(a.k, "k");
  logits.k_scales = view(a.k_scales, "k_scales");
  logits.key_begin = view(a.key_begin, "key_begin");
  logits.key_end = view(a.key_end, "key_end");
  logits.logits = optional_view(a.logits, "logits");
  logits.compressed = a.compressed != 0;
  logits.clean = a.clean != 0;
  return logits;
}

PagedMqaLogitsArgs logits_args(const flash_mla_paged_mqa_logits_args* args) {
  const flash_mla_paged_mqa_logits_args& a = required(args, "args");
  PagedMqaLogitsArgs logits;
  logits.q = view(a.q, "q");
  logits.weights = view(a.weights, "weights");
  logits.cache = view(a.cache, "cache");
  logits.context_lens = view(a.context_lens, "context_lens");
  logits.block_table = view(a.block_table, "block_table");
  logits.logits = optional_view(a.logits, "logits");
  logits.clean = a.clean != 0;
  return logits;
}

TopKOutput output_of(const flash_mla_top_k_output* output) {
  return output != nullptr ? output_of(*output) : TopKOutput{};
}

MqaTopKOptions options_of(const flash_mla_mqa_top_k_options* options) {
  flash_mla_mqa_top_k_options o;
  flash_mla_mqa_top_k_options_init(&o);
  if (options != nullptr) o = *options;
  return {{o.num_threads, o.stream, Backend::kAuto}, o.logits_bytes};
}

Fp8Recipe recipe_of(flash_mla_fp8_recipe recipe) {
  if (recipe < 0 || recipe > FLASH_MLA_FP8_VLLM_INDEXER) {
    api::invalid("recipe is {}, expected 0 to {}", recipe, static_cast<int>(FLASH_MLA_FP8_VLLM_INDEXER));
  }
  return static_cast<Fp8Recipe>(recipe);
}

}  // namespace

flash_mla_status flash_mla_top_k_workspace_size(const flash_mla_top_k_args* args, int32_t num_threads,
                                                void* stream, size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    *bytes = top_k_workspace_size(top_k_args(args), {num_threads, stream, Backend::kAuto});
  });
}

flash_mla_status flash_mla_top_k(const flash_mla_top_k_args* args, int32_t num_threads, void* stream,
                                 void* workspace, size_t workspace_bytes) {
  return guarded([&] {
    top_k(top_k_args(args), workspace, workspace_bytes, {num_threads, stream, Backend::kAuto});
  });
}

flash_mla_status flash_mla_mqa_logits_workspace_size(const flash_mla_mqa_logits_args* args,
                                                     int32_t num_threads, void* stream, size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    *bytes = mqa_logits_workspace_size(logits_args(args), {num_threads, stream, Backend::kAuto});
  });
}

flash_mla_status flash_mla_mqa_logits(const flash_mla_mqa_logits_args* args, int32_t num_threads,
                                      void* stream, void* workspace, size_t workspace_bytes) {
  return guarded([&] {
    mqa_logits(logits_args(args), workspace, workspace_bytes, {num_threads, stream, Backend::kAuto});
  });
}

flash_mla_status flash_mla_paged_mqa_logits_workspace_size(const flash_mla_paged_mqa_logits_args* args,
                                                           int32_t num_threads, void* stream, size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    *bytes = paged_mqa_logits_workspace_size(logits_args(args), {num_threads, stream, Backend::kAuto});
  });
}

flash_mla_status flash_mla_paged_mqa_logits(const flash_mla_paged_mqa_logits_args* args, int32_t num_threads,
                                            void* stream, void* workspace, size_t workspace_bytes) {
  return guarded([&] {
    paged_mqa_logits(logits_args(args), workspace, workspace_bytes, {num_threads, stream, Backend::kAuto});
  });
}

void flash_mla_mqa_top_k_options_init(flash_mla_mqa_top_k_options* options) {
  if (options == nullptr) return;
  options->num_threads = 0;
  options->stream = nullptr;
  options->logits_bytes = MqaTopKOptions{}.logits_bytes;
}

flash_mla_status flash_mla_mqa_top_k_workspace_size(const flash_mla_mqa_logits_args* args,
                                                    const flash_mla_top_k_output* output, DLTensor* indices,
                                                    const flash_mla_mqa_top_k_options* options,
                                                    size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    *bytes = mqa_top_k_workspace_size(logits_args(args), output_of(output), view(indices, "indices"),
                                      options_of(options));
  });
}

flash_mla_status flash_mla_mqa_top_k(const flash_mla_mqa_logits_args* args,
                                     const flash_mla_top_k_output* output, DLTensor* indices,
                                     const flash_mla_mqa_top_k_options* options, void* workspace,
                                     size_t workspace_bytes) {
  return guarded([&] {
    mqa_top_k(logits_args(args), output_of(output), view(indices, "indices"), workspace, workspace_bytes,
              options_of(options));
  });
}

flash_mla_status flash_mla_paged_mqa_top_k_workspace_size(const flash_mla_paged_mqa_logits_args* args,
                                                          const flash_mla_top_k_output* output,
                                                          DLTensor* indices,
                                                          const flash_mla_mqa_top_k_options* options,
                                                          size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    *bytes = paged_mqa_top_k_workspace_size(logits_args(args), output_of(output), view(indices, "indices"),
                                            options_of(options));
  });
}

flash_mla_status flash_mla_paged_mqa_top_k(const flash_mla_paged_mqa_logits_args* args,
                                           const flash_mla_top_k_output* output, DLTensor* indices,
                                           const flash_mla_mqa_top_k_options* options, void* workspace,
                                           size_t workspace_bytes) {
  return guarded([&] {
    paged_mqa_top_k(logits_args(args), output_of(output), view(indices, "indices"), workspace,
                    workspace_bytes, options_of(options));
  });
}

flash_mla_status flash_mla_append_index_keys(const DLTensor* k, const DLTensor* slot_mapping, DLTensor* cache,
                                             flash_mla_fp8_recipe recipe, int32_t rotate, int32_t num_threads,
                                             void* stream) {
  return guarded([&] {
    append_index_keys({view(k, "k"), view(slot_mapping, "slot_mapping"), view(cache, "cache"),
                       recipe_of(recipe), rotate != 0},
                      {num_threads, stream, Backend::kAuto});
  });
}

flash_mla_status flash_mla_quantise_index_queries(const DLTensor* q, const DLTensor* weights, float factor,
                                                  flash_mla_fp8_recipe recipe, int32_t rotate,
                                                  DLTensor* values, DLTensor* scaled_weights,
                                                  int32_t num_threads, void* stream) {
  return guarded([&] {
    quantise_index_queries({view(q, "q"), view(weights, "weights"), factor, recipe_of(recipe), rotate != 0,
                            view(values, "values"), view(scaled_weights, "scaled_weights")},
                           {num_threads, stream, Backend::kAuto});
  });
}
