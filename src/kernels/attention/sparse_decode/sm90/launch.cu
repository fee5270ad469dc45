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

/// Null where the kernel that widens keys into shared memory is to be used.
sparse::RowsLaunch rows_launch_of(KvFormat format, bool bf16, int head_dim, int heads) {
  using namespace sparse;
  using namespace raw_rows;
  if (!kv::is_fp8(format)) {
    const auto launch = head_dim == 576
                            ? (bf16 ? rows_launch<WideRows<576>, true> : rows_launch<WideRows<576>, false>)
                            : (bf16 ? rows_launch<WideRows<512>, true> : rows_launch<WideRows<512>, false>);
    return launch(heads);
  }
  const bool v32 = format == KvFormat::kFp8V32;
  if (!bf16) return (v32 ? rows_launch<V32Rows, false> : rows_launch<V4Rows, false>)(heads);
  // For a comparison: 0 the kernel that widens keys into shared memory.
  const char* const rows = std::getenv("FLASH_MLA_ROWS");
  if (rows != nullptr && *rows == '0') return nullptr;
  return (v32 ? rows_launch<V32Rows, true> : rows_launch<V4Rows, true>)(heads);
}

}  // namespace

void launch_sparse_decode(const SparseDecodeParams& p, const TensorView& q, const CUtensorMap& q_map,
                          KvFormat format, const DecodePlan& plan, void* stream) {
  const bool bf16 = q.dtype == DType::kBFloat16;
  const auto launch = rows_launch_of(format, bf16, static_cast<int>(q.size(3)), p.blocks.heads);
  if (launch != nullptr) {
    launch(p, {q.ptr<const std::uint16_t>(), q.stride(0), q.stride(1), q.stride(2)}, plan,
           static_cast<cudaStream_t>(stream));
    if (plan.combines) launch_combine_lists(p, p, bf16, plan, stream);
    return;
  }
  const auto decode =
      format == KvFormat::kFp8V32 ? launch_decode<KvFormat::kFp8V32> : launch_decode<KvFormat::kFp8V4>;
  decode(p, q_map, plan, static_cast<cudaStream_t>(stream));
  if (plan.combines) launch_combine_lists(p, p, true, plan, stream);
}

}  // namespace flash_mla::sm90
