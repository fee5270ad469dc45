#pragma once

// Token-sparse MLA decode over rows as they lie in the cache, up to 64 heads of one query token per CTA.
//
// Tile       64 keys x kHeads (16, 32, 64) heads x 576 or 512; both products have keys or columns as M and heads as N, with
//            A in registers, made from the rows (raw_rows/sm90/smem.cuh).
// Threads    512: one warpgroup of scores (Q K^T, softmax), two of values (256 columns of O each), one of producers.
// Shared     kHeads 64: of 656-byte rows Q 72 KB | P 32 KB, one tile for each of a row's four scales | 11 slots of 16 rows,
//            113 KB; of 584-byte rows 64 | 32, two tiles twice | 13, 124; of rows of 1152 bytes 72 | 16 | 7, 128;
//            2 KB of statistics and barriers.
// Registers  128 at the start, then by heads (raw_rows::Registers), through setmaxnreg; of 64 heads scores 144 (two sums of
//            32, A 16, row sums 16), values 168 (O 128, A 8, words 8), producers 32.
//
// The 128 heads of a token are two CTAs; each reads all keys.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/raw_rows/sm90/scores.cuh"
#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/attention/raw_rows/sm90/values.cuh"
#include "kernels/attention/sparse_decode/sm90/rows_producer.cuh"
#include "kernels/attention/sparse_decode/sm90/rows_work.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90::sparse {

/// Q by its elements: rows are read by threads, not by the copy engine.
struct QueryView {
  const std::uint16_t* data;
  std::int64_t stride_b, stride_s, stride_h;
};

template <class Format, int kHeads, bool kBf16>
__global__ void __launch_bounds__(raw_rows::kThreads, 1)
    sparse_decode_rows_kernel(const QueryView q, const __grid_constant__ SparseDecodeParams p) {
  extern __shared__ std::byte dynamic_smem[];
  using S = raw_rows::Smem<Format, kHeads>;
  using Work = RowsWork<kBf16>;
  auto& s = *reinterpret_cast<S*>((reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  using Registers = raw_rows::Registers<kHeads>;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) raw_rows::init_barriers(s);
  ptx::grid_dependency_wait();
  const PartRange part = part_of(p, static_cast<int>(blockIdx.z));
  __syncthreads();
  ptx::grid_dependency_launch();
  if (part.begin_req >= p.batch) return;
  const Work work{p, part, q.data, q.stride_b, q.stride_s, q.stride_h};
  if (warp < 4) {
    ptx::set_max_registers_up<Registers::kScores>();
    raw_rows::Scores<kHeads, Format, Work>(work, s).run();
  } else if (warp < 8) {
    ptx::set_max_registers_up<Registers::kValues>();
    raw_rows::Values<kHeads, Format, Work, 0>(work, s).run();
  } else if (warp < 12) {
    ptx::set_max_registers_up<Registers::kValues>();
    raw_rows::Values<kHeads, Format, Work, 1>(work, s).run();
  } else {
    ptx::set_max_registers_down<Registers::kProducers>();
    RowsProducer<S>{p, s, part, warp - 12, static_cast<int>(threadIdx.x) % 32, token_of_block(p)}.run();
  }
}

}  // namespace flash_mla::sm90::sparse
