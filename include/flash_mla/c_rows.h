#ifndef FLASH_MLA_C_ROWS_H_
#define FLASH_MLA_C_ROWS_H_

/* The C ABI of flash_mla/rows.h: norms, gates and rotations of rows. Part of c_api.h. num_threads: CPU; 0: as many as OpenMP
 * would use. stream: cudaStream_t, of tensors on a GPU. */

#include "flash_mla/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flash_mla_rms_norm_options {
  float eps;           /* default 1e-6 */
  float weight_offset; /* default 0; 1 where weights are relative to 1 */
  float out_scale;     /* of an out of uint8 (e4m3): value = e4m3 * out_scale; default 1 */
  int32_t num_threads; /* default 0 */
  void* stream;        /* default NULL */
} flash_mla_rms_norm_options;

/* Fills *options with the defaults. */
FLASH_MLA_API void flash_mla_rms_norm_options_init(flash_mla_rms_norm_options* options);

/* See flash_mla::rms_norm. options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_rms_norm(const DLTensor* x, const DLTensor* weight, DLTensor* out,
                                                  const flash_mla_rms_norm_options* options);

/* See flash_mla::add_rms_norm; residual is written. options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_add_rms_norm(const DLTensor* x, DLTensor* residual,
                                                      const DLTensor* weight, DLTensor* out,
                                                      const flash_mla_rms_norm_options* options);

/* flash_mla::Activation, an integer so that a wrong one is an error. */
typedef int32_t flash_mla_activation;
enum { FLASH_MLA_SILU = 0, FLASH_MLA_GELU = 1, FLASH_MLA_GELU_TANH = 2 };

/* See flash_mla::gated_activation. */
FLASH_MLA_API flash_mla_status flash_mla_gated_activation(const DLTensor* gate_up, DLTensor* out,
                                                          flash_mla_activation activation,
                                                          int32_t num_threads, void* stream);

/* flash_mla::RopeScaling, an integer so that a wrong one is an error. */
typedef int32_t flash_mla_rope_scaling;
enum {
  FLASH_MLA_ROPE_NONE = 0,
  FLASH_MLA_ROPE_LINEAR = 1,
  FLASH_MLA_ROPE_LLAMA3 = 2,
  FLASH_MLA_ROPE_YARN = 3
};

/* flash_mla::RopeOptions. */
typedef struct flash_mla_rope_options {
  double theta;                   /* default 10000 */
  double factor;                  /* default 1 */
  double low_freq_factor;         /* of LLAMA3; default 1 */
  double high_freq_factor;        /* of LLAMA3; default 4 */
  double beta_fast;               /* of YARN; default 32 */
  double beta_slow;               /* of YARN; default 1 */
  int64_t original_max_position;  /* of LLAMA3 and YARN; default 0, which they refuse */
  float attention_factor;         /* of YARN; default 1 */
  flash_mla_rope_scaling scaling; /* default NONE */
  int32_t interleaved;            /* default 0: pairs are (i, i + rotary_dim / 2); else (2 i, 2 i + 1) */
  int32_t rotary_dim;             /* default 0: all of a head */
  int32_t num_threads;            /* default 0 */
  void* stream;                   /* default NULL */
} flash_mla_rope_options;

/* Fills *options with the defaults. */
FLASH_MLA_API void flash_mla_rope_options_init(flash_mla_rope_options* options);

/* See flash_mla::apply_rope. cos_sin and options may be NULL. */
FLASH_MLA_API flash_mla_status flash_mla_apply_rope(const DLTensor* x, const DLTensor* positions,
                                                    const DLTensor* cos_sin, DLTensor* out,
                                                    const flash_mla_rope_options* options);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_MLA_C_ROWS_H_ */
