#pragma once

// The decode schedule on the device: the plan of src/schedule, word for word, by one block.
//
// Requests are laid on a line, each as long as its blocks and the fixed overhead behind them. Only where the
// parts begin on that line is a chain of dependent decisions, so one warp walks it and does nothing else;
// everything before (the line) and after (rows, splits) is done by all threads.
//
// Shared memory: ends of the requests on the line (b + 1), begins of the parts (num_parts), cuts (num_parts).

#include <cstdint>

#include "sm90/decode/params.h"
#include "sm90/ptx/cluster.cuh"

namespace flash_mla::sm90 {

inline constexpr int kScheduleThreads = 256;

/// Inclusive sum over the threads of a block; `total` becomes the sum over all.
__device__ __forceinline__ int block_sum_until(int x, int& total) {
  __shared__ int warps[kScheduleThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(0xFFFFFFFFu, x, offset);
    if (lane >= offset) x += below;
  }
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  total = 0;
  for (int i = 0; i < kScheduleThreads / 32; ++i) {
    if (i < warp) x += warps[i];
    total += warps[i];
  }
  __syncthreads();
  return x;
}

/// Turns values[0, n) into their inclusive sums; returns the sum of all. Every thread takes a run of them.
__device__ __forceinline__ int sum_until(std::int32_t* values, int n) {
  const int run = (n + kScheduleThreads - 1) / kScheduleThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * run, n), end = min(begin + run, n);
  int mine = 0, total;
  for (int i = begin; i < end; ++i) mine += values[i];
  int sum = block_sum_until(mine, total) - mine;
  for (int i = begin; i < end; ++i) values[i] = sum += values[i];
  __syncthreads();
  return total;
}

/// How many of the ascending values[0, n) are at most x.
__device__ __forceinline__ int count_up_to(const std::int32_t* values, int n, int x) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    (values[middle] <= x ? low : high) = values[middle] <= x ? middle + 1 : middle;
  }
  return low;
}

/// Where each part begins on the line; `starts` are the requests' begins, ascending, starts[batch] the line's
/// end. A part that reaches to `y` stops there less the overhead of the request it cuts, or at the last
/// request that ends by y if that is further. One warp.
__device__ __forceinline__ void place_parts(const ScheduleParams& p, const std::int32_t* starts, int payload,
                                            std::int32_t* begins) {
  const int lane = static_cast<int>(threadIdx.x);
  const int overhead = p.fixed_overhead_blocks, step = p.fixed_split_blocks;
  const int line_end = starts[p.batch];
  int base = 0;  // the warp holds starts[base, base + 32)
  int window = lane <= p.batch ? starts[lane] : 0x7FFFFFFF;
  int x = 0;
  for (int part = 0; part < p.num_parts; ++part) {
    if (lane == 0) begins[part] = x;
    // No further than the line's end plus a payload: no overflow, and no part behind it has anything left.
    const int y = min(x, line_end) + payload;
    while (base + 31 < p.batch && __all_sync(0xFFFFFFFFu, window <= y)) {
      base += 31;
      window = base + lane <= p.batch ? starts[base + lane] : 0x7FFFFFFF;
    }
    if (step == 0) {
      const int boundary = __reduce_max_sync(0xFFFFFFFFu, window <= y ? window : 0);
      x = max(y - overhead, boundary);
    } else if (x < line_end) {
      // To the nearest split point of the request that the part would cut, short of that request's end.
      const int req = base + __popc(__ballot_sync(0xFFFFFFFFu, window <= y)) - 1;
      if (req >= p.batch) {
        x = line_end;
        continue;
      }
      const bool has_work = starts[req] > x;
      const int from = has_work ? starts[req] : x;
      const int left = starts[req + 1] - overhead - from;
      if (!has_work && left <= step) {
        x = starts[req + 1];  // a part takes at least one whole split
        continue;
      }
      const int take = max(y - from - overhead, 0);
      const int steps = min((take + step / 2) / step, max(left - 1, 0) / step);
      x = from + (steps == 0 && !has_work ? 1 : steps) * step;
    }
  }
}

