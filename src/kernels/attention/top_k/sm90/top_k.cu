// The k largest of every row, exactly, in ascending position.
//
// Tile:      one row for a block, or for a cluster of 2 to 8 blocks where there are few rows; each streams its part
//            of the row once.
// Threads:   512 a block, all alike.
// Memory:    106 KB: 8192 candidates (key and position, 64 KB), two bit maps of 131072 positions (32 KB), 2048
//            counters (8 KB), 512 keys. Two blocks a multiprocessor: one streams while the other selects.
// Registers: 64 a thread.
//
// 1. A sample of 4096 to 16384 scores gives a threshold that somewhat more than k scores should reach.
// 2. The row is streamed once, from HBM; what reaches the threshold becomes a candidate.
// 3. The first block gathers the candidates and finds the k-th key among them exactly: it counts 2048 digits of
//    their distance from the least, and compares those of the boundary's digit with each other.
// 4. Bits of positions above that key, and of positions equal to it, are set in two maps; ranks are prefix sums
//    over their words, so that positions come out in order, and the first of the equals are taken.
//
// The sample decides how fast a row is, never what comes out: where it misled (fewer than k candidates, or more
// than there is room for, as with ties without end) the first block counts digits over the whole row instead, in up
// to three more passes, and fills the maps from the row. Rows of up to 8192 scores are candidates as they are.

#include <cooperative_groups.h>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/top_k/order_key.h"
#include "kernels/attention/top_k/sm90/params.cuh"
#include "kernels/attention/top_k/sm90/top_k.h"

namespace flash_mla::sm90 {
namespace top_k_kernel {

namespace cg = cooperative_groups;

class Row {
 public:
  __device__ Row(const Params& p, long long row, Shared& s) : p_(p), s_(s), row_(row) {
    const long long start = p.row_starts != nullptr ? p.row_starts[row] : 0;
    const long long room = start >= 0 && start < p.width ? p.width - start : 0;
    n_ = static_cast<int>(min(max(static_cast<long long>(p.lengths[row]), 0ll), room));
    scores_ = p.logits + row * p.logits_stride + start;
    offset_ = p.offsets != nullptr ? p.offsets[row] : 0;
    if (p.block_table != nullptr) {
      const long long request =
          p.row_request != nullptr ? p.row_request[row] : (p.first_row + row) / p.rows_per_request;
      table_ = p.block_table + request * p.table_stride;
    }
    out_ = p.indices + row * p.indices_stride;
  }

  __device__ void select(cg::cluster_group cluster) {
    const int rank = static_cast<int>(cluster.block_rank()), blocks = static_cast<int>(cluster.num_blocks());
    if (n_ <= p_.k) {
      if (rank == 0) take_all();
      return;  // as every block of the cluster does
    }
    if (threadIdx.x == 0) s_.num_candidates = 0;
    if (n_ <= static_cast<int>(kCapacity)) {
      if (rank != 0) return;
      take_candidates();
      emit</*kCandidates=*/true>(candidates_boundary(static_cast<unsigned>(n_)), static_cast<unsigned>(n_));
      return;
    }
    const unsigned threshold = sample();
    __syncthreads();  // the sample lies where candidates will
    const int part = ((n_ + blocks - 1) / blocks + kVec - 1) / kVec * kVec;
    collect(min(rank * part, n_), min((rank + 1) * part, n_), score_of(threshold));
    __syncthreads();
    if (blocks > 1) {
      cluster.sync();
      if (rank == 0) gather(cluster, blocks);
      cluster.sync();  // nobody leaves while its candidates are read
      if (rank != 0) return;
    }
    const unsigned count = s_.num_candidates;
    if (count >= static_cast<unsigned>(p_.k) && count <= kCapacity) {
      emit</*kCandidates=*/true>(candidates_boundary(count), count);
    } else {
      emit</*kCandidates=*/false>(find_boundary</*kCandidates=*/false>(0), 0);
    }
  }

 private:
  __device__ int place(int position) const {
    const long long at = static_cast<long long>(position) + offset_;
    if (table_ == nullptr) return static_cast<int>(at);
    return static_cast<int>(table_[at / p_.page_size] * p_.page_size + at % p_.page_size);
  }

  __device__ void take_all() const {
    for (int i = static_cast<int>(threadIdx.x); i < p_.k; i += kThreads) out_[i] = i < n_ ? place(i) : -1;
  }

