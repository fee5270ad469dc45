#ifndef FLASH_MLA_C_API_H_
#define FLASH_MLA_C_API_H_

/* The library as a C ABI over DLTensor*. Same contracts as the C++ headers, which document the shapes and
 * the mathematics; errors are values. No function allocates device memory, synchronises or aborts. */

#include <dlpack/dlpack.h>
#include <stddef.h>
#include <stdint.h>

#include "flash_mla/export.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flash_mla_status {
  FLASH_MLA_OK = 0,
  FLASH_MLA_INVALID_ARGUMENT = 1, /* something the caller passed; nothing was written */
  FLASH_MLA_UNSUPPORTED = 2,      /* well formed, but not on this build or machine */
  FLASH_MLA_OUT_OF_MEMORY = 3,
  FLASH_MLA_INTERNAL = 4
} flash_mla_status;

/* Message of the last call on this thread that did not return FLASH_MLA_OK; "" before that. Valid until the
 * next failing call on the same thread. */
FLASH_MLA_API const char* flash_mla_last_error(void);

/* "0.1.0" */
FLASH_MLA_API const char* flash_mla_version(void);

typedef struct flash_mla_schedule_options {
  int32_t block_size;             /* tokens per block; default 64 */
  int32_t fixed_overhead_blocks;  /* default 5 */
  int32_t min_blocks_per_request; /* default 1 */
  int32_t fixed_split_blocks;     /* 0, or batch-invariant mode; default 0 */
  void* stream;                   /* cudaStream_t for tensors on a GPU; default NULL */
  int32_t min_blocks_per_part;    /* default 1 */
  int32_t whole_requests_percent; /* default 0: requests are cut wherever the balance wants it */
} flash_mla_schedule_options;

/* Fills *options with the defaults. */
FLASH_MLA_API void flash_mla_schedule_options_init(flash_mla_schedule_options* options);

/* Parts that a schedule should have on `device` for calls of these shapes: the threads OpenMP would use on a
 * CPU, the clusters of CTAs that run at a time on a GPU. */
FLASH_MLA_API flash_mla_status flash_mla_num_parts(DLDevice device, int32_t s_q, int32_t num_heads_q,
                                                   int32_t num_heads_k, int32_t* num_parts);

/* Plans `cache_seqlens` (b) int32 into parts (num_parts, 8) int32 and num_splits (b + 1) int32, all on the
 * same device. On a GPU one kernel is queued on options->stream; nothing is read back. options may be NULL.
 */
FLASH_MLA_API flash_mla_status flash_mla_build_decode_schedule(const DLTensor* cache_seqlens,
                                                               const flash_mla_schedule_options* options,
                                                               DLTensor* parts, DLTensor* num_splits);

typedef struct flash_mla_dense_decode_options {
  float softmax_scale;        /* NaN: head_dim ** -0.5 (the default) */
  int32_t causal;             /* default 0 */
  int32_t num_threads;        /* CPU; default 0: as many as OpenMP would use */
  int32_t block_size;         /* of the schedule; default 64 */
  int32_t fixed_split_blocks; /* of the schedule; default 0 */
  void* stream;               /* cudaStream_t; default NULL */
} flash_mla_dense_decode_options;

/* Fills *options with the defaults. */
FLASH_MLA_API void flash_mla_dense_decode_options_init(flash_mla_dense_decode_options* options);

/* The tensors of flash_mla::DenseDecodeArgs and flash_mla::DecodeScheduleView. lse may be NULL. */
typedef struct flash_mla_dense_decode_args {
  const DLTensor* q;
  const DLTensor* k_cache;
  const DLTensor* block_table;
  const DLTensor* cache_seqlens;
  DLTensor* out;
  DLTensor* lse;
  const DLTensor* parts;
  const DLTensor* num_splits;
} flash_mla_dense_decode_args;

