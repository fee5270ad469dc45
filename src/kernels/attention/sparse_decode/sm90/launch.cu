// Launches the kernels of sparse decode. Everything a launch depends on has been decided in sparse_decode.cpp.

#include <cuda_runtime.h>

#include <cstdint>

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

/// The kernel over rows as they lie, or the one that widens keys into shared memory (kernel.cuh)? The former takes every
/// format, and
/// does not pad heads to 64, but takes longer to its first tile. Measured on an H200 (docs/kernels/raw-rows-sm90.md): of 656-byte
/// rows it is ahead with up to 32 heads from seven tiles a CTA on, of V4's with up to 16. Where splits do not depend on the
/// batch, the kernel must not either.
bool takes_rows(const SparseDecodeParams& p, KvFormat format, const DecodePlan& plan) {
  const bool v32 = format == KvFormat::kFp8V32;
  if (!v32 && format != KvFormat::kFp8V4) return true;
  if (p.blocks.heads > (v32 ? 32 : 16)) return false;
  if (p.split_tiles > 0 || !v32) return true;
  const auto tiles = [](int topk) { return (topk + kTileTokens - 1) / kTileTokens; };
  return std::int64_t{p.batch} * (tiles(p.keys[0].topk) + tiles(p.keys[1].topk)) >= 7 * plan.grid.z;
}

sparse::RowsLaunch rows_launch_of(KvFormat format, bool bf16, int head_dim, int heads) {
  using namespace sparse;
  using namespace raw_rows;
  switch (format) {
    case KvFormat::kFp8V32:
      return bf16 ? rows_launch<V32Rows, true>(heads) : rows_launch<V32Rows, false>(heads);
    case KvFormat::kFp8V4:
      return bf16 ? rows_launch<V4Rows, true>(heads) : rows_launch<V4Rows, false>(heads);
    case KvFormat::kFp8Tensor:
      return bf16 ? rows_launch<TensorRows, true>(heads) : rows_launch<TensorRows, false>(heads);
    default:
      if (head_dim == 576)
        return bf16 ? rows_launch<WideRows<576>, true>(heads) : rows_launch<WideRows<576>, false>(heads);
      return bf16 ? rows_launch<WideRows<512>, true>(heads) : rows_launch<WideRows<512>, false>(heads);
  }
}

}  // namespace

void launch_sparse_decode(const SparseDecodeParams& p, const TensorView& q, const CUtensorMap& q_map,
                          KvFormat format, const DecodePlan& plan, void* stream) {
  const bool bf16 = q.dtype == DType::kBFloat16;
  if (!bf16 || takes_rows(p, format, plan)) {
    const auto launch = rows_launch_of(format, bf16, static_cast<int>(q.size(3)), p.blocks.heads);
    launch(p, {q.ptr<const std::uint16_t>(), q.stride(0), q.stride(1), q.stride(2)}, plan,
           static_cast<cudaStream_t>(stream));
    return;
  }
  const auto decode =
      format == KvFormat::kFp8V32 ? launch_decode<KvFormat::kFp8V32> : launch_decode<KvFormat::kFp8V4>;
  decode(p, q_map, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace flash_mla::sm90