static __global__ void __launch_bounds__(kScheduleThreads) schedule_kernel(const ScheduleParams p) {
  extern __shared__ std::int32_t memory[];
  std::int32_t* starts = memory;                // (batch + 1)
  std::int32_t* begins = starts + p.batch + 1;  // (num_parts)
  std::int32_t* cuts = begins + p.num_parts;  // (num_parts): parts up to this one that begin inside a request
  // The schedule may still be in use by the kernel before this one.
  ptx::grid_dependency_wait();

  const auto blocks_of = [&](int req) {
    const int length = max(p.cache_seqlens[req], 0);
    return max(length / p.block_size + (length % p.block_size > 0), p.min_blocks_per_request);
  };
  if (threadIdx.x == 0) starts[0] = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.batch; i += kScheduleThreads) {
    starts[i + 1] = blocks_of(i) + p.fixed_overhead_blocks;
  }
  __syncthreads();
  const int total = sum_until(starts + 1, p.batch);
  const int payload = (total + p.num_parts - 1) / p.num_parts + p.fixed_overhead_blocks;
  if (threadIdx.x < 32) place_parts(p, starts, payload, begins);
  __syncthreads();

  // The request in which part i begins. The first part begins with request 0 whatever its length.
  const auto req_at = [&](int i) {
    if (i == 0 || p.batch == 0) return 0;
    return i == p.num_parts ? p.batch : count_up_to(starts, p.batch + 1, begins[i]) - 1;
  };
  const auto block_at = [&](int i, int req) {
    return i == p.num_parts || req >= p.batch ? 0 : begins[i] - starts[req];
  };
  for (int i = static_cast<int>(threadIdx.x); i < p.num_parts; i += kScheduleThreads) {
    cuts[i] = block_at(i, req_at(i)) > 0;
  }
  __syncthreads();
  sum_until(cuts, p.num_parts);

  // Parts that begin before request `req` does, and cuts among them.
  const auto cuts_before = [&](int req) {
    const int parts = count_up_to(begins, p.num_parts, starts[req] - 1);
    return parts > 0 ? cuts[parts - 1] : 0;
  };
  for (int i = static_cast<int>(threadIdx.x); i < p.num_parts; i += kScheduleThreads) {
    const int begin_req = req_at(i), begin_block = block_at(i, begin_req);
    const int next_req = req_at(i + 1), next_block = block_at(i + 1, next_req);
    const int end_req = next_block > 0 ? next_req : next_req - 1;
    // The blocks a request has, not those it counts as: rows of an empty request end at block 0.
    const int last_length = next_req > 0 ? max(p.cache_seqlens[next_req - 1], 0) : 0;
    const int end_block =
        next_block > 0 ? next_block : last_length / p.block_size + (last_length % p.block_size > 0);
    const bool idle = begin_req >= p.batch;
    const int split = p.fixed_split_blocks > 0 ? begin_block / p.fixed_split_blocks
                      : begin_block > 0        ? cuts[i] - cuts_before(begin_req)
                                               : 0;
    auto* row = reinterpret_cast<int4*>(p.parts + static_cast<std::int64_t>(i) * 8);
    if (p.token_rows) {
      const int end_token = end_req >= 0 ? min(end_block * p.block_size, p.cache_seqlens[end_req]) : 0;
      row[0] = {begin_req, begin_block * p.block_size, end_req, end_token};
      row[1] = {idle ? 0 : split, 0, 0, 0};
    } else if (idle) {
      row[0] = {p.batch, p.batch - 1, 0, end_block};
      row[1] = {0, 0, 0, 0};
    } else {
      const int step = p.fixed_split_blocks;
      const auto is_split = [&](int req) {
        if (step > 0) return starts[req + 1] - starts[req] - p.fixed_overhead_blocks > step;
        return (req == begin_req && begin_block > 0) || (req == next_req && next_block > 0);
      };
      row[0] = {begin_req, end_req, begin_block, end_block};
      row[1] = {split, is_split(begin_req), is_split(end_req), 0};
    }
  }
  if (threadIdx.x == 0) p.num_splits[0] = 0;
  if (p.fixed_split_blocks == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < p.batch; i += kScheduleThreads) {
      p.num_splits[i + 1] = i + 1 + cuts_before(i + 1);
    }
  } else {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < p.batch; i += kScheduleThreads) {
      starts[i + 1] = max((blocks_of(i) + p.fixed_split_blocks - 1) / p.fixed_split_blocks, 1);
    }
    __syncthreads();
    sum_until(starts + 1, p.batch);
    for (int i = static_cast<int>(threadIdx.x); i < p.batch; i += kScheduleThreads) {
      p.num_splits[i + 1] = starts[i + 1];
    }
  }
  ptx::grid_dependency_launch();
}

}  // namespace flash_mla::sm90
