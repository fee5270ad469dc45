#include "sparse_bindings.h"

#include <nanobind/stl/string.h>

#include <string>

#include "arguments.h"
#include "flash_mla/flash_mla.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

void py_sparse_decode(nb::dict tensors, nb::handle softmax_scale, nb::handle fixed_split_blocks,
                      nb::handle num_threads, float kv_scale, float extra_kv_scale, bool reference,
                      std::uintptr_t stream, nb::handle allocate) {
  Tensors t(std::move(tensors));
  SparseDecodeArgs args;
  args.q = t("q");
  args.keys = {t.cache("k_cache", kv_scale), t("indices"), t("topk_length")};
  args.extra = {t.cache("extra_k_cache", extra_kv_scale), t("extra_indices_in_kvcache"),
                t("extra_topk_length")};
  args.attn_sink = t("attn_sink");
  args.out = t("out");
  args.lse = t("lse");
  SparseDecodeOptions options;
  options.softmax_scale = scale_argument(softmax_scale);
  options.fixed_split_blocks = int_argument(fixed_split_blocks, "fixed_split_blocks", 0);
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  if (reference) return reference::sparse_decode(args, options);
  const std::size_t bytes = sparse_decode_workspace_size(args, options);
  with_workspace(allocate, bytes, [&](void* workspace) { sparse_decode(args, workspace, bytes, options); });
}

void py_sparse_prefill(nb::dict tensors, nb::handle softmax_scale, nb::handle num_threads, float kv_scale,
                       bool reference, std::uintptr_t stream, nb::handle allocate) {
  Tensors t(std::move(tensors));
  SparsePrefillArgs args;
  args.q = t("q");
  args.cache = t.cache("kv", kv_scale);
  args.indices = t("indices");
  if (args.indices.rank == 3) {  // (n, 1, topk), as FlashMLA has it
    if (args.indices.size(1) != 1) {
      throw InvalidArgument("indices.shape[1] is " + std::to_string(args.indices.size(1)) +
                            ", expected h_kv = 1");
    }
    args.indices.rank = 2;
    args.indices.shape[1] = args.indices.shape[2];
    args.indices.strides[1] = args.indices.strides[2];
  }
  args.topk_length = t("topk_length");
  args.attn_sink = t("attn_sink");
  args.cu_seqlens_q = t("cu_seqlens_q");
  args.cu_seqlens_k = t("cu_seqlens_k");
  args.block_table = t("block_table");
  args.cache_seqlens = t("cache_seqlens");
  args.out = t("out");
  args.max_logits = t("max_logits");
  args.lse = t("lse");
  SparsePrefillOptions options;
  options.softmax_scale = scale_argument(softmax_scale);
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  if (reference) return reference::sparse_prefill(args, options);
  const std::size_t bytes = sparse_prefill_workspace_size(args, options);
  with_workspace(allocate, bytes, [&](void* workspace) { sparse_prefill(args, workspace, bytes, options); });
}

void py_dense_fp8_decode(nb::dict tensors, nb::handle softmax_scale, nb::handle causal, bool token_rows,
                         nb::handle block_size, nb::handle fixed_split_blocks, nb::handle num_threads,
                         float kv_scale, bool fp8_mma, std::uintptr_t stream, nb::handle allocate) {
  Tensors t(std::move(tensors));
  DenseFp8DecodeArgs args;
  args.q = t("q");
  args.cache = t.cache("k_cache", kv_scale);
  args.block_table = t("block_table");
  args.cache_seqlens = t("cache_seqlens");
  args.out = t("out");
  args.lse = t("lse");
  DecodeScheduleView schedule;
  schedule.parts = t("tile_scheduler_metadata");
  schedule.num_splits = t("num_splits");
  schedule.block_size = int_argument(block_size, "block_size", 1);
  schedule.fixed_split_blocks = int_argument(fixed_split_blocks, "fixed_split_blocks", 0);
  schedule.unit = token_rows ? PartUnit::kTokens : PartUnit::kBlocks;
  DenseFp8DecodeOptions options;
  options.softmax_scale = scale_argument(softmax_scale);
  options.causal = flag_argument(causal, "causal");
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  options.fp8_mma = fp8_mma;
  const std::size_t bytes = dense_fp8_decode_workspace_size(args, schedule, options);
  with_workspace(allocate, bytes,
                 [&](void* workspace) { dense_fp8_decode(args, schedule, workspace, bytes, options); });
}

