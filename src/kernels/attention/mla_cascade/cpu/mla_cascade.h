#pragma once

#include "flash_mla/mla_cascade.h"

namespace flash_mla::cpu {

/// The products around attention over a shared prefix. Arguments have been checked; num_threads is at least 1.

void expand_latents(const ExpandArgs& args, int num_threads);

/// absorbed (b, s_q, h, rank + d_rope): [q_nope · W_UK | q_rope] of q (b, s_q, h, d_nope + d_rope).
void absorb_queries(const TensorView& q, const TensorView& kv_b, const TensorView& absorbed, int num_threads);

/// out (b, s_q, h, d_v) = latent (b, s_q, h, rank) · W_UV^T.
void project_values(const TensorView& latent, const TensorView& kv_b, const TensorView& out, int num_threads);

}  // namespace flash_mla::cpu
