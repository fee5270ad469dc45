// The decode schedule on the device: the plan of schedule.cpp, word for word, by one block.
//
// Requests are laid on a line, each as long as its blocks and the fixed overhead behind them; parts are cut
// out of the line. With fixed split points every cut stands for itself. Without, a part begins where the one
// before it ended. That is a chain as long as there are parts, which costs 50 to 70 ns a link to follow
// (place_by_walk); but most links only add the same number, and up to 256 requests all threads look for the
// links that do more and then follow those by pointer doubling (place_by_stops).
//
// Threads    512 of one block.
// Shared     up to 48 KB: requests and parts on the line, see ScheduleMemory.
// Registers  40, as ptxas gives them.

#include <cstdint>

#include "base/cuda/check.h"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "schedule/device_schedule.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kScheduleThreads = 512;

static_assert(kMaxScheduleWords * 4 + 5 * kScheduleThreads / 32 * 4 <= 48 * 1024,
              "with what scans and the longest request take");

struct Sum {
  __device__ static int of(int a, int b) { return a + b; }
  __device__ static int of_warp(int x) { return __reduce_add_sync(0xFFFFFFFFu, x); }
};
struct Max {
  __device__ static int of(int a, int b) { return max(a, b); }
  __device__ static int of_warp(int x) { return __reduce_max_sync(0xFFFFFFFFu, x); }
};

/// values[i] = the sum or maximum (Op; 0 is its identity) of value_of(0) to value_of(i), for i < n. Returns
/// the last. Every thread takes a run of them.
template <class Op, class F>
__device__ __forceinline__ int scan(std::int32_t* values, int n, F value_of) {
  constexpr int kWarps = kScheduleThreads / 32;
  __shared__ int warps[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int run = (n + kScheduleThreads - 1) / kScheduleThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * run, n), end = min(begin + run, n);
  int upto = 0;  // of this thread's run, then of this warp up to here
  for (int i = begin; i < end; ++i) {
    values[i] = value_of(i);
    upto = Op::of(upto, values[i]);
  }
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(0xFFFFFFFFu, upto, offset);
    if (lane >= offset) upto = Op::of(below, upto);
  }
  if (lane == 31) warps[warp] = upto;
  __syncthreads();
  const int other = lane < kWarps ? warps[lane] : 0;
  int before = __shfl_up_sync(0xFFFFFFFFu, upto, 1);
  before = Op::of(Op::of_warp(lane < warp ? other : 0), lane > 0 ? before : 0);
  for (int i = begin; i < end; ++i) values[i] = before = Op::of(before, values[i]);
  const int total = Op::of_warp(other);
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

/// What a block works on, in shared memory.
struct ScheduleMemory {
  std::int32_t* starts;   ///< (batch + 1) where requests begin on the line; the last is the line's end
  std::int32_t* begins;   ///< (num_parts) where parts begin on the line
  std::int32_t* reqs;     ///< (num_parts + 1) the request in which a part begins
  std::int32_t* cuts;     ///< (num_parts) parts up to this one that begin inside a request
  std::int32_t* rests;    ///< (kMaxStops) starts, modulo the parts' distance
  std::uint32_t* jumps;   ///< (kMaxStops) from a stop to another: requests << 16 | parts
  std::int32_t* stop_at;  ///< (kMaxStops) the part that begins with this request, or -1

  __device__ ScheduleMemory(std::int32_t* memory, const ScheduleParams& p)
      : starts(memory),
        begins(starts + p.batch + 1),
        reqs(begins + p.num_parts),
        cuts(reqs + p.num_parts + 1),
        rests(cuts + p.num_parts),
        jumps(reinterpret_cast<std::uint32_t*>(rests + kMaxStops)),
        stop_at(rests + 2 * kMaxStops) {}
};
static_assert(kMaxStops <= kScheduleThreads);
constexpr std::uint32_t kNoJump = 0xFFFFFFFFu;

/// How far apart parts begin, at least, where nothing but the balance says where.
__device__ __forceinline__ int step_of(const ScheduleParams& p, int total) {
  return max((total + p.num_parts - 1) / p.num_parts, min(p.min_blocks_per_part, total));
}

// Where each part begins, in two ways. A part that begins at x makes the next one begin at x + step; but if a
// request ends at most `overhead` further, at that end, for a piece so short is not worth its overhead. Such
// a begin is a stop; from one stop to the next parts are `step` apart.