Fp8Recipe recipe_argument(const std::string& name) {
  std::string all;
  for (const Fp8Recipe recipe : {Fp8Recipe::kFlashMla, Fp8Recipe::kVllm, Fp8Recipe::kSglang,
                                 Fp8Recipe::kIndexerPow2, Fp8Recipe::kIndexer, Fp8Recipe::kVllmIndexer}) {
    if (name == fp8_recipe_name(recipe)) return recipe;
    all += (all.empty() ? "" : ", ") + std::string(fp8_recipe_name(recipe));
  }
  throw InvalidArgument("recipe is \"" + name + "\", expected one of: " + all);
}

void py_append_kv(nb::dict tensors, const std::string& recipe, float norm_eps, float kv_scale,
                  nb::handle num_threads, std::uintptr_t stream) {
  Tensors t(std::move(tensors));
  KvAppendArgs args;
  args.latent = t("latent");
  args.rope = t("rope");
  args.slot_mapping = t("slot_mapping");
  args.cache = t.cache("cache", kv_scale);
  args.recipe = recipe_argument(recipe);
  args.norm_weight = t("norm_weight");
  args.norm_eps = norm_eps;
  args.positions = t("positions");
  args.cos_sin = t("cos_sin");
  KvCacheOptions options;
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  nb::gil_scoped_release release;
  append_kv(args, options);
}

void py_gather_kv(nb::dict tensors, float kv_scale, nb::handle num_threads, std::uintptr_t stream) {
  Tensors t(std::move(tensors));
  KvGatherArgs args{t.cache("cache", kv_scale), t("slots"), t("out")};
  KvCacheOptions options;
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  nb::gil_scoped_release release;
  gather_kv(args, options);
}

void py_quantise_fp8(nb::dict tensors, nb::handle tile, const std::string& recipe, std::uintptr_t stream) {
  Tensors t(std::move(tensors));
  quantise_fp8(t("x"), int_argument(tile, "tile", 1), recipe_argument(recipe), t("values"), t("scales"),
               reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_sparse(nb::module_& m) {
  m.def("sparse_decode", &py_sparse_decode, "tensors"_a, "softmax_scale"_a.none() = nb::none(),
        "fixed_split_blocks"_a.none() = 0, "num_threads"_a.none() = 0, "kv_scale"_a = 1.0f,
        "extra_kv_scale"_a = 1.0f, "reference"_a = false, "stream"_a = 0, "allocate"_a.none() = nb::none());
  m.def("sparse_prefill", &py_sparse_prefill, "tensors"_a, "softmax_scale"_a.none() = nb::none(),
        "num_threads"_a.none() = 0, "kv_scale"_a = 1.0f, "reference"_a = false, "stream"_a = 0,
        "allocate"_a.none() = nb::none());
  m.def("dense_fp8_decode", &py_dense_fp8_decode, "tensors"_a, "softmax_scale"_a.none() = nb::none(),
        "causal"_a.none() = false, "token_rows"_a = false, "block_size"_a.none() = 64,
        "fixed_split_blocks"_a.none() = 0, "num_threads"_a.none() = 0, "kv_scale"_a = 1.0f,
        "fp8_mma"_a = false, "stream"_a = 0, "allocate"_a.none() = nb::none());
  m.def("append_kv", &py_append_kv, "tensors"_a, "recipe"_a = "flash_mla", "norm_eps"_a = 1e-6f,
        "kv_scale"_a = 1.0f, "num_threads"_a.none() = 0, "stream"_a = 0);
  m.def("gather_kv", &py_gather_kv, "tensors"_a, "kv_scale"_a = 1.0f, "num_threads"_a.none() = 0,
        "stream"_a = 0);
  m.def("quantise_fp8", &py_quantise_fp8, "tensors"_a, "tile"_a.none(), "recipe"_a, "stream"_a = 0);
}

}  // namespace flash_mla::python