  /// All scores of a short row. (Loads past the end are of the last score: a branch for each would make them wait
  /// for one another.)
  __device__ void take_candidates() {
    constexpr int kLoads = 8;
    for (int first = static_cast<int>(threadIdx.x); first < n_; first += kThreads * kLoads) {
      float x[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) x[j] = __ldg(scores_ + min(first + j * kThreads, n_ - 1));
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int i = first + j * kThreads;
        if (i >= n_) continue;
        s_.list[i] = selection::order_key(x[j]);
        s_.list[kCapacity + i] = static_cast<unsigned>(i);
      }
    }
    __syncthreads();
  }

  /// A key that more than k scores should reach, and not more than there is room for. The sample is a score of
  /// each of `count` equal stretches of the row, at a place in it that looks random.
  __device__ unsigned sample() {
    constexpr int kLoads = kMinSample / kThreads;
    const int count = n_ >= 32 * kMaxSample       ? kMaxSample
                      : n_ >= 32 * kMaxSample / 2 ? kMaxSample / 2
                                                  : kMinSample;
    const auto stretch = static_cast<unsigned>(n_ / count);
    // 1.35 times the share of k, and 20 more where that is little: 4 deviations above k.
    const float share = static_cast<float>(p_.k) * static_cast<float>(count) / static_cast<float>(n_);
    const float room =
        0.75f * static_cast<float>(kCapacity) * static_cast<float>(count) / static_cast<float>(n_);
    const auto rank = static_cast<unsigned>(fmaxf(fminf(share * 1.35f + 20.0f, room), 1.0f));
    clear_histogram(s_.block);
    for (int first = static_cast<int>(threadIdx.x); first < count; first += kThreads * kLoads) {
      float x[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const auto i = static_cast<unsigned>(first + j * kThreads);
        x[j] = __ldg(scores_ + i * stretch + __umulhi(i * 2654435761u, stretch));
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const unsigned key = selection::order_key(x[j]);
        s_.list[first + j * kThreads] = key;
        atomicAdd(&s_.block.histogram[key >> 21], 1u);
      }
    }
    find_digit(s_.block, rank);
    const unsigned high = s_.block.found_digit, left = s_.block.found_rank;
    clear_histogram(s_.block);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const unsigned key = s_.list[i];
      if (key >> 21 == high) atomicAdd(&s_.block.histogram[key >> 10 & (kBins - 1)], 1u);
    }
    find_digit(s_.block, left);
    return high << 21 | s_.block.found_digit << 10;
  }

  /// A candidate of a thread on its own.
  __device__ void consider(int position, float threshold) {
    const float score = __ldg(scores_ + position);
    if (score < threshold) return;  // NaN is not below anything
    put(atomicAdd(&s_.num_candidates, 1u), score, position);
  }
  __device__ void put(unsigned slot, float score, int position) {
    if (slot >= kCapacity) return;
    s_.list[slot] = selection::order_key(score);
    s_.list[kCapacity + slot] = static_cast<unsigned>(position);
  }