/// For up to kMaxStops requests. All threads.
__device__ __forceinline__ void place_by_stops(const ScheduleParams& p, const ScheduleMemory& s, int total,
                                               int step) {
  const int thread = static_cast<int>(threadIdx.x), overhead = p.fixed_overhead_blocks;
  if (thread < p.batch) {
    s.rests[thread] = s.starts[thread] % step;
    s.jumps[thread] = kNoJump;
    s.stop_at[thread] = thread == 0 ? 0 : -1;
  }
  __syncthreads();
  // From every request i to the first stop behind it, if it were one itself: the first request j, and m >= 1,
  // with m * step < starts[j] - starts[i] <= m * step + overhead.
  const int helpers = kScheduleThreads / p.batch, i = thread % p.batch, helper = thread / p.batch;
  int found = p.batch;
  if (step > overhead) {
    // That is to say, (rests[j] - rests[i] - 1) mod step < overhead, but for a request of no blocks right
    // behind i (m would be 0). Every helper looks through a share of the requests, backwards, for it is the
    // first that counts.
    const int first = i + 1 + (i + 1 < p.batch && s.starts[i + 1] - s.starts[i] <= overhead);
    const int share = (p.batch + helpers - 1) / helpers, end = min((helper + 1) * share, p.batch);
    const int behind = s.rests[i] + 1;
#pragma unroll 8
    for (int j = end - 1; j >= max(helper * share, first); --j) {
      const auto rest = static_cast<std::uint32_t>(s.rests[j] - behind);
      if (min(rest, rest + static_cast<std::uint32_t>(step)) < static_cast<std::uint32_t>(overhead))
        found = j;
    }
  } else if (helper == 0) {
    // Every end lies so near a begin. Requests are no shorter than the overhead: this ends within three.
    for (found = i + 1; found < p.batch && s.starts[found] - s.starts[i] <= step;) ++found;
  }
  if (helper < helpers && found < p.batch) {
    const int distance = s.starts[found] - s.starts[i];
    const int m = max((step > overhead ? distance - 1 : distance - overhead + step - 1) / step, 1);
    atomicMin(&s.jumps[i], static_cast<std::uint32_t>(found - i) << 16 | static_cast<std::uint32_t>(m));
  }
  __syncthreads();
  // Every round marks the stops that one jump leads to from those marked so far, and doubles the jumps; until
  // those marked lead nowhere.
  while (true) {
    std::uint32_t jump = kNoJump, next = kNoJump;
    int at = -1;
    if (thread < p.batch) {
      jump = s.jumps[thread];
      at = s.stop_at[thread];
      if (jump != kNoJump) next = s.jumps[thread + (jump >> 16)];
    }
    const bool leads = at >= 0 && at < p.num_parts && jump != kNoJump;
    if (!__syncthreads_or(leads)) break;
    if (leads) s.stop_at[thread + (jump >> 16)] = at + static_cast<int>(jump & 0xFFFF);
    if (thread < p.batch) s.jumps[thread] = next != kNoJump ? jump + next : kNoJump;
    __syncthreads();
  }
  // Every part's last stop: which part that is, then how far from it.
  for (int part = thread; part < p.num_parts; part += kScheduleThreads) s.begins[part] = 0;
  __syncthreads();
  if (thread < p.batch) {
    const int at = s.stop_at[thread];
    if (at >= 0 && at < p.num_parts) {
      s.begins[at] = at;
      s.cuts[at] = s.starts[thread];
    }
  }
  __syncthreads();
  scan<Max>(s.begins, p.num_parts, [&](int part) { return s.begins[part]; });
  for (int part = thread; part < p.num_parts; part += kScheduleThreads) {
    const int at = s.begins[part];
    const std::int64_t x = s.cuts[at] + std::int64_t{part - at} * step;
    // The line's end is a stop too.
    s.begins[part] = part > at && x + overhead >= total ? total : static_cast<int>(x);
  }
}

/// For any number of requests. One warp, which looks at 32 of them at a time.
__device__ __forceinline__ void place_by_walk(const ScheduleParams& p, const ScheduleMemory& s, int total,
                                              int step) {
  const int lane = static_cast<int>(threadIdx.x);
  constexpr std::uint32_t kFarAway = 0xFFFFFFFF;
  // Without sign: twice the line's length fits.
  const auto starts = reinterpret_cast<const std::uint32_t*>(s.starts);
  const auto end = static_cast<std::uint32_t>(total);
  int base = 0;
  std::uint32_t x = 0, window = lane <= p.batch ? starts[lane] : kFarAway;
  for (int part = 0; part < p.num_parts; ++part) {
    if (lane == 0) s.begins[part] = static_cast<int>(x);
    const std::uint32_t next = min(x + static_cast<std::uint32_t>(step), end);
    const std::uint32_t y = next + static_cast<std::uint32_t>(p.fixed_overhead_blocks);
    while (base + 31 < p.batch && __all_sync(0xFFFFFFFFu, window <= y)) {
      base += 31;  // the last of these becomes the first of the next
      window = base + lane <= p.batch ? starts[base + lane] : kFarAway;
    }
    x = max(next, __reduce_max_sync(0xFFFFFFFFu, window <= y ? window : 0));
  }
}

