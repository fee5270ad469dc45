#pragma once

// The decode schedule on the device: the plan of src/schedule, word for word, by one block.
//
// Requests are laid on a line, each as long as its blocks and the fixed overhead behind them; parts are cut
// out of the line. With fixed split points every cut stands for itself. Without, a part begins where the one
// before it ended. That is a chain as long as there are parts, which costs 50 to 70 ns a link to follow
// (place_by_walk); but most links only add the same number, and up to 256 requests all threads look for the
// links that do more and then follow those by pointer doubling (place_by_stops).

#include <cstdint>

#include "sm90/decode/params.h"
#include "sm90/ptx/cluster.cuh"

namespace flash_mla::sm90 {

inline constexpr int kScheduleThreads = 512;

/// Turns values[0, n) into their inclusive sums (or maxima: any associative `op` with identity 0); returns
/// the last. Every thread takes a run of them.
template <class Op>
__device__ __forceinline__ int scan(std::int32_t* values, int n, Op op) {
  __shared__ int warps[kScheduleThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int run = (n + kScheduleThreads - 1) / kScheduleThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * run, n), end = min(begin + run, n);
  int upto = 0;  // of this thread's run, then of this warp up to here
  for (int i = begin; i < end; ++i) upto = op(upto, values[i]);
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(0xFFFFFFFFu, upto, offset);
    if (lane >= offset) upto = op(below, upto);
  }
  if (lane == 31) warps[warp] = upto;
  __syncthreads();
  int before = __shfl_up_sync(0xFFFFFFFFu, upto, 1), total = 0;
  if (lane == 0) before = 0;
#pragma unroll
  for (int i = kScheduleThreads / 32; i-- > 0;) {
    if (i < warp) before = op(warps[i], before);
  }
#pragma unroll
  for (int i = 0; i < kScheduleThreads / 32; ++i) total = op(total, warps[i]);
  for (int i = begin; i < end; ++i) values[i] = before = op(before, values[i]);
  __syncthreads();
  return total;
}
__device__ __forceinline__ int sum_until(std::int32_t* values, int n) {
  return scan(values, n, [](int a, int b) { return a + b; });
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

/// What a block works on, in shared memory.
struct ScheduleMemory {
  std::int32_t* starts;   ///< (batch + 1) where requests begin on the line; the last is the line's end
  std::int32_t* begins;   ///< (num_parts) where parts begin on the line
  std::int32_t* cuts;     ///< (num_parts) parts up to this one that begin inside a request
  std::uint32_t* jumps;   ///< (kMaxStops) from a stop to another: requests << 16 | parts
  std::int32_t* stop_at;  ///< (kMaxStops) the part that begins with this request, or -1

  __device__ ScheduleMemory(std::int32_t* memory, const ScheduleParams& p)
      : starts(memory),
        begins(starts + p.batch + 1),
        cuts(begins + p.num_parts),
        jumps(reinterpret_cast<std::uint32_t*>(cuts + p.num_parts)),
        stop_at(cuts + p.num_parts + kMaxStops) {}
};
static_assert(kMaxStops <= kScheduleThreads);
inline constexpr std::uint32_t kNoJump = 0xFFFFFFFFu;

/// How far apart parts begin, at least, where nothing but the balance says where.
__device__ __forceinline__ int step_of(const ScheduleParams& p, int total) {
  return max((total + p.num_parts - 1) / p.num_parts, min(p.min_blocks_per_part, total));
}

// Where each part begins, in two ways. A part that begins at x makes the next one begin at x + step; but if a
// request ends at most `overhead` further, at that end, for a piece so short is not worth its overhead. Such
// a begin is a stop; from one stop to the next parts are `step` apart.

/// For up to kMaxStops requests. All threads.
__device__ __forceinline__ void place_by_stops(const ScheduleParams& p, const ScheduleMemory& s, int total) {
  const int thread = static_cast<int>(threadIdx.x), overhead = p.fixed_overhead_blocks;
  const int step = max(step_of(p, total), 1);
  const float per_step = 1.0f / static_cast<float>(step);
  if (thread < p.batch) {
    s.jumps[thread] = kNoJump;
    s.stop_at[thread] = thread == 0 ? 0 : -1;
  }
  for (int i = thread; i < p.num_parts; i += kScheduleThreads) s.begins[i] = 0;
  __syncthreads();
  // From every request to the first stop behind it, if it were one itself: the first request j, and m >= 1,
  // with m * step < starts[j] - starts[i] <= m * step + overhead. As many threads a request as there are.
  const int helpers = kScheduleThreads / p.batch, i = thread % p.batch, helper = thread / p.batch;
  for (int j = i + 1 + 4 * helper; helper < helpers && j < p.batch; j += 4 * helpers) {
    std::uint32_t found = kNoJump;
#pragma unroll
    for (int u = 3; u >= 0; --u) {
      const int distance = s.starts[min(j + u, p.batch)] - s.starts[i], least = max(distance - overhead, 1);
      int m = static_cast<int>(static_cast<float>(least) * per_step), rest = least - m * step;
      m += (rest > step) - (rest <= 0);  // the quotient in float may be one off
      rest = least - m * step;
      m += rest > 0;
      if (m * step < distance && j + u < p.batch) {
        found = static_cast<std::uint32_t>(j + u - i) << 16 | static_cast<std::uint32_t>(m);
      }
    }
    if (found != kNoJump) {
      atomicMin(&s.jumps[i], found);
      break;
    }
  }
  __syncthreads();
  // Every round marks the stops that one jump leads to from those marked so far, and doubles the jumps.
  for (int reach = 1; reach < min(p.num_parts, p.batch); reach *= 2) {
    std::uint32_t jump = kNoJump, next = kNoJump;
    int at = -1;
    if (thread < p.batch) {
      jump = s.jumps[thread];
      at = s.stop_at[thread];
      if (jump != kNoJump) next = s.jumps[thread + (jump >> 16)];
    }
    __syncthreads();
    if (at >= 0 && jump != kNoJump) s.stop_at[thread + (jump >> 16)] = at + static_cast<int>(jump & 0xFFFF);
    if (thread < p.batch) s.jumps[thread] = next != kNoJump ? jump + next : kNoJump;
    __syncthreads();
  }
  // Every part's last stop: which part that is, then how far from it.
  if (thread < p.batch) {
    const int at = s.stop_at[thread];
    if (at >= 0 && at < p.num_parts) {
      s.begins[at] = at;
      s.cuts[at] = s.starts[thread];
    }
  }
  __syncthreads();
  scan(s.begins, p.num_parts, [](int a, int b) { return max(a, b); });
  for (int part = thread; part < p.num_parts; part += kScheduleThreads) {
    const int at = s.begins[part], x = s.cuts[at] + (part - at) * step;
    // The line's end is a stop too.
    s.begins[part] = part > at && x + overhead >= total ? total : x;
  }
}

/// For any number of requests. One warp, which looks at 32 of them at a time.
__device__ __forceinline__ void place_by_walk(const ScheduleParams& p, const ScheduleMemory& s, int total) {
  const int lane = static_cast<int>(threadIdx.x);
  const int step = step_of(p, total);
  int base = 0, x = 0;
  int window = lane <= p.batch ? s.starts[lane] : 0x7FFFFFFF;
  for (int part = 0; part < p.num_parts; ++part) {
    if (lane == 0) s.begins[part] = x;
    const int y = min(x, total) + step + p.fixed_overhead_blocks;
    while (base + 31 < p.batch && __all_sync(0xFFFFFFFFu, window <= y)) {
      base += 31;  // the last of these becomes the first of the next
      window = base + lane <= p.batch ? s.starts[base + lane] : 0x7FFFFFFF;
    }
    const int boundary = __reduce_max_sync(0xFFFFFFFFu, window <= y ? window : 0);
    x = max(y - p.fixed_overhead_blocks, boundary);
  }
}

/// Requests that every part is given whole, or 0 if requests are to be cut. `longest`: of all, the overhead
/// included.
__device__ __forceinline__ int whole_requests(const ScheduleParams& p, int longest, int total) {
  const int each = (p.batch + p.num_parts - 1) / p.num_parts;
  const bool balanced = static_cast<std::int64_t>(each) * longest * p.num_parts <=
                        total + static_cast<std::int64_t>(total) * p.whole_requests_percent / 100;
  return balanced ? each : 0;
}

/// With fixed split points: the line is cut into equal lengths, each cut moved to the nearest split point of
/// the request it falls into. All threads.
__device__ __forceinline__ void place_fixed(const ScheduleParams& p, const ScheduleMemory& s, int total) {
  const int step = p.fixed_split_blocks, length = (total + p.num_parts - 1) / p.num_parts;
  for (int i = static_cast<int>(threadIdx.x); i < p.num_parts; i += kScheduleThreads) {
    const int cut = i * length, req = count_up_to(s.starts, p.batch + 1, cut) - 1;
    s.begins[i] = total;
    if (req >= p.batch) continue;
    const int moved = (cut - s.starts[req] + step / 2) / step * step;
    const int blocks = s.starts[req + 1] - s.starts[req] - p.fixed_overhead_blocks;
    s.begins[i] = moved > 0 && moved >= blocks ? s.starts[req + 1] : s.starts[req] + moved;
  }
}

static __global__ void __launch_bounds__(kScheduleThreads) schedule_kernel(const ScheduleParams p) {
  extern __shared__ std::int32_t memory[];
  const ScheduleMemory s(memory, p);
  std::int32_t* const starts = s.starts;
  std::int32_t* const begins = s.begins;
  std::int32_t* const cuts = s.cuts;
  // The schedule may still be in use by the kernel before this one.
  ptx::grid_dependency_wait();

  const auto blocks_of = [&](int req) {
    const int length = max(p.cache_seqlens[req], 0);
    return max(length / p.block_size + (length % p.block_size > 0), p.min_blocks_per_request);
  };
  if (threadIdx.x == 0) starts[0] = 0;
  // The longest request is looked for only where requests may be left whole.
  __shared__ int longest;
  const bool may_be_whole = p.whole_requests_percent > 0 && p.fixed_split_blocks == 0;
  if (may_be_whole) {
    if (threadIdx.x == 0) longest = 0;
    __syncthreads();
  }
  int my_longest = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.batch; i += kScheduleThreads) {
    starts[i + 1] = blocks_of(i) + p.fixed_overhead_blocks;
    my_longest = max(my_longest, starts[i + 1]);
  }
  if (may_be_whole) {
    my_longest = __reduce_max_sync(0xFFFFFFFFu, my_longest);
    if (threadIdx.x % 32 == 0 && my_longest > 0) atomicMax(&longest, my_longest);
  }
  __syncthreads();
  const int total = sum_until(starts + 1, p.batch);
  const int whole = may_be_whole ? whole_requests(p, longest, total) : 0;
  if (whole > 0) {
    for (int i = static_cast<int>(threadIdx.x); i < p.num_parts; i += kScheduleThreads) {
      begins[i] = starts[min(i * whole, p.batch)];
    }
  } else if (p.fixed_split_blocks > 0) {
    place_fixed(p, s, total);
  } else if (p.batch > 0 && p.batch <= kMaxStops) {
    place_by_stops(p, s, total);
  } else if (threadIdx.x < 32) {
    place_by_walk(p, s, total);
  }
  __syncthreads();

  // The request in which part i begins. The first part begins with request 0 whatever its length.
  const auto req_at = [&](int i) {
    if (i == 0 || p.batch == 0) return 0;
    if (whole > 0) return min(i * whole, p.batch);
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
    const bool idle = begin_req >= p.batch || (begin_req == next_req && begin_block == next_block);
    const int split = p.fixed_split_blocks > 0 ? begin_block / p.fixed_split_blocks
                      : begin_block > 0        ? cuts[i] - cuts_before(begin_req)
                                               : 0;
    auto* row = reinterpret_cast<int4*>(p.parts + static_cast<std::int64_t>(i) * 8);
    if (p.token_rows) {
      const int last_req = idle ? p.batch - 1 : end_req;
      const int end_token = last_req >= 0 ? min(end_block * p.block_size, p.cache_seqlens[last_req]) : 0;
      row[0] = idle ? int4{p.batch, 0, last_req, end_token}
                    : int4{begin_req, begin_block * p.block_size, last_req, end_token};
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
