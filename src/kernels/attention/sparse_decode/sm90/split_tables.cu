// The tables of splits of a call whose two lists are decoded one after the other.
//
// Tile:      the batch, by one block.
// Threads:   1024, each with a stretch of the requests.
// Memory:    1024 sums.
// Registers: some 20.

#include "base/cuda/check.h"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "kernels/attention/dense_decode/sm90/params.h"
#include "kernels/attention/sparse_decode/sm90/split_tables.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 1024;

__device__ int splits_of(const SplitTables& t, int list, int req) {
  const int length = t.lists.topk_length[list] == nullptr
                         ? t.lists.topk[list]
                         : max(min(t.lists.topk_length[list][req], t.lists.topk[list]), 0);
  const int tiles = (length + kTileTokens - 1) / kTileTokens;
  return max((tiles + t.split_tiles - 1) / t.split_tiles, 1);
}

__global__ void __launch_bounds__(kThreads) split_tables_kernel(const __grid_constant__ SplitTables t) {
  __shared__ int sums[kThreads];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int thread = static_cast<int>(threadIdx.x), stretch = (t.batch + kThreads - 1) / kThreads;
  const int begin = min(thread * stretch, t.batch), end = min(begin + stretch, t.batch);
  int sum = 0;
  for (int r = begin; r < end; ++r) sum += splits_of(t, 0, r) + splits_of(t, 1, r);
  sums[thread] = sum;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const int before = thread >= step ? sums[thread - step] : 0;
    __syncthreads();
    sums[thread] += before;
    __syncthreads();
  }
  int at = sums[thread] - sum;
  for (int r = begin; r < end; ++r) {
    const int first = splits_of(t, 0, r);
    t.num_splits[0][r] = at;
    t.num_splits[1][r] = at + first;
    at += first + splits_of(t, 1, r);
  }
  if (thread != kThreads - 1) return;
  // A walk takes the difference of neighbours for a request's splits: two at least, so that each is a partial result.
  t.num_splits[0][t.batch] = sums[thread];
  t.num_splits[1][t.batch] = sums[thread] + 1;
}

}  // namespace

void launch_split_tables(const SplitTables& tables, void* stream) {
  check(launch(LaunchConfig(dim3(1), kThreads, 0, static_cast<cudaStream_t>(stream)).programmatic(),
               split_tables_kernel, tables),
        "split_tables_kernel");
}

}  // namespace flash_mla::sm90