/// Requests that every part is given whole, or 0 if requests are to be cut. `longest`: of all, the overhead
/// included.
__device__ __forceinline__ int whole_requests(const ScheduleParams& p, int longest, int total) {
  const int each = (p.batch + p.num_parts - 1) / p.num_parts;
  const bool balanced = static_cast<std::int64_t>(each) * longest * p.num_parts * 100 <=
                        total * (std::int64_t{100} + p.whole_requests_percent);
  return balanced ? each : 0;
}

/// With fixed split points: the line is cut into equal lengths, each cut moved to the nearest split point of
/// the request it falls into. All threads.
__device__ __forceinline__ void place_fixed(const ScheduleParams& p, const ScheduleMemory& s, int total) {
  const std::int64_t step = p.fixed_split_blocks;
  const std::int64_t length = (std::int64_t{total} + p.num_parts - 1) / p.num_parts;
  for (int i = static_cast<int>(threadIdx.x); i < p.num_parts; i += kScheduleThreads) {
    const int cut = static_cast<int>(min(i * length, std::int64_t{total}));
    const int req = count_up_to(s.starts, p.batch + 1, cut) - 1;
    s.begins[i] = total;
    if (req >= p.batch) continue;
    const std::int64_t moved = (cut - s.starts[req] + step / 2) / step * step;
    const int blocks = s.starts[req + 1] - s.starts[req] - p.fixed_overhead_blocks;
    s.begins[i] = moved > 0 && moved >= blocks ? s.starts[req + 1] : s.starts[req] + static_cast<int>(moved);
  }
}

/// Splits per request, as their exclusive prefix sum, once all parts are placed. blocks_of(req): as they
/// count. All threads.
template <class F>
__device__ __forceinline__ void write_num_splits(const ScheduleParams& p, const ScheduleMemory& s,
                                                 F blocks_of) {
  if (threadIdx.x == 0) p.num_splits[0] = 0;
  if (p.fixed_split_blocks > 0) {
    __syncthreads();
    scan<Sum>(s.starts + 1, p.batch,
              [&](int req) { return (max(blocks_of(req), 1) - 1) / p.fixed_split_blocks + 1; });
  }
  for (int i = static_cast<int>(threadIdx.x); i < p.batch; i += kScheduleThreads) {
    if (p.fixed_split_blocks > 0) {
      p.num_splits[i + 1] = s.starts[i + 1];
    } else {
      // Parts that begin before the next request does, and cuts among them.
      const int parts = count_up_to(s.begins, p.num_parts, s.starts[i + 1] - 1);
      p.num_splits[i + 1] = i + 1 + (parts > 0 ? s.cuts[parts - 1] : 0);
    }
  }
}

/// Tokens of a request, or entries of its lists.
template <bool kLists>
__device__ __forceinline__ int length_of(const ScheduleParams& p, int req) {
  if constexpr (!kLists) {
    return p.cache_seqlens[req];
  } else {
    int length = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::int32_t* lengths = p.lists.topk_length[i];
      const int n = lengths == nullptr ? p.lists.topk[i] : min(max(lengths[req], 0), p.lists.topk[i]);
      length += (n + p.block_size - 1) / p.block_size * p.block_size;
    }
    return length;
  }
}