  struct Loads {
    float4 x[kUnroll];
  };
  __device__ static void load(const float4* from, int first, int vectors, Loads& to) {
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int v = first + j * kThreads;
      if (v < vectors) to.x[j] = __ldcs(from + v);
    }
  }

  /// The candidates among a thread's loads; a warp takes room for all of its lanes at once.
  __device__ void keep(const Loads& loads, int first, int vectors, int begin, float threshold) {
    unsigned hits = 0;
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (first + j * kThreads >= vectors) continue;
      const float4 x = loads.x[j];
      const unsigned four = (x.x < threshold ? 0u : 1u) | (x.y < threshold ? 0u : 2u) |
                            (x.z < threshold ? 0u : 4u) | (x.w < threshold ? 0u : 8u);
      hits |= four << 4 * j;
    }
    if (!__any_sync(~0u, hits != 0)) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto own = static_cast<unsigned>(__popc(hits));
    unsigned up_to = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const unsigned before = __shfl_up_sync(~0u, up_to, step);
      if (lane >= step) up_to += before;
    }
    unsigned slot = 0;
    if (lane == kWarp - 1) slot = atomicAdd(&s_.num_candidates, up_to);
    slot = __shfl_sync(~0u, slot, kWarp - 1) + up_to - own;
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const unsigned four = hits >> 4 * j & 15;
      if (four == 0) continue;
      const float4 x = loads.x[j];
      const int at = begin + (first + j * kThreads) * kVec;
      if ((four & 1) != 0) put(slot++, x.x, at);
      if ((four & 2) != 0) put(slot++, x.y, at + 1);
      if ((four & 4) != 0) put(slot++, x.z, at + 2);
      if ((four & 8) != 0) put(slot++, x.w, at + 3);
    }
  }

  /// The candidates of positions [begin, end). The next loads are on their way while these are looked at.
  __device__ void collect(int begin, int end, float threshold) {
    const int thread = static_cast<int>(threadIdx.x);
    const auto address = reinterpret_cast<unsigned long long>(scores_ + begin);
    // Scores before the first address that is a multiple of 16 bytes.
    const int head = min(static_cast<int>((16 - address % 16) % 16 / 4), end - begin);
    if (thread < head) consider(begin + thread, threshold);
    begin += head;
    const int vectors = (end - begin) / kVec;
    const auto* from = reinterpret_cast<const float4*>(scores_ + begin);
    constexpr int kRound = kThreads * kUnroll;
    Loads a, b;
    load(from, thread, vectors, a);
    for (int round = 0; round < vectors; round += 2 * kRound) {  // by whole warps
      load(from, round + kRound + thread, vectors, b);
      keep(a, round + thread, vectors, begin, threshold);
      load(from, round + 2 * kRound + thread, vectors, a);
      keep(b, round + kRound + thread, vectors, begin, threshold);
    }
    const int tail = begin + vectors * kVec + thread;
    if (tail < end) consider(tail, threshold);
  }

  /// The other blocks' candidates behind those of the first; each of them has some warps to bring them.
  __device__ void gather(cg::cluster_group& cluster, int blocks) {
    const unsigned own = s_.num_candidates;
    const int team = kThreads / blocks, other = static_cast<int>(threadIdx.x) / team;
    unsigned count[kMaxCluster], at = 0, total = 0;
#pragma unroll
    for (int b = 0; b < kMaxCluster; ++b) {
      count[b] = b == 0       ? own
                 : b < blocks ? cluster.map_shared_rank(&s_, static_cast<unsigned>(b))->num_candidates
                              : 0;
    }
#pragma unroll
    for (int b = 0; b < kMaxCluster; ++b) {
      if (b < other) at += min(count[b], kCapacity + 1);
      total += min(count[b], kCapacity + 1);
    }
    if (total <= kCapacity && other > 0) {
      const Shared* from = cluster.map_shared_rank(&s_, static_cast<unsigned>(other));
      const unsigned n = from->num_candidates;
      for (unsigned i = static_cast<unsigned>(static_cast<int>(threadIdx.x) % team); i < n;
           i += static_cast<unsigned>(team)) {
        s_.list[at + i] = from->list[i];
        s_.list[kCapacity + at + i] = from->list[kCapacity + i];
      }
    }
    __syncthreads();
    if (threadIdx.x == 0)
      s_.num_candidates = total;  // more than there is room for: the row itself is counted
    __syncthreads();
  }

  /// f(key, there) for the candidates, or for all scores of the row, by whole warps: the last have lanes without.
  template <bool kCandidates, class F>
  __device__ void for_keys(unsigned count, const F& f) const {
    constexpr int kLoads = 8;
    const unsigned n = kCandidates ? count : static_cast<unsigned>(n_);
    for (unsigned first = 0; first < n; first += kThreads * kLoads) {
      unsigned key[kLoads];
      float x[kLoads];
#pragma unroll
      for (unsigned j = 0; j < kLoads; ++j) {
        const unsigned i = min(first + j * kThreads + threadIdx.x, n - 1);
        if constexpr (kCandidates) {
          key[j] = s_.list[i];
        } else {
          x[j] = __ldg(scores_ + i);
        }
      }
      if constexpr (!kCandidates) {
#pragma unroll
        for (unsigned j = 0; j < kLoads; ++j) key[j] = selection::order_key(x[j]);
      }
#pragma unroll
      for (unsigned j = 0; j < kLoads; ++j) f(key[j], first + j * kThreads + threadIdx.x < n);
    }
  }

  /// The boundary of candidates. They are close to each other: digits of their distance from the least one tell
  /// more than digits of keys. Where the boundary's digit has few keys, each is compared with all of them.
  __device__ Boundary candidates_boundary(unsigned count) {
    BlockShared& b = s_.block;
    unsigned least = ~0u, most = 0;
    if (threadIdx.x == 0) {
      s_.least = ~0u;
      s_.most = s_.num_close = 0;
    }
    clear_histogram(b);
    for (unsigned i = threadIdx.x; i < count; i += kThreads) {
      const unsigned key = s_.list[i];
      least = min(least, key);
      most = max(most, key);
    }
    least = __reduce_min_sync(~0u, least);
    most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % kWarp == 0) {
      atomicMin(&s_.least, least);
      atomicMax(&s_.most, most);
    }
    __syncthreads();
    least = s_.least;
    const int shift = max(32 - __clz(static_cast<int>(s_.most - least)) - 11, 0);
    for_keys<true>(count, [&](unsigned key, bool there) {
      count_digit(b, (key - least) >> shift & (kBins - 1), there);
    });
    find_digit(b, static_cast<unsigned>(p_.k));
    const unsigned digit = b.found_digit, wanted = b.found_rank, found = b.found_count;
    const unsigned lowest = least + (digit << shift);
    // All keys from there up: none is its equal if it moves down by one, for no key is 0.
    if (found == wanted) return {lowest - 1, 0};
    if (shift == 0) return {lowest, wanted};
    if (found > kThreads) return find_boundary<true>(count);
    for (unsigned i = threadIdx.x; i < count; i += kThreads) {
      const unsigned key = s_.list[i];
      if ((key - least) >> shift == digit) s_.close[atomicAdd(&s_.num_close, 1u)] = key;
    }
    __syncthreads();
    if (threadIdx.x < found) {
      const unsigned key = s_.close[threadIdx.x];
      unsigned above = 0, equal = 0;
      for (unsigned i = 0; i < found; ++i) {
        above += s_.close[i] > key;
        equal += s_.close[i] == key;
      }
      if (above < wanted && wanted <= above + equal) {  // one key, the same for all that have it
        s_.boundary_key = key;
        s_.boundary_ties = wanted - above;
      }
    }
    __syncthreads();
    return {s_.boundary_key, s_.boundary_ties};
  }

  template <bool kCandidates>
  __device__ Boundary find_boundary(unsigned count) {
    BlockShared& b = s_.block;
    clear_histogram(b);
    for_keys<kCandidates>(count, [&](unsigned key, bool there) { count_digit(b, key >> 21, there); });
    find_digit(b, static_cast<unsigned>(p_.k));
    unsigned prefix = b.found_digit, wanted = b.found_rank, shift = 21;
    // Where all keys of a digit are wanted its lower bits decide nothing.
    if (b.found_count != wanted) {
      clear_histogram(b);
      for_keys<kCandidates>(count, [&](unsigned key, bool there) {
        count_digit(b, key >> 10 & (kBins - 1), there && key >> 21 == prefix);
      });
      find_digit(b, wanted);
      prefix = prefix << 11 | b.found_digit;
      wanted = b.found_rank;
      shift = 10;
    }
    if (b.found_count != wanted) {
      clear_histogram(b);
      for_keys<kCandidates>(count, [&](unsigned key, bool there) {
        count_digit(b, key & 1023u, there && key >> 10 == prefix);
      });
      find_digit(b, wanted);
      prefix = prefix << 10 | b.found_digit;
      wanted = b.found_rank;
      shift = 0;
    }
    const unsigned key = prefix << shift;
    // All keys from there up: none is its equal if it moves down by one, for no key is 0.
    return b.found_count == wanted ? Boundary{key - 1, 0} : Boundary{key, wanted};
  }

  /// Words that the maps of positions from `first` on have, each thread the same number of them.
  __device__ int words_of(int first) const {
    const int words = (min(n_ - first, kWindow) + 31) / 32;
    return (words + kThreads - 1) / kThreads * kThreads;
  }

  /// The maps of positions [first, first + kWindow).
  template <bool kCandidates>
  __device__ void fill_maps(Boundary boundary, unsigned count, int first) {
    if constexpr (kCandidates) {
      for (int w = static_cast<int>(threadIdx.x); w < words_of(first); w += kThreads)
        s_.above[w] = s_.equal[w] = 0;
      __syncthreads();
      for (unsigned i = threadIdx.x; i < count; i += kThreads) {
        const unsigned key = s_.list[i], at = s_.list[kCapacity + i] - static_cast<unsigned>(first);
        if (at >= static_cast<unsigned>(kWindow) || key < boundary.key) continue;
        atomicOr(key > boundary.key ? &s_.above[at / 32] : &s_.equal[at / 32], 1u << at % 32);
      }
    } else {
      constexpr int kLoads = 8;
      const int words = words_of(first), last = n_ - 1;
      for (int i = static_cast<int>(threadIdx.x); i < words * 32; i += kThreads * kLoads) {
        float x[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j) x[j] = __ldg(scores_ + min(first + i + j * kThreads, last));
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          const int at = i + j * kThreads;
          const unsigned key = first + at <= last ? selection::order_key(x[j]) : 0;
          const unsigned above = __ballot_sync(~0u, key > boundary.key);
          const unsigned equal = __ballot_sync(~0u, key == boundary.key);
          if (at % kWarp == 0 && at < kWindow) {
            s_.above[at / 32] = above;
            s_.equal[at / 32] = equal;
          }
        }
      }
    }
    __syncthreads();
  }

  template <bool kCandidates>
  __device__ void emit(Boundary boundary, unsigned count) {
    unsigned written = 0, ties = boundary.ties;
    for (int first = 0; first < n_ && written < static_cast<unsigned>(p_.k); first += kWindow) {
      fill_maps<kCandidates>(boundary, count, first);
      const int own = words_of(first) / kThreads, word = static_cast<int>(threadIdx.x) * own;
      unsigned above = 0, equal = 0;
      for (int w = word; w < word + own; ++w) {
        above += static_cast<unsigned>(__popc(s_.above[w]));
        equal += static_cast<unsigned>(__popc(s_.equal[w]));
      }
      const Prefix before = prefix_sum(s_.block, above, equal);
      unsigned tie = before.b, at = written + before.a + min(tie, ties);
      for (int w = word; w < word + own; ++w) {
        const unsigned more = s_.above[w];
        for (unsigned bits = more | s_.equal[w]; bits != 0; bits &= bits - 1) {
          const int bit = __ffs(static_cast<int>(bits)) - 1;
          if ((more >> bit & 1) == 0 && tie++ >= ties) continue;
          out_[at++] = place(first + w * 32 + bit);
        }
      }
      written += before.total_a + min(before.total_b, ties);
      ties -= min(before.total_b, ties);
      __syncthreads();  // the maps are filled again
    }
  }

  const Params& p_;
  Shared& s_;
  long long row_;
  const float* scores_;
  int n_;
  long long offset_;
  const int* table_ = nullptr;
  int* out_;
};

