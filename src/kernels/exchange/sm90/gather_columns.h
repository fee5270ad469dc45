#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/exchange/sm90/peers.h"

namespace flash_mla::sm90 {

/// Every rank has some columns of a matrix that all are to have whole, and writes them to the others.
struct GatherColumns {
  Peers peers;
  void* whole[kMaxPeers] = {};        ///< of every rank, in its memory, aligned to 4 bytes
  std::int64_t rows = 0, pitch = 0;   ///< bytes from row to row, a multiple of 4
  std::int64_t first = 0, count = 0;  ///< bytes of a row that are this rank's, multiples of 4
  bool by_16 = false;                 ///< all of these are multiples of 16, on all ranks
  int ctas = 0;                       ///< of every rank, as AllReduceNorm's
};

/// Queues this rank's part; all ranks make the same call but for their columns. May be captured. Throws InvalidArgument.
void gather_columns(const GatherColumns& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
