#include "flash_mla/kv_cache.h"

#include "api/call.h"
#include "api/sparse_checks.h"
#include "kernels/cache/cpu/append.h"
#include "kernels/cache/cpu/gather.h"
#include "kernels/cache/sm90/append.h"
#include "kernels/cache/sm90/gather.h"
#include "kernels/quant/cpu/quantise.h"
#include "kernels/quant/sm90/quantise.h"

namespace flash_mla {

const char* kv_format_name(KvFormat format) {
  switch (format) {
    case KvFormat::kBFloat16:
      return "bfloat16";
    case KvFormat::kFloat16:
      return "float16";
    case KvFormat::kFp8V32:
      return "fp8_v32";
    case KvFormat::kFp8V4:
      return "fp8_v4";
    case KvFormat::kFp8Tensor:
      return "fp8_tensor";
  }
  return "unknown";
}

const char* fp8_recipe_name(Fp8Recipe recipe) {
  switch (recipe) {
    case Fp8Recipe::kFlashMla:
      return "flash_mla";
    case Fp8Recipe::kVllm:
      return "vllm";
    case Fp8Recipe::kSglang:
      return "sglang";
    case Fp8Recipe::kIndexerPow2:
      return "indexer_pow2";
    case Fp8Recipe::kIndexer:
      return "indexer";
    case Fp8Recipe::kVllmIndexer:
      return "vllm_indexer";
  }
  return "unknown";
}

void append_kv(const KvAppendArgs& args, const KvCacheOptions& options) {
  api::check_append_shapes(args, options);
  if (api::backend_of(options.backend, args.latent, "latent") == Backend::kSm90) {
    return sm90::append_kv(args, options.stream);
  }
  api::check_append_values(args);
  cpu::append_kv(args, options.num_threads);
}

void gather_kv(const KvGatherArgs& args, const KvCacheOptions& options) {
  api::check_gather_shapes(args, options);
  if (api::backend_of(options.backend, args.out, "out") == Backend::kSm90) {
    return sm90::gather_kv(args, options.stream);
  }
  api::check_gather_values(args);
  cpu::gather_kv(args, options.num_threads);
}

void quantise_fp8(const TensorView& x, int tile, Fp8Recipe recipe, const TensorView& values,
                  const TensorView& scales, void* stream) {
  api::check_tensor(x, "x", 2, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  if (tile < 1) api::invalid("tile is {}, expected >= 1", tile);
  if (static_cast<int>(recipe) > static_cast<int>(Fp8Recipe::kVllmIndexer)) {
    api::invalid("recipe is {}, expected one of Fp8Recipe", static_cast<int>(recipe));
  }
  api::check_tensor(values, "values", 2, {DType::kUInt8});
  api::check_size(values, "values", 0, x.size(0), "x.shape[0] (n)");
  api::check_size(values, "values", 1, x.size(1), "x.shape[1] (d)");
  if (quant::scales_are_powers_of_two(recipe)) {
    api::check_tensor(scales, "scales", 2, {DType::kFloat32, DType::kUInt8});
  } else {
    api::check_tensor(scales, "scales", 2, {DType::kFloat32});
  }
  api::check_size(scales, "scales", 0, x.size(0), "x.shape[0] (n)");
  api::check_size(scales, "scales", 1, x.size(1) / tile + (x.size(1) % tile != 0 ? 1 : 0), "ceil(d / tile)");
  api::check_last_dim_contiguous(x, "x");
  api::check_last_dim_contiguous(values, "values");
  api::check_no_overlap(values, "values");
  api::check_no_overlap(scales, "scales");
  api::check_same_device(values, "values", x, "x");
  api::check_same_device(scales, "scales", x, "x");
  if (api::backend_of(Backend::kAuto, x, "x") == Backend::kSm90) {
    return sm90::quantise_fp8(x, tile, recipe, values, scales, stream);
  }
  cpu::quantise_fp8(x, tile, recipe, values, scales);
}

}  // namespace flash_mla
