#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "flash_mla/export.h"
#include "flash_mla/schedule.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

enum class Backend { kAuto, kCpu, kSm90 };

/// "auto", "cpu", "sm90".
FLASH_MLA_API const char* backend_name(Backend backend);

/// The tensors of one dense MLA decode call. b requests, s_q query tokens each, h_q query heads that share
/// h_kv latent heads, head dimension d_qk = d_v + rope width (576 = 512 + 64 for DeepSeek models).
///
/// All of them live on one device. Last dimensions are contiguous; every other stride is free, and pages
/// may be further apart than their dense size (strided pools).
struct DenseDecodeArgs {
  TensorView q;              ///< (b, s_q, h_q, d_qk) float32 | float16 | bfloat16
  TensorView k_cache;        ///< (num_blocks, page_size, h_kv, d_qk), q's dtype; V is its first d_v columns
  TensorView block_table;    ///< (b, max_blocks) int32: page of each request's n-th page_size tokens
  TensorView cache_seqlens;  ///< (b) int32: keys of each request, 0 <= length <= max_blocks * page_size
  TensorView out;            ///< (b, s_q, h_q, d_v), q's dtype; written
  TensorView lse{};  ///< (b, h_q, s_q) float32, natural log of the softmax denominator; written. Optional
  /// (b, s_q, h_q, rope width), q's dtype: the last columns of the queries, where they lie apart. q then has the
  /// first d_v alone. Optional
  TensorView q_rope{};

  std::int64_t d_qk() const { return q.size(3) + (q_rope.defined() ? q_rope.size(3) : 0); }
};

struct DenseDecodeOptions {
  /// Factor on q·k before the softmax. Default d_qk ** -0.5 for compatibility; DeepSeek models want
  /// (128 + 64) ** -0.5 times the square of YaRN's mscale: 0.1352338 for V3 and R1, 0.1147214 for V2 and
  /// V2-Lite.
  std::optional<float> softmax_scale = std::nullopt;
  /// Bottom-right aligned: query i sees keys j <= length - s_q + i. Without effect when s_q == 1.
  bool causal = false;
  /// CPU: threads to run on; 0 means as many as OpenMP would use, never more than there are parts.
  int num_threads = 0;
  /// CUDA: the cudaStream_t to launch on.
  void* stream = nullptr;
  /// kAuto takes the backend of the device the tensors live on.
  Backend backend = Backend::kAuto;
};

/// Bytes of scratch memory dense_decode needs for this problem, on the tensors' device, 64-byte aligned.
/// Depends on shapes, the number of parts and the thread count. In batch-invariant mode
/// (fixed_split_blocks > 0) it also reads num_splits on the CPU; on a GPU it never reads device data and
/// has room for as many splits as the block table's width allows. Throws as dense_decode does for shapes that
/// do not fit together.
FLASH_MLA_API std::size_t dense_decode_workspace_size(const DenseDecodeArgs& args,
                                                      const DecodeScheduleView& schedule,
                                                      const DenseDecodeOptions& options = {});

/// Multi-head latent attention of a decoding step over a paged cache:
///
///   out[i] = softmax(scale * q[i] · K^T + mask) · V,   V = K[:, :d_v]
///
/// in the absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1; queries carry W_UK, the caller applies
/// W_UV to `out`). Accumulates in fp32. A row that sees no key gives out = 0 and lse = +inf. The same
/// inputs and schedule give the same bits.
///
/// Never allocates and never synchronises. `workspace` holds at least dense_decode_workspace_size bytes;
/// its contents need not be initialised and are garbage afterwards.
///
/// On the host every argument is checked before anything is written, block-table entries within a
/// request's length and the schedule's agreement with cache_seqlens included. Throws InvalidArgument
/// (message: argument, value, what was expected) or Unsupported.
///
/// On a GPU (the sm90 backend) the work is queued on options.stream and may be captured in a CUDA graph.
/// Shapes, dtypes, strides and devices are checked; device data is never read on the host, so lengths,
/// block-table entries and the schedule's agreement with cache_seqlens are the caller's to get right. Takes
/// bfloat16 and float16, d_qk 576 and d_v 512, pages of 16, 32 or a multiple of 64 tokens, schedules with
/// block_size 64, and q, q_rope, k_cache and out aligned to 16 bytes with strides that are multiples of 8
/// elements.
FLASH_MLA_API void dense_decode(const DenseDecodeArgs& args, const DecodeScheduleView& schedule,
                                void* workspace, std::size_t workspace_bytes,
                                const DenseDecodeOptions& options = {});

}  // namespace flash_mla
