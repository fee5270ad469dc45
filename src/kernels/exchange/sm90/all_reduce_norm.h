#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/exchange/sm90/peers.h"

namespace flash_mla::sm90 {

/// x += the sum of all ranks' partial sums, and normed = rms_norm(x) * weight: what follows attention and experts, in one
/// kernel on each rank. Rank r adds up rows r, r + size, ... out of all ranks' memory, in float32 and in the order of the
/// ranks, and writes the results to all: every rank ends with the same bits.
struct AllReduceNorm {
  Peers peers;
  std::int64_t rows = 0, hidden = 0;  ///< hidden: a multiple of 8, at most 16,384
  /// Of every rank, in the memory of each, dense bfloat16 (rows, hidden), aligned to 16 bytes; of all ranks the same x.
  const void* partial[kMaxPeers] = {};
  void* x[kMaxPeers] = {};
  void* normed[kMaxPeers] = {};
  const float* weight = nullptr;  ///< (hidden), this rank's copy; null on all ranks: no norm
  float eps = 0;
  /// CTAs of every rank, the same on all. They wait for those of the other ranks: where ranks share a GPU, all ranks'
  /// must fit on it together, at two a multiprocessor.
  int ctas = 0;
  int repeats = 1;  ///< for measurements without launches: the call so many times over
};

/// Queues this rank's part; all ranks make the same call. Allocates nothing, and may be captured in a CUDA graph. Throws
/// InvalidArgument.
void all_reduce_norm(const AllReduceNorm& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
