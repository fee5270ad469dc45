#pragma once

#include <cstdint>

#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// How the scale of a tile of e4m3 values is chosen. amax is the tile's largest magnitude, every operation is
/// one of float32, rounded to nearest, and pow2(x) is the smallest power of two >= x. A value is x / scale
/// where nothing else is said, rounded to the nearest e4m3, ties to even, at most 448 in magnitude.
///
/// A tile of zeros gives zeros. NaN stays NaN and does not count in amax; a tile with an infinity has
/// unspecified bytes. PyTorch's 2 ** ceil(log2(x)) rounds the logarithm: where x lies within about 1e-6
/// (relative) above a power of two it may give that power, half of this scale. Readers take either.
enum class Fp8Recipe : std::uint8_t {
  kFlashMla,     ///< pow2(max(amax / 448, 1e-4)): FlashMLA's tests, caches of V4
  kVllm,         ///< max(amax / 448, FLT_MIN): vLLM's fp8_ds_mla
  kSglang,       ///< amax / 448, so 0 for zeros; a value is x * (1 / scale): SGLang's 656-byte cache
  kIndexerPow2,  ///< pow2(max(amax, 1e-4) / 448): V3.2's indexer with scale_fmt, DeepGEMM with ue8m0
  kIndexer,      ///< max(amax, 1e-4) / 448: the same two without
  kVllmIndexer,  ///< pow2(max(amax, 1e-10) / 448): vLLM's indexer queries
};

/// "flash_mla", "vllm", "sglang", "indexer_pow2", "indexer", "vllm_indexer".
FLASH_MLA_API const char* fp8_recipe_name(Fp8Recipe recipe);

/// Quantises rows tile by tile:
///   x       (n, d) float32 | float16 | bfloat16, last dimension contiguous
///   values  (n, d) uint8: e4m3, last dimension contiguous; written
///   scales  (n, ceil(d / tile)) float32; or uint8, e8m0, with a recipe of powers of two; written
/// The last tile may be shorter. The reference of every backend's quantisers, bit for bit. Nothing is
/// allocated. CPU tensors: one thread. CUDA tensors: queued on `stream`, a cudaStream_t of their device. Throws
/// InvalidArgument, and Unsupported where the tensors' device is none that a backend runs on.
FLASH_MLA_API void quantise_fp8(const TensorView& x, int tile, Fp8Recipe recipe, const TensorView& values,
                                const TensorView& scales, void* stream = nullptr);

}  // namespace flash_mla
