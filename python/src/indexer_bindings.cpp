#include "indexer_bindings.h"

#include <nanobind/stl/string.h>

#include <string>

#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

TopKOutput output_of(Tensors& t, nb::handle page_size) {
  TopKOutput output;
  output.offsets = t("offsets");
  output.block_table = t("block_table");
  output.row_request = t("row_request");
  if (output.block_table.defined()) output.page_size = int_argument(page_size, "page_size", 1);
  return output;
}

void py_top_k(nb::dict tensors, nb::handle page_size, nb::handle num_threads, bool reference,
              std::uintptr_t stream, nb::handle allocate) {
  Tensors t(std::move(tensors));
  TopKArgs args;
  args.logits = t("logits");
  args.lengths = t("lengths");
  args.row_starts = t("row_starts");
  args.output = output_of(t, page_size);
  args.indices = t("indices");
  if (reference) return reference::top_k(args);
  TopKOptions options;
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  const std::size_t bytes = top_k_workspace_size(args, options);
  with_workspace(allocate, bytes, [&](void* workspace) { top_k(args, workspace, bytes, options); });
}

IndexerOptions options_of(nb::handle num_threads, std::uintptr_t stream) {
  IndexerOptions options;
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  return options;
}

MqaLogitsArgs ragged_args(Tensors& t) {
  MqaLogitsArgs args;
  args.q = t("q");
  args.weights = t("weights");
  args.k = t("k");
  args.k_scales = t("k_scales");
  args.key_begin = t("ks");
  args.key_end = t("ke");
  args.logits = t("logits");
  return args;
}

PagedMqaLogitsArgs paged_args(Tensors& t) {
  PagedMqaLogitsArgs args;
  args.q = t("q");
  args.weights = t("weights");
  args.cache = t("cache");
  args.context_lens = t("context_lens");
  args.block_table = t("block_table");
  args.logits = t("logits");
  return args;
}

void py_mqa_logits(nb::dict tensors, bool compressed, bool clean, nb::handle num_threads, bool reference,
                   std::uintptr_t stream, nb::handle allocate) {
  Tensors t(std::move(tensors));
  MqaLogitsArgs args = ragged_args(t);
  args.compressed = compressed;
  args.clean = clean;
  if (reference) return reference::mqa_logits(args);
  const IndexerOptions options = options_of(num_threads, stream);
  const std::size_t bytes = mqa_logits_workspace_size(args, options);
  with_workspace(allocate, bytes, [&](void* workspace) { mqa_logits(args, workspace, bytes, options); });
}

void py_paged_mqa_logits(nb::dict tensors, bool clean, nb::handle num_threads, bool reference,
                         std::uintptr_t stream, nb::handle allocate) {
  Tensors t(std::move(tensors));
  PagedMqaLogitsArgs args = paged_args(t);
  args.clean = clean;
  if (reference) return reference::paged_mqa_logits(args);
  const IndexerOptions options = options_of(num_threads, stream);
  const std::size_t bytes = paged_mqa_logits_workspace_size(args, options);
  with_workspace(allocate, bytes,
                 [&](void* workspace) { paged_mqa_logits(args, workspace, bytes, options); });
}

void py_mqa_top_k(nb::dict tensors, bool paged, bool slots, std::size_t logits_bytes, nb::handle num_threads,
                  std::uintptr_t stream, nb::handle allocate) {
  Tensors t(std::move(tensors));
  MqaTopKOptions options;
  options.indexer = options_of(num_threads, stream);
  options.logits_bytes = logits_bytes;
  const TensorView indices = t("indices");
  TopKOutput output;
  output.offsets = t("offsets");
  if (!paged) {
    const MqaLogitsArgs args = ragged_args(t);
    const std::size_t bytes = mqa_top_k_workspace_size(args, output, indices, options);
    return with_workspace(allocate, bytes, [&](void* workspace) {
      mqa_top_k(args, output, indices, workspace, bytes, options);
    });
  }
  const PagedMqaLogitsArgs args = paged_args(t);
  if (slots) {
    output.block_table = args.block_table;
    output.page_size = args.cache.rank == 4 ? args.cache.size(1) : 1;
  }
  const std::size_t bytes = paged_mqa_top_k_workspace_size(args, output, indices, options);
  with_workspace(allocate, bytes,
                 [&](void* workspace) { paged_mqa_top_k(args, output, indices, workspace, bytes, options); });
}

Fp8Recipe recipe_of(const std::string& name) {
  for (const Fp8Recipe recipe : {Fp8Recipe::kIndexerPow2, Fp8Recipe::kIndexer, Fp8Recipe::kVllmIndexer}) {
    if (name == fp8_recipe_name(recipe)) return recipe;
  }
  throw InvalidArgument("recipe is \"" + name + "\", expected one of: indexer_pow2, indexer, vllm_indexer");
}

void py_append_index_keys(nb::dict tensors, const std::string& recipe, bool rotate, nb::handle num_threads,
                          std::uintptr_t stream) {
  Tensors t(std::move(tensors));
  IndexKeyAppendArgs args;
  args.k = t("k");
  args.slot_mapping = t("slot_mapping");
  args.cache = t("cache");
  args.recipe = recipe_of(recipe);
  args.rotate = rotate;
  append_index_keys(args, options_of(num_threads, stream));
}

void py_quantise_index_queries(nb::dict tensors, float factor, const std::string& recipe, bool rotate,
                               nb::handle num_threads, std::uintptr_t stream) {
  Tensors t(std::move(tensors));
  IndexQueryArgs args;
  args.q = t("q");
  args.weights = t("weights");
  args.factor = factor;
  args.recipe = recipe_of(recipe);
  args.rotate = rotate;
  args.values = t("values");
  args.scaled_weights = t("scaled_weights");
  quantise_index_queries(args, options_of(num_threads, stream));
}

}  // namespace

void bind_indexer(nb::module_& m) {
  m.def("top_k", &py_top_k, "tensors"_a, "page_size"_a.none() = 64, "num_threads"_a.none() = 0,
        "reference"_a = false, "stream"_a = 0, "allocate"_a.none() = nb::none());
  m.def("mqa_logits", &py_mqa_logits, "tensors"_a, "compressed"_a = false, "clean"_a = true,
        "num_threads"_a.none() = 0, "reference"_a = false, "stream"_a = 0, "allocate"_a.none() = nb::none());
  m.def("paged_mqa_logits", &py_paged_mqa_logits, "tensors"_a, "clean"_a = true, "num_threads"_a.none() = 0,
        "reference"_a = false, "stream"_a = 0, "allocate"_a.none() = nb::none());
  m.def("mqa_top_k", &py_mqa_top_k, "tensors"_a, "paged"_a, "slots"_a, "logits_bytes"_a,
        "num_threads"_a.none() = 0, "stream"_a = 0, "allocate"_a.none() = nb::none());
  m.def("append_index_keys", &py_append_index_keys, "tensors"_a, "recipe"_a = "indexer_pow2",
        "rotate"_a = true, "num_threads"_a.none() = 0, "stream"_a = 0);
  m.def("quantise_index_queries", &py_quantise_index_queries, "tensors"_a, "factor"_a = 1.0f,
        "recipe"_a = "indexer_pow2", "rotate"_a = true, "num_threads"_a.none() = 0, "stream"_a = 0);
}

}  // namespace flash_mla::python
