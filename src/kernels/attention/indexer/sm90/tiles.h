#pragma once

#include <cuda_runtime.h>

namespace flash_mla::sm90::index_kernel {

struct Params;

/// Do keys come as whole tiles of 64, and queries 16 bytes at a time? Then score_tiles takes them.
bool comes_in_tiles(const Params& p);

/// Blocks of it that are on a multiprocessor at a time, by the rows of a group.
constexpr int blocks_of_tiles(int together) { return together == 1 ? 3 : 2; }

/// Queues score_tiles for groups of `together` rows, 1, 2 or 4.
void launch_tiles(const Params& p, int together, long long groups, long long runs, cudaStream_t stream);

}  // namespace flash_mla::sm90::index_kernel