/* options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_dense_decode_workspace_size(
    const flash_mla_dense_decode_args* args, const flash_mla_dense_decode_options* options, size_t* bytes);

/* workspace may be NULL when workspace_bytes and the size asked for are 0. options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_dense_decode(const flash_mla_dense_decode_args* args,
                                                      const flash_mla_dense_decode_options* options,
                                                      void* workspace, size_t workspace_bytes);

/* An integer, so that a wrong one is an error and not undefined behaviour. */
typedef int32_t flash_mla_lse_base;
enum { FLASH_MLA_LSE_BASE_E = 0, FLASH_MLA_LSE_BASE_2 = 1 };

/* See flash_mla::merge_states. stream: cudaStream_t, of tensors of a GPU. */
FLASH_MLA_API flash_mla_status flash_mla_merge_states(const DLTensor* out_a, const DLTensor* lse_a,
                                                      const DLTensor* out_b, const DLTensor* lse_b,
                                                      DLTensor* out, DLTensor* lse, flash_mla_lse_base base,
                                                      void* stream);

/* See flash_mla::merge_states_in_place; out and lse are written. mask may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_merge_states_in_place(DLTensor* out, DLTensor* lse,
                                                               const DLTensor* other_out,
                                                               const DLTensor* other_lse,
                                                               const DLTensor* mask, flash_mla_lse_base base,
                                                               void* stream);

/* How a token lies in a cache page: flash_mla::KvFormat. Caches are (num_pages, page_size, 1, width), of bytes
 * (uint8) in the FP8 formats: 656, 584 and 576 of them per token. */
typedef int32_t flash_mla_kv_format;
enum {
  FLASH_MLA_KV_BFLOAT16 = 0,
  FLASH_MLA_KV_FLOAT16 = 1,
  FLASH_MLA_KV_FP8_V32 = 2,
  FLASH_MLA_KV_FP8_V4 = 3,
  FLASH_MLA_KV_FP8_TENSOR = 4
};

typedef struct flash_mla_kv_cache {
  const DLTensor* data;
  flash_mla_kv_format format;
  float scale; /* FLASH_MLA_KV_FP8_TENSOR: value = e4m3 * scale */
} flash_mla_kv_cache;

/* flash_mla::SparseKeys. topk_length may be NULL. */
typedef struct flash_mla_sparse_keys {
  flash_mla_kv_cache cache;
  const DLTensor* indices;
  const DLTensor* topk_length;
} flash_mla_sparse_keys;

/* flash_mla::SparseDecodeArgs. attn_sink and lse may be NULL; extra.cache.data NULL: no second cache. */
typedef struct flash_mla_sparse_decode_args {
  const DLTensor* q;
  flash_mla_sparse_keys keys;
  flash_mla_sparse_keys extra;
  const DLTensor* attn_sink;
  DLTensor* out;
  DLTensor* lse;
} flash_mla_sparse_decode_args;

/* Of sparse decode, sparse prefill and dense decode over FP8 caches. */
typedef struct flash_mla_sparse_options {
  float softmax_scale;        /* NaN: d_qk ** -0.5 (the default) */
  int32_t fixed_split_blocks; /* sparse decode, or of the schedule of dense decode; default 0 */
  int32_t num_threads;        /* CPU; default 0: as many as OpenMP would use */
  void* stream;               /* cudaStream_t; default NULL */
  int32_t causal;             /* dense decode; default 0 */
  int32_t block_size;         /* dense decode, of the schedule; default 64 */
  int32_t fp8_mma;            /* dense decode; default 0 */
} flash_mla_sparse_options;

/* Fills *options with the defaults. */
FLASH_MLA_API void flash_mla_sparse_options_init(flash_mla_sparse_options* options);

/* options may be NULL, here and below. */
FLASH_MLA_API flash_mla_status flash_mla_sparse_decode_workspace_size(
    const flash_mla_sparse_decode_args* args, const flash_mla_sparse_options* options, size_t* bytes);
FLASH_MLA_API flash_mla_status flash_mla_sparse_decode(const flash_mla_sparse_decode_args* args,
                                                       const flash_mla_sparse_options* options,
                                                       void* workspace, size_t workspace_bytes);

