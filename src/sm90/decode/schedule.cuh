#pragma once

// The decode schedule on the device: the algorithm of src/schedule, one block. All threads turn lengths into
// block counts and sum them; one thread walks requests and parts, which is a chain of dependent decisions.

#include <cstdint>

#include "sm90/decode/params.h"
#include "sm90/ptx/cluster.cuh"

namespace flash_mla::sm90 {

inline constexpr int kScheduleThreads = 256;
static __global__ void __launch_bounds__(kScheduleThreads) schedule_kernel(const ScheduleParams p) {
  extern __shared__ std::int32_t blocks[];  // (batch)
  __shared__ std::int32_t total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  int mine = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.batch; i += kScheduleThreads) {
    const int n =
        max((max(p.cache_seqlens[i], 0) + p.block_size - 1) / p.block_size, p.min_blocks_per_request);
    blocks[i] = n;
    mine += n + p.fixed_overhead_blocks;
  }
  atomicAdd(&total, mine);
  __syncthreads();
  if (threadIdx.x == 0) {
    const int payload = (total + p.num_parts - 1) / p.num_parts + p.fixed_overhead_blocks;
    int req = 0, block = 0, split = 0, splits = 0;
    p.num_splits[0] = 0;
    for (int part = 0; part < p.num_parts; ++part) {
      const bool last = part + 1 == p.num_parts;
      const int begin_req = req, begin_block = block, begin_split = split;
      int room = last ? 0x7FFFFFFF : payload;
      while (req < p.batch) {
        const int left = blocks[req] - block;
        if (room >= left + p.fixed_overhead_blocks) {
          room -= left + p.fixed_overhead_blocks;
          splits += split + 1;
          p.num_splits[req + 1] = splits;
          ++req;
          block = 0;
          split = 0;
        } else {
          if (room > p.fixed_overhead_blocks) {
            block += room - p.fixed_overhead_blocks;
            ++split;
          }
          break;
        }
      }
      const int end_req = block > 0 ? req : req - 1;
      // The blocks a request has, not those it counts as: rows of an empty request end at block 0.
      const auto blocks_in = [&](int r) {
        return (max(p.cache_seqlens[r], 0) + p.block_size - 1) / p.block_size;
      };
      const int end_block = block > 0 ? block : req > 0 ? blocks_in(req - 1) : 0;
      const bool idle = begin_req >= p.batch || begin_req > end_req;
      int4* row = reinterpret_cast<int4*>(p.parts + static_cast<std::int64_t>(part) * 8);
      row[0] =
          idle ? int4{p.batch, p.batch - 1, 0, end_block} : int4{begin_req, end_req, begin_block, end_block};
      row[1] = idle ? int4{0, 0, 0, 0}
                    : int4{begin_split, begin_block > 0 || (begin_req == end_req && block > 0), block > 0, 0};
    }
  }
  ptx::grid_dependency_launch();
}

}  // namespace flash_mla::sm90
