#ifndef FLASH_MLA_C_MHC_H_
#define FLASH_MLA_C_MHC_H_

/* The C ABI of flash_mla/mhc.h: hyper-connections. Part of c_api.h. */

#include "flash_mla/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* flash_mla::MhcWeights. norm may be NULL. */
typedef struct flash_mla_mhc_weights {
  const DLTensor* fn;
  const DLTensor* scale;
  const DLTensor* base;
  const DLTensor* norm;
} flash_mla_mhc_weights;

/* flash_mla::MhcMixes; all are written. */
typedef struct flash_mla_mhc_mixes {
  DLTensor* post;
  DLTensor* comb;
  DLTensor* layer_input;
} flash_mla_mhc_mixes;

/* flash_mla::MhcOptions. */
typedef struct flash_mla_mhc_options {
  float rms_eps;           /* default 1e-6 */
  float pre_eps;           /* default 1e-6 */
  float post_mult;         /* default 2 */
  float sinkhorn_eps;      /* default 1e-6 */
  float norm_eps;          /* default 1e-6 */
  int32_t sinkhorn_repeat; /* default 20 */
  int32_t num_threads;     /* default 0: as many as OpenMP would use */
  void* stream;            /* cudaStream_t, of tensors on a GPU; default NULL */
} flash_mla_mhc_options;

/* Fills *options with the defaults. */
FLASH_MLA_API void flash_mla_mhc_options_init(flash_mla_mhc_options* options);

/* See flash_mla::mhc_pre. options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_mhc_pre(const DLTensor* residual,
                                                 const flash_mla_mhc_weights* weights,
                                                 const flash_mla_mhc_mixes* mixes,
                                                 const flash_mla_mhc_options* options);

/* See flash_mla::mhc_post; out is written. num_threads 0: as many as OpenMP would use. stream: cudaStream_t, of tensors on a GPU. */
FLASH_MLA_API flash_mla_status flash_mla_mhc_post(const DLTensor* x, const DLTensor* residual,
                                                  const DLTensor* post, const DLTensor* comb, DLTensor* out,
                                                  int32_t num_threads, void* stream);

/* See flash_mla::mhc_post_pre; out is written. options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_mhc_post_pre(const DLTensor* x, const DLTensor* residual,
                                                      const DLTensor* post, const DLTensor* comb,
                                                      DLTensor* out, const flash_mla_mhc_weights* weights,
                                                      const flash_mla_mhc_mixes* mixes,
                                                      const flash_mla_mhc_options* options);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_MLA_C_MHC_H_ */
