#pragma once

// One token drawn from a row of scores, or the tokens that stay in the running.
//
// Tile:      one row for a cluster of up to 8 blocks. It lies in the L2 cache: what takes time is not reading
//            it but its exponentials.
// Threads:   1024 a block; every warp of the cluster owns the ids of one segment of the row.
// Memory:    19 KB: sums of warps and blocks, 512 bins, a list of 2048 keys.
// Registers: 64 a thread, which 1024 threads may have at most.
//
// Without top_k and top_p: one pass sums the weights of every segment; the segment that the target falls into
// is looked at once more.
//
// With them the draw needs a threshold: the key (logit, then the smaller id) of the least likely token that
// is kept. The first pass also counts logits by their distance from the largest, in kBins bins. The bins that
// hold at most kListed tokens together are gathered in the first block and sorted; where the threshold is not
// among them (thousands of tokens kept) it is found bit by bit, with one pass over the row for each.
//
// Weights are integers (draw_weight.h), so that no order of summation matters.

#include <cooperative_groups.h>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/sampling/draw.h"
#include "kernels/sampling/draw_weight.h"

namespace flash_mla::sm90::draws {

using u64 = unsigned long long;

namespace cg = cooperative_groups;

inline constexpr int kMaxBlocks = 8;  // of a row: what a cluster may have anywhere
inline constexpr int kThreads = 1024;
inline constexpr int kWarp = 32;
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kVec = 4, kUnroll = 4;  // elements of a load, loads in flight of a thread
inline constexpr int kBins = 512;
inline constexpr float kBinsPerUnit = 16.0f;  // of the exponent: weights end at exp(-31)
inline constexpr int kListed = 2 * kThreads;

struct Shared {
  u64 sums[kWarps];
  u64 block_sums[2];  // of all warps; in turn, so that one can be written while others read the last
  u64 told[3];        // by the first block to the others
  u64 keys[kListed];
  unsigned bins[kBins];
  unsigned num_listed;
  int found;
  u64 found_sum;
};

__device__ inline u64 key_of(float logit, int id) {
  const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 and +0 are equals
  const unsigned ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(ordered) << 32 | (0xFFFFFFFFu - static_cast<unsigned>(id));
}
__device__ inline float logit_of(u64 key) {
  const auto ordered = static_cast<unsigned>(key >> 32);
  return __uint_as_float((ordered & 0x80000000u) != 0 ? ordered & 0x7FFFFFFFu : ~ordered);
}

__device__ inline u64 warp_sum(u64 x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

/// What draws and cuts need of a row's scores: float32, dense.
struct DenseLogits {
  const float* logits;
  float largest, scale;
  u64 min_weight;

  __device__ float at(int i) const { return logits[i]; }
  __device__ u64 weight(float logit) const {
    const u64 w = draw_weight(logit - largest, scale);
    return w >= min_weight ? w : 0;
  }
  /// Never larger for a larger logit; weight > 0.
  __device__ int bin(float logit) const {
    return static_cast<int>(fminf(plain_mul(logit - largest, -scale) * kBinsPerUnit, kBins - 1));
  }
  /// No weight of the bin is less.
  __device__ u64 least_weight(int bin) const {
    return draw_weight(static_cast<float>(-1 - bin) / kBinsPerUnit, 1.0f);
  }
  /// f(logit, id) for ids from begin to end, each in one lane.
  template <class F>
  __device__ void for_range(int begin, int end, int size, int lane, const F& f) const {
    if (size % kVec != 0) {
      for (int i = begin + lane; i < end; i += kWarp) f(logits[i], i);
      return;
    }
    for (int first = begin + lane * kVec; first < end; first += kUnroll * kWarp * kVec) {
      float4 x[kUnroll];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int i = first + j * kWarp * kVec;
        if (i < end) x[j] = *reinterpret_cast<const float4*>(logits + i);
      }
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int i = first + j * kWarp * kVec;
        if (i >= end) break;
        f(x[j].x, i);
        f(x[j].y, i + 1);
        f(x[j].z, i + 2);
        f(x[j].w, i + 3);
      }
    }
  }
};

/// One row, by the whole cluster. Every thread calls the same.
template <class Scores>
class Row {
 public:
  __device__ Row(const Scores& scores, int size, const Draw& draw, Shared& shared)
      : scores_(scores), size_(size), draw_(draw), shared_(shared) {
    blocks_ = static_cast<int>(cluster_.num_blocks());
    const int grain = kWarp * kVec, round = grain * kWarps * blocks_;
    segment_ = (size + round - 1) / round * grain;
    rank_ = static_cast<int>(cluster_.block_rank());
    warp_ = static_cast<int>(threadIdx.x) / kWarp;
    lane_ = static_cast<int>(threadIdx.x) % kWarp;
  }