/* flash_mla::SparsePrefillArgs. All but q, cache, indices and out may be NULL. */
typedef struct flash_mla_sparse_prefill_args {
  const DLTensor* q;
  flash_mla_kv_cache cache;
  const DLTensor* indices;
  const DLTensor* topk_length;
  const DLTensor* attn_sink;
  const DLTensor* cu_seqlens_q;
  const DLTensor* cu_seqlens_k;
  const DLTensor* block_table;
  const DLTensor* cache_seqlens;
  DLTensor* out;
  DLTensor* max_logits;
  DLTensor* lse;
} flash_mla_sparse_prefill_args;

FLASH_MLA_API flash_mla_status flash_mla_sparse_prefill_workspace_size(
    const flash_mla_sparse_prefill_args* args, const flash_mla_sparse_options* options, size_t* bytes);
FLASH_MLA_API flash_mla_status flash_mla_sparse_prefill(const flash_mla_sparse_prefill_args* args,
                                                        const flash_mla_sparse_options* options,
                                                        void* workspace, size_t workspace_bytes);

/* flash_mla::DenseFp8DecodeArgs and flash_mla::DecodeScheduleView. lse may be NULL. */
typedef struct flash_mla_dense_fp8_decode_args {
  const DLTensor* q;
  flash_mla_kv_cache cache;
  const DLTensor* block_table;
  const DLTensor* cache_seqlens;
  DLTensor* out;
  DLTensor* lse;
  const DLTensor* parts;
  const DLTensor* num_splits;
} flash_mla_dense_fp8_decode_args;

FLASH_MLA_API flash_mla_status flash_mla_dense_fp8_decode_workspace_size(
    const flash_mla_dense_fp8_decode_args* args, const flash_mla_sparse_options* options, size_t* bytes);
FLASH_MLA_API flash_mla_status flash_mla_dense_fp8_decode(const flash_mla_dense_fp8_decode_args* args,
                                                          const flash_mla_sparse_options* options,
                                                          void* workspace, size_t workspace_bytes);

/* flash_mla::Fp8Recipe. */
typedef int32_t flash_mla_fp8_recipe;
enum {
  FLASH_MLA_FP8_FLASH_MLA = 0,
  FLASH_MLA_FP8_VLLM = 1,
  FLASH_MLA_FP8_SGLANG = 2,
  FLASH_MLA_FP8_INDEXER_POW2 = 3,
  FLASH_MLA_FP8_INDEXER = 4,
  FLASH_MLA_FP8_VLLM_INDEXER = 5
};

/* flash_mla::KvAppendArgs. norm_weight, positions and cos_sin may be NULL. cache.data is written. */
typedef struct flash_mla_append_kv_args {
  const DLTensor* latent;
  const DLTensor* rope;
  const DLTensor* slot_mapping;
  flash_mla_kv_cache cache;
  flash_mla_fp8_recipe recipe;
  const DLTensor* norm_weight;
  float norm_eps;
  const DLTensor* positions;
  const DLTensor* cos_sin;
} flash_mla_append_kv_args;

/* num_threads, stream: as in the options above. */
FLASH_MLA_API flash_mla_status flash_mla_append_kv(const flash_mla_append_kv_args* args, int32_t num_threads,
                                                   void* stream);

/* out[i] = the token in slots[i]; see flash_mla::gather_kv. */
FLASH_MLA_API flash_mla_status flash_mla_gather_kv(const flash_mla_kv_cache* cache, const DLTensor* slots,
                                                   DLTensor* out, int32_t num_threads, void* stream);

/* See flash_mla::quantise_fp8. */
FLASH_MLA_API flash_mla_status flash_mla_quantise_fp8(const DLTensor* x, int32_t tile,
                                                      flash_mla_fp8_recipe recipe, DLTensor* values,
                                                      DLTensor* scales, void* stream);

/* flash_mla::TopKOutput. Each may be NULL; page_size counts with a block_table. */
typedef struct flash_mla_top_k_output {
  const DLTensor* offsets;
  const DLTensor* block_table;
  const DLTensor* row_request;
  int64_t page_size;
} flash_mla_top_k_output;

