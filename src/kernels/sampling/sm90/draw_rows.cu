// One token drawn from each row of logits: row.cuh has tile, threads and memory.

#include "base/cuda/check.h"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "kernels/sampling/sm90/draw_rows.h"
#include "kernels/sampling/sm90/row.cuh"

namespace flash_mla::sm90 {
namespace {

using namespace draws;

__global__ void __launch_bounds__(kThreads)
    draw_rows_kernel(const float* logits, int columns, const Draw* draws, std::int32_t* tokens) {
  __shared__ Shared shared;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const unsigned i = blockIdx.y;
  const Draw draw = draws[i];
  const std::int32_t likeliest = tokens[i];
  if (draw.scale == 0 || likeliest < 0) return;
  const float* row = logits + static_cast<std::int64_t>(i) * columns;
  const int token =
      Row(DenseLogits{row, row[likeliest], draw.scale, draw.min_weight}, columns, draw, shared).draw();
  if (token >= 0 && threadIdx.x == 0) tokens[i] = token;
}

}  // namespace

void draw_rows(Matrix logits, const Draw* draws, std::int32_t* tokens, cudaStream_t stream) {
  if (logits.rows == 0) return;
  const int blocks = blocks_of_row(logits.rows);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(logits.rows));
  LaunchConfig config(grid, kThreads, 0, stream);
  config.cluster(static_cast<unsigned>(blocks)).programmatic();
  check(launch(config, draw_rows_kernel, reinterpret_cast<const float*>(logits.data),
               static_cast<int>(logits.columns), draws, tokens),
        "draw_rows");
}

}  // namespace flash_mla::sm90
