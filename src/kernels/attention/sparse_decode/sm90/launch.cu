// Launches the kernels of sparse decode. Everything a launch depends on has been decided in sparse_decode.cpp.

#include <cuda_runtime.h>

#include <cstdlib>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/dense_decode/sm90/launch.h"
#include "kernels/attention/sparse_decode/sm90/kernel.cuh"
#include "kernels/attention/sparse_decode/sm90/launch.h"
#include "kernels/attention/sparse_decode/sm90/launch_rows.cuh"

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

template <bool kBulk>
void launch_rows(const SparseDecodeParams& p, const TensorView& q, const DecodePlan& plan,
                 cudaStream_t stream) {
  const auto launch = p.blocks.heads <= 16   ? sparse::launch_rows_of<16, kBulk>
                      : p.blocks.heads <= 32 ? sparse::launch_rows_of<32, kBulk>
                                             : sparse::launch_rows_of<64, kBulk>;
  launch(p, {q.ptr<const std::uint16_t>(), q.stride(0), q.stride(1), q.stride(2)}, plan, stream);
}

}  // namespace

void launch_sparse_decode(const SparseDecodeParams& p, const TensorView& q, const CUtensorMap& q_map,
                          KvFormat format, const DecodePlan& plan, void* stream) {
  // For a first comparison: 0 the kernel that widens keys into shared memory, 1 bulk copies, 2 copies of 16 bytes.
  const char* const rows = std::getenv("FLASH_MLA_ROWS");
  if (format == KvFormat::kFp8V32 && (rows == nullptr || *rows != '0')) {
    const auto launch = rows != nullptr && *rows == '2' ? launch_rows<false> : launch_rows<true>;
    launch(p, q, plan, static_cast<cudaStream_t>(stream));
    if (plan.combines) launch_combine_lists(p, p, plan, stream);
    return;
  }
  const auto decode =
      format == KvFormat::kFp8V32 ? launch_decode<KvFormat::kFp8V32> : launch_decode<KvFormat::kFp8V4>;
  decode(p, q_map, plan, static_cast<cudaStream_t>(stream));
  if (plan.combines) launch_combine_lists(p, p, plan, stream);
}

}  // namespace flash_mla::sm90