  /// The token, in one block; -1 in the others, and in all where nothing has a weight. `joint` as in cut.
  __device__ int draw(bool joint = false) {
    const bool cuts = draw_.top_k > 0 || draw_.top_p < 1;
    u64 total = weigh(cuts), threshold = 0;
    if (cuts && total > 0) {
      threshold = find_threshold(total, joint);
      total = sum_segments(threshold, /*masses=*/true);
    }
    const int token = total > 0 ? pick(draw_target(draw_.u, total), threshold) : -1;
    cluster_.sync();  // nobody leaves while others read its memory
    return token;
  }

  /// The key of the least likely token that stays, to every thread of the cluster; tokens without weight never do. `joint`:
  /// top_p is of the whole, not of what top_k leaves.
  __device__ u64 cut(bool joint) {
    if (draw_.top_k <= 0 && draw_.top_p >= 1) return 0;
    const u64 total = weigh(/*count=*/true);
    return total > 0 ? find_threshold(total, joint) : 0;
  }

  /// The largest key, to every thread of the cluster.
  __device__ u64 likeliest() {
    u64 best = 0;
    for_segment([&](float score, int id) { best = max(best, key_of(score, id)); });
    return reduce(best, [](u64 a, u64 b) { return max(a, b); });
  }

  /// Sum of f(score, id) of all tokens, in an order that depends on the row's length and the number of blocks alone, to every
  /// thread of the cluster.
  template <class F>
  __device__ double add_up(const F& f) {
    double sum = 0;
    for_segment([&](float score, int id) { sum += f(score, id); });
    const auto add = [](u64 a, u64 b) {
      return static_cast<u64>(__double_as_longlong(__longlong_as_double(static_cast<long long>(a)) +
                                                   __longlong_as_double(static_cast<long long>(b))));
    };
    return __longlong_as_double(
        static_cast<long long>(reduce(static_cast<u64>(__double_as_longlong(sum)), add)));
  }

  /// f(score, id) of all tokens of the block's warps, each in one lane.
  template <class F>
  __device__ void for_all(const F& f) const {
    for_segment(f);
  }

  __device__ Scores& scores() { return scores_; }
  __device__ int rank() const { return rank_; }
  __device__ void sync() { cluster_.sync(); }

 private:
  /// f over all threads of the cluster, 0 being neutral, to each of them. It is commutative.
  template <class F>
  __device__ u64 reduce(u64 x, const F& f) {
    const auto warp = [&](u64 y) {
      for (int offset = kWarp / 2; offset > 0; offset /= 2) y = f(y, __shfl_xor_sync(~0u, y, offset));
      return y;
    };
    __syncthreads();
    x = warp(x);
    if (lane_ == 0) shared_.sums[warp_] = x;
    __syncthreads();
    turn_ ^= 1;
    if (warp_ == 0) {
      x = warp(shared_.sums[lane_]);
      if (lane_ == 0) shared_.block_sums[turn_] = x;
    }
    cluster_.sync();
    return warp(lane_ < blocks_ ? at_block(shared_.block_sums[turn_], lane_) : 0);
  }

  __device__ u64 weight(float score) const { return scores_.weight(score); }

  /// f(score, id) for the ids of the warp's segment, each in one lane.
  template <class F>
  __device__ void for_segment(const F& f) const {
    const int begin = (rank_ * kWarps + warp_) * segment_;
    scores_.for_range(begin, min(begin + segment_, size_), size_, lane_, f);
  }

  /// What another block has in the same place.
  template <class T>
  __device__ T at_block(const T& value, int rank) const {
    return *cluster_.map_shared_rank(&value, rank);
  }

  /// Keeps the sums of segments and of blocks in shared memory and returns the sum of all, to every thread of
  /// the cluster.
  __device__ u64 sum_up(u64 x) {
    return reduce(x, [](u64 a, u64 b) { return a + b; });
  }

  /// What the first block says, to every thread of the cluster. Every `place` is used once.
  __device__ u64 tell(int place, u64 value) {
    if (rank_ == 0 && threadIdx.x == 0) shared_.told[place] = value;
    cluster_.sync();
    return at_block(shared_.told[place], 0);
  }

