#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/schedule.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// The tensors of one attention call with keys and values of their own: multi-head, grouped-query or multi-query. Queries of
/// all b sequences lie end to end, so that one call takes decoding sequences, prompts and chunks of prompts together. All
/// tensors live on one device. Last dimensions are contiguous, every other stride is free.
///
/// Keys and values lie in one of three ways:
///   - ragged: k (total_k, h_kv, d_qk), sequence i has rows cu_seqlens_k[i] to cu_seqlens_k[i + 1] - 1;
///   - pages: k (num_pages, page_size, h_kv, d_qk) of any page size, seqlens_k, and where the pages are: either block_table,
///     or page_indptr with page_indices. A pool in HND order, (num_pages, h_kv, page_size, d_qk), is passed as the view whose
///     dimensions 1 and 2 are swapped;
///   - one stretch for each sequence: k (b, max_seqlen, h_kv, d_qk), seqlens_k, and neither table.
/// v is like k, with d_v columns; its strides are its own.
struct GqaArgs {
  TensorView q;     ///< (total_q, h_q, d_qk) float16 | bfloat16 | float32 (CPU only)
  TensorView k, v;  ///< q's dtype; h_q is a multiple of h_kv
  TensorView
      cu_seqlens_q{};  ///< (b + 1) int32, from 0 to total_q. Not given: every sequence has total_q / b queries
  TensorView cu_seqlens_k{};  ///< (b + 1) int32, of ragged keys
  /// (b) int32: keys of each sequence. Of ragged keys only where there is a schedule, and then the differences of
  /// cu_seqlens_k.
  TensorView seqlens_k{};
  TensorView block_table{};   ///< (b, max_pages) int32; entries past a sequence's length may hold anything
  TensorView page_indptr{};   ///< (b + 1) int32: sequence i has pages page_indices[page_indptr[i]], ...
  TensorView page_indices{};  ///< (n) int32
  /// (h_q) float32: a key of that score, after scaling, and of value 0 that every row of the head sees. It does not count in
  /// lse.
  TensorView sinks{};
  /// (h_q) float32: slope * |j - p| is subtracted from the score of key j, p the position of the query. After soft_cap.
  TensorView alibi_slopes{};
  /// Which keys a query sees, beside what the options say: a bit for every query and key, 1 where it does. uint8, the bits of
  /// sequence i from byte mask_indptr[i] on, (queries, keys) row by row, the lowest bit of a byte first. Both or neither.
  TensorView mask{};
  TensorView mask_indptr{};  ///< (b + 1) int32
  TensorView out;            ///< (total_q, h_q, d_v), q's dtype; written
  TensorView lse{};  ///< (h_q, total_q) float32, natural log of the softmax denominator; written. Optional
};

/// Query i of a sequence with n queries and m keys has the position p = m - n + i (bottom-right aligned).
struct GqaOptions {
  std::optional<float> softmax_scale =
      std::nullopt;       ///< factor on q·k before the softmax. Default d_qk ** -0.5
  bool causal = false;    ///< key j is seen where j <= p
  int window_left = -1;   ///< >= 0: key j is seen where j >= p - window_left
  int window_right = -1;  ///< >= 0: key j is seen where j <= p + window_right
  float soft_cap = 0.0f;  ///< > 0: a score x becomes soft_cap * tanh(x / soft_cap)
  /// Queries of a sequence at most; only read where cu_seqlens_q is given on a GPU. 0: not known, total_q.
  int max_seqlen_q = 0;
  /// >= 0: the schedule is of the first so many sequences, the others are worked on as a whole. For batches that begin with
  /// decoding sequences and go on with prompts. -1: of all sequences. Without effect where there is no schedule.
  int num_scheduled = -1;
  /// Queries of a scheduled sequence at most, as max_seqlen_q of all. 0: max_seqlen_q. Partial results have room for as many.
  int max_scheduled_q = 0;
  int num_threads = 0;     ///< CPU: threads to run on; 0 means as many as OpenMP would use
  void* stream = nullptr;  ///< CUDA: the cudaStream_t to launch on
  Backend backend = Backend::kAuto;
};

/// Bytes of scratch memory gqa_attention needs for this problem, on the tensors' device, 64-byte aligned. With a schedule it
/// has room for the partial results of 2 * num_parts splits of max_scheduled_q queries (GPU), or of the scheduled sequences'
/// longest (CPU, which reads cu_seqlens_q). Throws as gqa_attention does for shapes that do not fit together.
FLASH_MLA_API std::size_t gqa_workspace_size(const GqaArgs& args, const DecodeScheduleView& schedule = {},
                                             const GqaOptions& options = {});

/// out[i] = softmax(cap(scale * q[i] · K^T) - alibi + mask) · V, of every sequence and head, in fp32. A row that sees no key
/// gives out = 0 and lse = +inf. The same inputs and schedule give the same bits.
///
/// `schedule` cuts long sequences into splits that are computed side by side and combined, as in dense_decode: made by
/// build_decode_schedule from seqlens_k, with blocks of 64 tokens, one for all layers of a step. Without one (parts not
/// defined) each sequence, key head and block of queries is worked on as a whole, which is right where there are many of
/// them: large batches, prompts. A batch of both, decoding sequences first, has a schedule of those and options.num_scheduled:
/// then one plan and one call take all of them. Blocks of keys that no query of a sequence sees are skipped in both cases.
///
/// Never allocates and never synchronises; `workspace` needs no initialisation. On the host every argument is checked before
/// anything is written, tables and lengths included. On a GPU the work is queued on options.stream and may be captured in a
/// CUDA graph, whose replays take the lengths and tables that are there then; they are the caller's to get right. The sm90
/// backend takes bfloat16 and float16, (d_qk, d_v) of (64, 64), (96, 96), (128, 128), (192, 128), (192, 192) and (256, 256),
/// q, k, v and out aligned to 16 bytes with strides that are multiples of 8 elements.
///
/// Throws InvalidArgument (message: argument, value, what was expected) or Unsupported. There is no backward pass.
FLASH_MLA_API void gqa_attention(const GqaArgs& args, const DecodeScheduleView& schedule, void* workspace,
                                 std::size_t workspace_bytes, const GqaOptions& options = {});

/// Options of a schedule that suits gqa_attention's sm90 backend on CUDA device `device_index`, for sequences of up to
/// max_seqlen_q queries; see cuda_schedule_options.
FLASH_MLA_API ScheduleOptions gqa_schedule_options(int device_index, int max_seqlen_q, int num_heads_q,
                                                   int num_heads_k, int head_dim);

namespace reference {
/// The definition, in float64, on the CPU; also takes float64 tensors and any head dimension. Slow.
FLASH_MLA_API void gqa_attention(const GqaArgs& args, const GqaOptions& options = {});
}  // namespace reference

}  // namespace flash_mla
