#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/matrix.h"
#include "kernels/sampling/draw.h"

namespace flash_mla::sm90 {

/// tokens[i] (int32) of every row i of `logits` (float32, dense) whose draw has a scale: the token that
/// draw_token draws from it, to the bit of its arithmetic. On entry tokens[i] is the row's likeliest token,
/// or -1 where there is none, which stays. `draws`: (logits.rows), on the device. Queued on `stream`;
/// allocates nothing.
void draw_rows(Matrix logits, const Draw* draws, std::int32_t* tokens, cudaStream_t stream);

}  // namespace flash_mla::sm90
