#ifndef FLASH_MLA_C_SAMPLING_H_
#define FLASH_MLA_C_SAMPLING_H_

/* The C ABI of flash_mla/sampling.h and flash_mla/routing.h: choices of tokens and of experts. Part of c_api.h. */

#include "flash_mla/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* flash_mla::SamplingOptions. */
typedef struct flash_mla_sampling_options {
  double temperature;    /* default 1 */
  double top_p;          /* default 1: all */
  double min_p;          /* default 0: all */
  int64_t top_k;         /* default 0: all */
  uint64_t seed;         /* default 0 */
  uint64_t position;     /* default 0 */
  int32_t probabilities; /* default 0: scores are logits */
  int32_t joint;         /* default 0: top_p is of what top_k leaves */
  int32_t num_threads;   /* default 0: as many as OpenMP would use */
  void* stream;          /* cudaStream_t, of tensors on a GPU; default NULL */
} flash_mla_sampling_options;

/* Fills *options with the defaults. */
FLASH_MLA_API void flash_mla_sampling_options_init(flash_mla_sampling_options* options);

/* flash_mla::SamplingRows; each may be NULL. */
typedef struct flash_mla_sampling_rows {
  const DLTensor* temperature;
  const DLTensor* top_k;
  const DLTensor* top_p;
  const DLTensor* min_p;
} flash_mla_sampling_rows;

/* flash_mla::DrawKeys; each may be NULL. */
typedef struct flash_mla_draw_keys {
  const DLTensor* seeds;
  const DLTensor* indices;
  const DLTensor* positions;
} flash_mla_draw_keys;

/* flash_mla::SampleArgs. rows and valid may be NULL; tokens and valid are written. */
typedef struct flash_mla_sample_args {
  const DLTensor* scores;
  const DLTensor* rows;
  flash_mla_sampling_rows options;
  flash_mla_draw_keys keys;
  DLTensor* tokens;
  DLTensor* valid;
} flash_mla_sample_args;

/* See flash_mla::sample_tokens. options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_sample_tokens(const flash_mla_sample_args* args,
                                                       const flash_mla_sampling_options* options);

/* See flash_mla::filter_tokens. rows and options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_filter_tokens(const DLTensor* scores,
                                                       const flash_mla_sampling_rows* rows, DLTensor* out,
                                                       const flash_mla_sampling_options* options);

/* See flash_mla::token_probabilities. rows and options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_token_probabilities(const DLTensor* logits,
                                                             const flash_mla_sampling_rows* rows,
                                                             DLTensor* out,
                                                             const flash_mla_sampling_options* options);

/* flash_mla::SpeculativeArgs. accepted and emitted may be NULL; tokens, accepted and emitted are written. */
typedef struct flash_mla_speculative_args {
  const DLTensor* draft_probs;
  const DLTensor* draft_tokens;
  const DLTensor* target_probs;
  flash_mla_draw_keys keys;
  DLTensor* tokens;
  DLTensor* accepted;
  DLTensor* emitted;
} flash_mla_speculative_args;

/* See flash_mla::speculative_sampling. options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_speculative_sampling(const flash_mla_speculative_args* args,
                                                              const flash_mla_sampling_options* options);

/* flash_mla::RoutingOptions. */
typedef struct flash_mla_routing_options {
  int32_t sigmoid;            /* default 0: softmax */
  int32_t num_groups;         /* default 1 */
  int32_t groups_kept;        /* default 1 */
  int32_t groups_by_best_two; /* default 0: by their best */
  int32_t normalise;          /* default 0 */
  float scale;                /* default 1 */
  int32_t num_threads;        /* default 0: as many as OpenMP would use */
  void* stream;               /* cudaStream_t; default NULL */
} flash_mla_routing_options;

/* Fills *options with the defaults. */
FLASH_MLA_API void flash_mla_routing_options_init(flash_mla_routing_options* options);

/* See flash_mla::choose_experts; ids and weights are written. bias and options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_choose_experts(const DLTensor* logits, const DLTensor* bias,
                                                        DLTensor* ids, DLTensor* weights,
                                                        const flash_mla_routing_options* options);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_MLA_C_SAMPLING_H_ */
