#pragma once

// How a producer warp brings its 16 keys of a tile into a slot: rows of 16-bit elements, by asynchronous copies.
//
// A part is half of V's columns (0 and 1; four chunks), or the rope chunk (2). `chunk` is the address of the warp's first
// key in the part's first chunk. arrive() counts the warp's threads in at the part's barrier, once what they have put there
// is there.

#include <cuda.h>

#include <cstdint>

#include "kernels/attention/sparse_prefill/sm90/selection.cuh"
#include "kernels/attention/sparse_prefill/sm90/smem.cuh"
#include "kernels/ptx/mma.cuh"
#include "kv/format.h"

namespace flash_mla::sm90::sparse_prefill {

/// kChunks times 128 bytes at `offset` of this lane's rows, each by eight lanes.
template <int kChunks>
__device__ __forceinline__ void copy_rows(const Rows& rows, std::uint32_t chunk, unsigned offset,
                                          unsigned lane) {
  const unsigned sub = lane / 8;
  const std::uint32_t to = chunk + sub * 128 + (lane ^ sub) % 8 * 16;
#pragma unroll
  for (int i = 0; i < kWarpKeys / 4; ++i) {
    const std::uint32_t bytes = rows.is_valid(i) ? 16 : 0;
    const std::byte* const from = rows.at[i] + offset;
    const std::uint32_t place = (i % 2 == 0 ? to : to ^ 64) + static_cast<std::uint32_t>(i * 512);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      ptx::cp_async_16(place + static_cast<std::uint32_t>(c) * kChunkBytes, from + c * 128, bytes);
  }
}

struct Gather {
  static constexpr int kRegisters = 40;  ///< of a producer's thread
  const SparsePrefillParams& p;
  const unsigned lane;

  // Before a slot is free. From here on, rows begin where this lane reads.
  __device__ void begin(Rows& rows) const {
#pragma unroll
    for (auto& at : rows.at) at += lane % 8 * 16;
  }
  template <int kHalf>
  __device__ void half(const Rows& rows, std::uint32_t chunk) const {
    copy_rows<4>(rows, chunk, kHalf * 512, lane);
  }
  // Between the halves.
  __device__ void next(const Rows&) const {}
  __device__ void rope(const Rows& rows, std::uint32_t chunk) const {
    copy_rows<1>(rows, chunk, kHeadDimV * 2, lane);
  }
  /// Threads' arrivals at the barrier of a part.
  static constexpr int arrivals(int) { return kProducerWarps * 32; }
  template <int kPart>
  __device__ void arrive(std::uint64_t* full) const {
    ptx::cp_async_arrive(full);
  }
};

}  // namespace flash_mla::sm90::sparse_prefill