template <bool kLists>
__global__ void __launch_bounds__(kScheduleThreads) schedule_kernel(const ScheduleParams p) {
  extern __shared__ std::int32_t memory[];
  const ScheduleMemory s(memory, p);
  std::int32_t* const starts = s.starts;
  std::int32_t* const begins = s.begins;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // The schedule may still be in use by the kernel before this one.
  ptx::grid_dependency_wait();

  const auto blocks_of = [&](int req) {
    const int length = max(length_of<kLists>(p, req), 0);
    return max(length / p.block_size + (length % p.block_size > 0), p.min_blocks_per_request);
  };
  __shared__ int warps_longest[kScheduleThreads / 32];
  if (threadIdx.x == 0) starts[0] = 0;
  int longest = 0;
  const int total = scan<Sum>(starts + 1, p.batch, [&](int req) {
    const int length = blocks_of(req) + p.fixed_overhead_blocks;
    longest = max(longest, length);
    return length;
  });
  // The longest request is looked for only where requests may be left whole.
  int whole = 0;
  if (p.whole_requests_percent > 0 && p.fixed_split_blocks == 0) {
    longest = Max::of_warp(longest);
    if (lane == 0) warps_longest[threadIdx.x / 32] = longest;
    __syncthreads();
    whole = whole_requests(p, Max::of_warp(warps_longest[lane % (kScheduleThreads / 32)]), total);
  }
  const int step = step_of(p, total);
  if (whole > 0) {
    for (int i = static_cast<int>(threadIdx.x); i < p.num_parts; i += kScheduleThreads) {
      begins[i] = starts[min(i * whole, p.batch)];
    }
  } else if (p.fixed_split_blocks > 0) {
    place_fixed(p, s, total);
  } else if (p.batch > 0 && p.batch <= kMaxStops) {
    place_by_stops(p, s, total, max(step, 1));
  } else if (threadIdx.x < 32) {
    place_by_walk(p, s, total, step);
  }
  __syncthreads();

  // The request in which part i begins. The first part begins with request 0 whatever its length.
  const auto find_req = [&](int i) {
    if (i == 0 || p.batch == 0) return 0;
    if (whole > 0) return min(i * whole, p.batch);
    return count_up_to(starts, p.batch + 1, begins[i]) - 1;
  };
  const auto block_at = [&](int i, int req) {
    return i == p.num_parts || req >= p.batch ? 0 : begins[i] - starts[req];
  };
  if (threadIdx.x == 0) s.reqs[p.num_parts] = p.batch;
  scan<Sum>(s.cuts, p.num_parts, [&](int i) {
    s.reqs[i] = find_req(i);
    return static_cast<int>(block_at(i, s.reqs[i]) > 0);
  });

  for (int i = static_cast<int>(threadIdx.x); i < p.num_parts; i += kScheduleThreads) {
    const int begin_req = s.reqs[i], begin_block = block_at(i, begin_req);
    const int next_req = s.reqs[i + 1], next_block = block_at(i + 1, next_req);
    const int end_req = next_block > 0 ? next_req : next_req - 1;
    // The blocks a request has, not those it counts as: rows of an empty request end at block 0.
    const int last_length = next_req > 0 ? max(length_of<kLists>(p, next_req - 1), 0) : 0;
    const int end_block =
        next_block > 0 ? next_block : last_length / p.block_size + (last_length % p.block_size > 0);
    const bool idle = begin_req >= p.batch || (begin_req == next_req && begin_block == next_block);
    // Inside a request parts are `step` apart.
    const int distance = p.fixed_split_blocks > 0 ? p.fixed_split_blocks : step;
    const int split = begin_block > 0 ? (begin_block - 1) / distance + 1 : 0;
    auto* row = reinterpret_cast<int4*>(p.parts + static_cast<std::int64_t>(i) * 8);
    if (p.token_rows) {
      const int last_req = idle ? p.batch - 1 : end_req;
      const int end_token = last_req < 0
                                ? 0
                                : static_cast<int>(min(std::int64_t{end_block} * p.block_size,
                                                       std::int64_t{length_of<kLists>(p, last_req)}));
      row[0] = idle ? int4{p.batch, 0, last_req, end_token}
                    : int4{begin_req, begin_block * p.block_size, last_req, end_token};
      row[1] = {idle ? 0 : split, 0, 0, 0};
    } else if (idle) {
      row[0] = {p.batch, p.batch - 1, 0, end_block};
      row[1] = {0, 0, 0, 0};
    } else {
      const auto is_split = [&](int req) {
        if (p.fixed_split_blocks > 0)
          return starts[req + 1] - starts[req] - p.fixed_overhead_blocks > p.fixed_split_blocks;
        return (req == begin_req && begin_block > 0) || (req == next_req && next_block > 0);
      };
      row[0] = {begin_req, end_req, begin_block, end_block};
      row[1] = {split, is_split(begin_req), is_split(end_req), 0};
    }
  }
  write_num_splits(p, s, blocks_of);
  ptx::grid_dependency_launch();
}

template <bool kLists>
void launch_plan(const ScheduleParams& p, void* stream) {
  const auto words = static_cast<std::size_t>(schedule_words(p.batch, p.num_parts));
  LaunchConfig config(1, kScheduleThreads, words * sizeof(std::int32_t), static_cast<cudaStream_t>(stream));
  check(launch(config.programmatic(), schedule_kernel<kLists>, p), "schedule_kernel");
}

}  // namespace

void launch_schedule(const ScheduleParams& p, void* stream) { launch_plan<false>(p, stream); }
void launch_list_schedule(const ScheduleParams& p, void* stream) { launch_plan<true>(p, stream); }

}  // namespace flash_mla::sm90
