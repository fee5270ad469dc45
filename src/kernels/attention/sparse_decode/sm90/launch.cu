// Launches the kernels of sparse decode. Everything a launch depends on has been decided in sparse_decode.cpp.

#include <cuda_runtime.h>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/dense_decode/sm90/launch.h"
#include "kernels/attention/sparse_decode/sm90/kernel.cuh"
#include "kernels/attention/sparse_decode/sm90/launch.h"

namespace flash_mla::sm90 {
namespace {

constexpr std::size_t kSmemBytes = sizeof(sparse::Smem) + 1024;

template <KvFormat kFormat>
void launch_decode(const SparseDecodeParams& p, const CUtensorMap& q_map, const DecodePlan& plan,
                   cudaStream_t stream) {
  check(allow_shared_memory<sparse::sparse_decode_kernel<kFormat>>(kSmemBytes), "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(plan.grid.x), 1, static_cast<unsigned>(plan.grid.z));
  LaunchConfig config(grid, sparse::kThreads, kSmemBytes, stream);
  check(launch(config.programmatic(), sparse::sparse_decode_kernel<kFormat>, q_map, p),
        "sparse_decode_kernel");
}

}  // namespace

void launch_sparse_decode(const SparseDecodeParams& p, const CUtensorMap& q_map, KvFormat format,
                          const DecodePlan& plan, void* stream) {
  const auto decode =
      format == KvFormat::kFp8V32 ? launch_decode<KvFormat::kFp8V32> : launch_decode<KvFormat::kFp8V4>;
  decode(p, q_map, plan, static_cast<cudaStream_t>(stream));
  if (plan.combines) launch_combine_lists(p, p, plan, stream);
}

}  // namespace flash_mla::sm90