  /// Inclusive sum over the threads of the block up to this one.
  __device__ u64 scan(u64 x) {
    __syncthreads();
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const u64 below = __shfl_up_sync(~0u, x, offset);
      if (lane_ >= offset) x += below;
    }
    if (lane_ == kWarp - 1) shared_.sums[warp_] = x;
    __syncthreads();
    return x + warp_sum(lane_ < warp_ ? shared_.sums[lane_] : 0);
  }

  /// Sum of all weights; with `count`, how many tokens of the block have each distance from the largest.
  __device__ u64 weigh(bool count) {
    if (threadIdx.x == 0) shared_.num_listed = 0;
    if (count) {
      for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) shared_.bins[i] = 0;
      __syncthreads();
    }
    u64 sum = 0;
    for_segment([&](float logit, int) {
      const u64 w = weight(logit);
      sum += w;
      if (count && w > 0) atomicAdd(&shared_.bins[scores_.bin(logit)], 1u);
    });
    return sum_up(sum);
  }

  /// Of the tokens with keys from `threshold` on: their number, or their weight.
  __device__ u64 sum_segments(u64 threshold, bool masses) {
    u64 sum = 0;
    for_segment([&](float logit, int id) {
      if (key_of(logit, id) < threshold) return;
      const u64 w = weight(logit);
      sum += masses ? w : static_cast<u64>(w > 0);
    });
    return sum_up(sum);
  }

  /// Of the sorted list: sum of the first `count` weights, and the place of the first at which their sum
  /// reaches `wanted` (-1: not among them).
  __device__ void sum_list(int count, u64 wanted, u64& sum, int& place) {
    const int i = 2 * static_cast<int>(threadIdx.x);
    const u64 a = i < count ? weight(logit_of(shared_.keys[i])) : 0;
    const u64 b = i + 1 < count ? weight(logit_of(shared_.keys[i + 1])) : 0;
    const u64 after = scan(a + b), before = after - a - b;
    if (threadIdx.x == 0) shared_.found = -1;
    __syncthreads();
    if (before < wanted && after >= wanted) shared_.found = before + a >= wanted ? i : i + 1;
    if (threadIdx.x == kThreads - 1) shared_.found_sum = after;
    __syncthreads();
    sum = shared_.found_sum;
    place = shared_.found;
    __syncthreads();
  }

  /// The key of the least likely token that is kept, to every thread of the cluster. `total`: sum of all weights. `joint`:
  /// top_p is of that sum, not of what top_k leaves.
  __device__ u64 find_threshold(u64 total, bool joint) {
    const u64 whole = total;
    const int thread = static_cast<int>(threadIdx.x);
    u64 in_bin = 0;
    if (thread < kBins) {
      for (int rank = 0; rank < blocks_; ++rank) in_bin += at_block(shared_.bins[thread], rank);
    }
    const u64 upto = scan(in_bin);
    if (thread == kThreads - 1) shared_.found_sum = upto;
    if (thread == 0) shared_.found = 0;
    __syncthreads();
    const u64 num_candidates = shared_.found_sum;
    const bool cuts_k = draw_.top_k > 0 && static_cast<u64>(draw_.top_k) < num_candidates;
    // Bins that surely suffice, for lists are sorted faster the shorter they are, and bins that fit.
    u64 least = upto, enough = static_cast<u64>(draw_.top_k);
    if (!cuts_k) {
      least = scan(thread < kBins ? in_bin * scores_.least_weight(thread) : 0);
      enough = part_of(draw_.top_p, total);
    }
    const int needed = __syncthreads_count(thread < kBins && least < enough) + 1;
    const int cut = min(needed, __syncthreads_count(thread < kBins && upto <= kListed));
    if (thread == cut - 1) shared_.found = static_cast<int>(upto);
    __syncthreads();
    const int num_listed = shared_.found;
    list(cut);

    u64 floor = 0;  // the threshold of top_k
    int most = num_listed, place = -1;
    if (cuts_k && draw_.top_k <= num_listed) {
      most = draw_.top_k;
      u64 sum = 0;
      if (rank_ == 0) {
        floor = shared_.keys[most - 1];
        sum_list(most, ~0ull, sum, place);
      }
      floor = tell(0, floor);
      total = tell(1, sum);
    } else if (cuts_k) {
      floor = search(static_cast<u64>(draw_.top_k), 0, /*masses=*/false);
      total = sum_segments(floor, /*masses=*/true);
    }
    if (draw_.top_p >= 1) return floor;
    if (joint) total = whole;
    const u64 wanted = max(static_cast<u64>(part_of(draw_.top_p, total)), u64{1});
    u64 threshold = 0;
    if (rank_ == 0) {
      u64 unused;
      sum_list(most, wanted, unused, place);
      if (place >= 0) threshold = shared_.keys[place];
      if (place < 0 && most < num_listed) threshold = floor;  // top_k cuts before top_p does
    }
    threshold = tell(2, threshold);
    return max(floor, threshold > 0 ? threshold : search(wanted, floor, /*masses=*/true));
  }

  /// Gathers the tokens in bins below `cut` in the first block, the likeliest first.
  __device__ void list(int cut) {
    Shared* first = cluster_.map_shared_rank(&shared_, 0);
    for_segment([&](float logit, int id) {
      if (weight(logit) > 0 && scores_.bin(logit) < cut)
        first->keys[atomicAdd(&first->num_listed, 1u)] = key_of(logit, id);
    });
    cluster_.sync();
    if (rank_ != 0) return;
    const int count = static_cast<int>(shared_.num_listed);
    int size = 2;
    while (size < count) size *= 2;
    for (int i = count + static_cast<int>(threadIdx.x); i < size; i += kThreads) shared_.keys[i] = 0;
    __syncthreads();
    // Bitonic.
    for (int length = 2; length <= size; length *= 2) {
      for (int stride = length / 2; stride > 0; stride /= 2) {
        const int t = static_cast<int>(threadIdx.x);
        if (t < size / 2) {
          const int i = 2 * t - (t & (stride - 1)), j = i + stride;
          const u64 a = shared_.keys[i], b = shared_.keys[j];
          if ((a < b) == ((i & length) == 0)) {
            shared_.keys[i] = b;
            shared_.keys[j] = a;
          }
        }
        __syncthreads();
      }
    }
  }

  /// The largest key from which on (and from `floor` on) tokens have `wanted` weight, or are that many.
  __device__ u64 search(u64 wanted, u64 floor, bool masses) {
    u64 threshold = 0;
    for (int bit = 63; bit >= 0; --bit) {
      const u64 next = threshold | u64{1} << bit;
      // Ids are below size_, so these bits of every key are set.
      const bool set = bit < 32 && size_ <= (bit < 31 ? 1 << bit : 0x7FFFFFFF);
      if (set || sum_segments(max(next, floor), masses) >= wanted) threshold = next;
    }
    return threshold;
  }

  /// The token, of those with keys from `threshold` on, at which the sum of weights passes `target`; the sums
  /// of segments and blocks are in shared memory. -1 in the blocks that do not have it.
  __device__ int pick(u64 target, u64 threshold) {
    int owner = 0;
    for (; owner < blocks_ - 1; ++owner) {
      const u64 sum = at_block(shared_.block_sums[turn_], owner);
      if (sum > target) break;
      target -= sum;
    }
    if (rank_ != owner) return -1;
    int warp = 0;
    while (warp < kWarps - 1 && shared_.sums[warp] <= target) target -= shared_.sums[warp++];
    const int begin = (rank_ * kWarps + warp) * segment_, end = min(begin + segment_, size_);
    const int each = (segment_ + kThreads - 1) / kThreads;
    const int first = begin + static_cast<int>(threadIdx.x) * each, last = min(first + each, end);
    const auto kept = [&](int i) {
      const float logit = scores_.at(i);
      return key_of(logit, i) >= threshold ? weight(logit) : 0;
    };
    u64 sum = 0;
    for (int i = first; i < last; ++i) sum += kept(i);
    const u64 after = scan(sum);
    u64 passed = after - sum;
    if (passed <= target && target < after) {
      int i = first;
      for (passed += kept(i); passed <= target; passed += kept(i)) ++i;
      shared_.found = i;
    }
    __syncthreads();
    return shared_.found;
  }

  cg::cluster_group cluster_ = cg::this_cluster();
  Scores scores_;
  int size_;
  Draw draw_;
  Shared& shared_;
  int blocks_, segment_, rank_, warp_, lane_;
  int turn_ = 0;
};

/// Blocks for each of so many rows: as many as run at a time, for more would only wait for each other.
inline int blocks_of_row(std::int64_t rows) {
  int sms = 0;
  check(multiprocessors(sms), "cudaDeviceGetAttribute");
  int blocks = kMaxBlocks;
  while (blocks > 1 && rows * blocks > sms) blocks /= 2;
  return blocks;
}

}  // namespace flash_mla::sm90::draws
