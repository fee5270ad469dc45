#ifndef FLASH_MLA_C_MLA_CASCADE_H_
#define FLASH_MLA_C_MLA_CASCADE_H_

/* The C ABI of flash_mla/mla_cascade.h: latent attention of requests that share a prefix. Part of c_api.h. */

#include "flash_mla/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* See flash_mla::expand_latents; k and v are written. num_threads 0: as many as OpenMP would use. */
FLASH_MLA_API flash_mla_status flash_mla_expand_latents(const DLTensor* k_cache, const DLTensor* pages,
                                                        const DLTensor* kv_b, DLTensor* k, DLTensor* v,
                                                        int32_t num_threads);

/* flash_mla::MlaCascadeArgs and flash_mla::DecodeScheduleView. lse may be NULL. */
typedef struct flash_mla_mla_cascade_args {
  const DLTensor* q;
  const DLTensor* prefix_k;
  const DLTensor* prefix_v;
  const DLTensor* kv_b;
  const DLTensor* k_cache;
  const DLTensor* block_table;
  const DLTensor* cache_seqlens;
  DLTensor* out;
  DLTensor* lse;
  const DLTensor* parts;
  const DLTensor* num_splits;
} flash_mla_mla_cascade_args;

/* flash_mla::MlaCascadeOptions, and what the schedule was made with. */
typedef struct flash_mla_mla_cascade_options {
  float softmax_scale;        /* NaN: (d_nope + d_rope) ** -0.5 (the default) */
  int32_t causal;             /* default 0 */
  int32_t num_threads;        /* default 0: as many as OpenMP would use */
  int32_t block_size;         /* of the schedule; default 64 */
  int32_t fixed_split_blocks; /* of the schedule; default 0 */
} flash_mla_mla_cascade_options;

/* Fills *options with the defaults. */
FLASH_MLA_API void flash_mla_mla_cascade_options_init(flash_mla_mla_cascade_options* options);

/* See flash_mla::mla_cascade. options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_mla_cascade_workspace_size(
    const flash_mla_mla_cascade_args* args, const flash_mla_mla_cascade_options* options, size_t* bytes);
FLASH_MLA_API flash_mla_status flash_mla_mla_cascade(const flash_mla_mla_cascade_args* args,
                                                     const flash_mla_mla_cascade_options* options,
                                                     void* workspace, size_t workspace_bytes);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_MLA_C_MLA_CASCADE_H_ */
