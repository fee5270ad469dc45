#pragma once

#include <cstdint>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/quantise.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// How a token lies in a cache page. A token has a latent and a rope part of 64 elements; K is both together,
/// d_qk elements. d_qk 576 has a latent of 512, which is V. d_qk 512 (DeepSeek V4) has a latent of 448, and V
/// is the whole row, rope included.
///
/// e4m3 is E4M3FN: largest value 448, no infinity. An e8m0 byte x is 2^(x - 127), 0xFF is NaN.
enum class KvFormat : std::uint8_t {
  /// d_qk bfloat16: latent, then rope.
  kBFloat16,
  /// d_qk float16: latent, then rope.
  kFloat16,
  /// DeepSeek V3.2, called fp8_ds_mla by vLLM and SGLang. d_qk 576, 656 bytes per token: 512 e4m3 (latent);
  /// 4 float32 scales, one for every 128 of them; 64 bfloat16 (rope, not scaled).
  kFp8V32,
  /// DeepSeek V4. d_qk 512, 584 bytes per token, split within a page: page_size rows of 448 e4m3 (latent) and
  /// 64 bfloat16 (rope), 576 bytes; then page_size rows of 7 e8m0 scales, one for every 64 of the latent's
  /// elements, and one unused byte.
  kFp8V4,
  /// d_qk 576, 576 bytes per token: 512 e4m3 (latent), 64 e4m3 (rope), all times one scale.
  kFp8Tensor,
};

/// "bfloat16", "float16", "fp8_v32", "fp8_v4", "fp8_tensor".
FLASH_MLA_API const char* kv_format_name(KvFormat format);

/// A pool of cache pages in one of the formats.
///
/// `data` is (num_pages, page_size, 1, width): bfloat16 or float16 and width d_qk for the formats of those
/// names, uint8 and width the bytes per token for the others. The last dimension is contiguous and pages may
/// be any distance apart (64-bit addressing, strided pools); the distance of tokens within a page is free
/// too, except in kFp8V4, whose pages are contiguous, with stride(1) == 584. Any page_size: a flat array of n
/// tokens is one page of n. A token is named by its slot, page * page_size + offset.
///
/// Readers take the scales of any writer: powers of two or not, and 0 with data of zeros, which reads as 0.
/// Scales are applied in float32.
struct KvCacheView {
  TensorView data{};
  KvFormat format = KvFormat::kBFloat16;
  float scale = 1.0f;  ///< kFp8Tensor: value = e4m3 * scale. Without meaning otherwise
  bool defined() const { return data.defined(); }
};

/// What the cache operations share.
struct KvCacheOptions {
  int num_threads = 0;     ///< CPU: threads to run on; 0 means as many as OpenMP would use
  void* stream = nullptr;  ///< CUDA: the cudaStream_t to launch on
  Backend backend = Backend::kAuto;
};

/// New tokens for a cache. n tokens; latent width 512 for caches of d_qk 576 and 448 for those of 512.
struct KvAppendArgs {
  TensorView latent;        ///< (n, latent width) bfloat16 | float16 | float32
  TensorView rope;          ///< (n, 64), latent's dtype
  TensorView slot_mapping;  ///< (n) int64 | int32: slot of each token; -1: the token is skipped
  KvCacheView cache;        ///< written at those slots, and nowhere else
  /// Of kFp8V32: how scales are chosen; kFlashMla, kVllm or kSglang. kFp8V4 always has kFlashMla's, and
  /// kFp8Tensor divides by `cache.scale` and saturates.
  Fp8Recipe recipe = Fp8Recipe::kFlashMla;
  /// Optional RMSNorm: (latent width) float32 scales the latent, x / sqrt(mean(x^2) + norm_eps) * weight;
  /// (latent width + 64) takes latent and rope as one row, as DeepSeek V4 has it. Rounded to latent's dtype.
  TensorView norm_weight{};
  float norm_eps = 1e-6f;
  /// Optional RoPE, after the norm; both or neither. cos_sin (max_positions, 64) float32: the cosines of the
  /// 32 pairs, then their sines. Pairs are neighbours (2i, 2i + 1), as in MLA. Rounded to latent's dtype.
  TensorView positions{};  ///< (n) int64 | int32: row of cos_sin of each token
  TensorView cos_sin{};
};

/// Writes tokens into a cache in its format. Quantised bytes are those of the recipe, bit for bit, on every
/// backend. Two tokens with the same slot: one of them, unspecified which, is there afterwards (on a GPU
/// perhaps parts of both). Unused bytes of kFp8V4 are set to 0.
///
/// Never allocates and never synchronises; on a GPU the work is queued on options.stream and may be captured.
/// On the host, slots outside the pool and positions outside cos_sin throw InvalidArgument (argument, value,
/// what was expected) before anything is written; on a GPU they are the caller's to get right.
FLASH_MLA_API void append_kv(const KvAppendArgs& args, const KvCacheOptions& options = {});

/// Tokens of a cache to read back.
struct KvGatherArgs {
  KvCacheView cache;
  TensorView slots;  ///< (n) int64 | int32; -1: a row of zeros
  TensorView out;    ///< (n, d_qk) bfloat16 | float16 | float32: latent, then rope; written
};

/// out[i] = the token in slots[i], dequantised in float32 and rounded once to out's dtype. Contracts of
/// append_kv.
FLASH_MLA_API void gather_kv(const KvGatherArgs& args, const KvCacheOptions& options = {});

}  // namespace flash_mla
