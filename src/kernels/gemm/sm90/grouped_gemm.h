#pragma once

// The experts' products where every expert has many rows: tiles on the tensor cores.

#include "kernels/gemm/sm90/weight_stream.h"

namespace flash_mla::sm90 {

/// Rows of x in a unit of launch_grouped_gemm().
inline constexpr int kGroupedRows = 128;

/// Queues out[pair] = x[pair / x_divisor] · weight[expert]^T for the units of `args`, of at most kGroupedRows
/// pairs each; with silu_mul as there. Weights with scales are rounded to bfloat16, value times scale, on the way to
/// the tensor cores. Uses weight, scales, x, out and their strides, n, k, the experts' fields,
/// out_fp32, silu_mul and programmatic_launch; bias and accumulate are not supported. Requires what
/// launch_stream() requires.
cudaError_t launch_grouped_gemm(const WeightStream& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