__global__ void __launch_bounds__(kThreads, 2) select_rows(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) unsigned char memory[];
  const cg::cluster_group cluster = cg::this_cluster();
  Row(p, blockIdx.x / cluster.num_blocks(), *reinterpret_cast<Shared*>(memory)).select(cluster);
}

/// Blocks of a row: as many as keep the device busy, of which two are on a multiprocessor.
unsigned cluster_of(long long rows, int multiprocessors) {
  unsigned blocks = kMaxCluster;
  while (blocks > 1 && rows * blocks > 2 * multiprocessors) blocks /= 2;
  return blocks;
}

}  // namespace top_k_kernel

void top_k(const TopKArgs& args, std::int64_t first_row, std::int64_t rows_per_request, void* stream) {
  using namespace top_k_kernel;
  const std::int64_t n = args.logits.size(0);
  if (n == 0) return;
  Params p{};
  p.logits = args.logits.ptr<const float>();
  p.logits_stride = args.logits.stride(0);
  p.width = args.logits.size(1);
  p.lengths = args.lengths.ptr<const int>();
  p.row_starts = args.row_starts.ptr<const int>();
  p.offsets = args.output.offsets.ptr<const int>();
  if (args.output.block_table.defined()) {
    p.block_table = args.output.block_table.ptr<const int>();
    p.table_stride = args.output.block_table.stride(0);
    p.page_size = args.output.page_size;
    p.row_request = args.output.row_request.ptr<const int>();
    p.first_row = first_row;
    p.rows_per_request = rows_per_request;
  }
  p.indices = args.indices.ptr<int>();
  p.indices_stride = args.indices.stride(0);
  p.k = static_cast<int>(args.indices.size(1));
  int multiprocessors_there = 0;
  check(multiprocessors(multiprocessors_there), "cudaDeviceGetAttribute");
  check(allow_shared_memory<select_rows>(sizeof(Shared)), "cudaFuncSetAttribute");
  const unsigned cluster = cluster_of(n, multiprocessors_there);
  check(launch(LaunchConfig(dim3(static_cast<unsigned>(n) * cluster), kThreads, sizeof(Shared),
                            static_cast<cudaStream_t>(stream))
                   .cluster(cluster),
               select_rows, p),
        "top_k");
}

}  // namespace flash_mla::sm90