/* flash_mla::TopKArgs. row_starts may be NULL; indices is written. */
typedef struct flash_mla_top_k_args {
  const DLTensor* logits;
  const DLTensor* lengths;
  const DLTensor* row_starts;
  flash_mla_top_k_output output;
  DLTensor* indices;
} flash_mla_top_k_args;

/* The k largest of every row, exactly; see flash_mla::top_k. num_threads, stream: as in the options above;
 * workspace may be NULL where the size asked for is 0. */
FLASH_MLA_API flash_mla_status flash_mla_top_k_workspace_size(const flash_mla_top_k_args* args,
                                                              int32_t num_threads, void* stream,
                                                              size_t* bytes);
FLASH_MLA_API flash_mla_status flash_mla_top_k(const flash_mla_top_k_args* args, int32_t num_threads,
                                               void* stream, void* workspace, size_t workspace_bytes);

/* flash_mla::MqaLogitsArgs. logits is NULL in calls that select. */
typedef struct flash_mla_mqa_logits_args {
  const DLTensor* q;
  const DLTensor* weights;
  const DLTensor* k;
  const DLTensor* k_scales;
  const DLTensor* key_begin;
  const DLTensor* key_end;
  DLTensor* logits;
  int32_t compressed;
  int32_t clean;
} flash_mla_mqa_logits_args;

/* flash_mla::PagedMqaLogitsArgs. logits is NULL in calls that select. */
typedef struct flash_mla_paged_mqa_logits_args {
  const DLTensor* q;
  const DLTensor* weights;
  const DLTensor* cache;
  const DLTensor* context_lens;
  const DLTensor* block_table;
  DLTensor* logits;
  int32_t clean;
} flash_mla_paged_mqa_logits_args;

/* The indexer's logits; see flash_mla::mqa_logits and paged_mqa_logits. */
FLASH_MLA_API flash_mla_status flash_mla_mqa_logits_workspace_size(const flash_mla_mqa_logits_args* args,
                                                                   int32_t num_threads, void* stream,
                                                                   size_t* bytes);
FLASH_MLA_API flash_mla_status flash_mla_mqa_logits(const flash_mla_mqa_logits_args* args,
                                                    int32_t num_threads, void* stream, void* workspace,
                                                    size_t workspace_bytes);
FLASH_MLA_API flash_mla_status flash_mla_paged_mqa_logits_workspace_size(
    const flash_mla_paged_mqa_logits_args* args, int32_t num_threads, void* stream, size_t* bytes);
FLASH_MLA_API flash_mla_status flash_mla_paged_mqa_logits(const flash_mla_paged_mqa_logits_args* args,
                                                          int32_t num_threads, void* stream, void* workspace,
                                                          size_t workspace_bytes);

/* flash_mla::MqaTopKOptions. */
typedef struct flash_mla_mqa_top_k_options {
  int32_t num_threads; /* CPU; default 0: as many as OpenMP would use */
  void* stream;        /* cudaStream_t; default NULL */
  size_t logits_bytes; /* logits that are kept at a time; default 64 MiB */
} flash_mla_mqa_top_k_options;

/* Fills *options with the defaults. */
FLASH_MLA_API void flash_mla_mqa_top_k_options_init(flash_mla_mqa_top_k_options* options);

/* Logits and selection in one call; see flash_mla::mqa_top_k and paged_mqa_top_k. output and options may be
 * NULL; indices is written. */
FLASH_MLA_API flash_mla_status flash_mla_mqa_top_k_workspace_size(const flash_mla_mqa_logits_args* args,
                                                                  const flash_mla_top_k_output* output,
                                                                  DLTensor* indices,
                                                                  const flash_mla_mqa_top_k_options* options,
                                                                  size_t* bytes);
FLASH_MLA_API flash_mla_status flash_mla_mqa_top_k(const flash_mla_mqa_logits_args* args,
                                                   const flash_mla_top_k_output* output, DLTensor* indices,
                                                   const flash_mla_mqa_top_k_options* options,
                                                   void* workspace, size_t workspace_bytes);
