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

/* See flash_mla::merge_states. */
FLASH_MLA_API flash_mla_status flash_mla_merge_states(const DLTensor* out_a, const DLTensor* lse_a,
                                                      const DLTensor* out_b, const DLTensor* lse_b,
                                                      DLTensor* out, DLTensor* lse, flash_mla_lse_base base);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_MLA_C_API_H_ */