FLASH_MLA_API flash_mla_status flash_mla_paged_mqa_top_k_workspace_size(
    const flash_mla_paged_mqa_logits_args* args, const flash_mla_top_k_output* output, DLTensor* indices,
    const flash_mla_mqa_top_k_options* options, size_t* bytes);
FLASH_MLA_API flash_mla_status flash_mla_paged_mqa_top_k(const flash_mla_paged_mqa_logits_args* args,
                                                         const flash_mla_top_k_output* output,
                                                         DLTensor* indices,
                                                         const flash_mla_mqa_top_k_options* options,
                                                         void* workspace, size_t workspace_bytes);

/* See flash_mla::append_index_keys; cache is written. */
FLASH_MLA_API flash_mla_status flash_mla_append_index_keys(const DLTensor* k, const DLTensor* slot_mapping,
                                                           DLTensor* cache, flash_mla_fp8_recipe recipe,
                                                           int32_t rotate, int32_t num_threads, void* stream);

/* See flash_mla::quantise_index_queries; values and scaled_weights are written. */
FLASH_MLA_API flash_mla_status flash_mla_quantise_index_queries(const DLTensor* q, const DLTensor* weights,
                                                                float factor, flash_mla_fp8_recipe recipe,
                                                                int32_t rotate, DLTensor* values,
                                                                DLTensor* scaled_weights, int32_t num_threads,
                                                                void* stream);

/* flash_mla::GqaArgs and flash_mla::DecodeScheduleView. All but q, k, v and out may be NULL; parts and num_splits both or
 * neither. */
typedef struct flash_mla_gqa_args {
  const DLTensor* q;
  const DLTensor* k;
  const DLTensor* v;
  const DLTensor* cu_seqlens_q;
  const DLTensor* cu_seqlens_k;
  const DLTensor* seqlens_k;
  const DLTensor* block_table;
  const DLTensor* page_indptr;
  const DLTensor* page_indices;
  const DLTensor* sinks;
  const DLTensor* alibi_slopes;
  const DLTensor* mask;
  const DLTensor* mask_indptr;
  DLTensor* out;
  DLTensor* lse;
  const DLTensor* parts;
  const DLTensor* num_splits;
} flash_mla_gqa_args;

/* flash_mla::GqaOptions, and what the schedule was made with. */
typedef struct flash_mla_gqa_options {
  float softmax_scale;        /* NaN: head_dim ** -0.5 (the default) */
  int32_t causal;             /* default 0 */
  int32_t window_left;        /* default -1: none */
  int32_t window_right;       /* default -1: none */
  float soft_cap;             /* default 0: none */
  int32_t max_seqlen_q;       /* default 0: not known */
  int32_t num_scheduled;      /* default -1: the schedule is of all sequences */
  int32_t max_scheduled_q;    /* default 0: max_seqlen_q */
  int32_t num_threads;        /* CPU; default 0: as many as OpenMP would use */
  int32_t block_size;         /* of the schedule; default 64 */
  int32_t fixed_split_blocks; /* of the schedule; default 0 */
  void* stream;               /* cudaStream_t; default NULL */
} flash_mla_gqa_options;

/* Fills *options with the defaults. */
FLASH_MLA_API void flash_mla_gqa_options_init(flash_mla_gqa_options* options);

/* Attention over keys and values of their own; see flash_mla::gqa_attention. options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_gqa_workspace_size(const flash_mla_gqa_args* args,
                                                            const flash_mla_gqa_options* options,
                                                            size_t* bytes);
FLASH_MLA_API flash_mla_status flash_mla_gqa_attention(const flash_mla_gqa_args* args,
                                                       const flash_mla_gqa_options* options, void* workspace,
                                                       size_t workspace_bytes);

#ifdef __cplusplus
}
#endif

/* IWYU pragma: begin_exports */
#include "flash_mla/c_mhc.h"
#include "flash_mla/c_mla_cascade.h"
#include "flash_mla/c_pages.h"
#include "flash_mla/c_rows.h"
#include "flash_mla/c_sampling.h"
/* IWYU pragma: end_exports */

#endif /* FLASH_MLA_C_API_H_ */
