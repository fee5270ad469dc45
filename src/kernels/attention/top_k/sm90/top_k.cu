// The k largest of every row, exactly, in ascending position.
//
// Tile:      one row for a block, or for a cluster of 2 to 8 blocks where there are few rows; each streams its part
//            of the row once.
// Threads:   512 a block, all alike.
// Memory:    106 KB: 8192 candidates (score and position, 64 KB), two bit maps of 131072 positions (32 KB), 2048
//            counters (8 KB), 512 keys. Two blocks a multiprocessor: one streams while the other selects.
// Registers: 64 a thread.
// Code:      what a row runs is 13 KB, for it comes from memory each time that other kernels' data has gone through L2:
//            loops of few rounds are rolled.
//
// 1. A sample of 1024 to 8192 scores gives a threshold that somewhat more than k scores should reach
//    (candidates.cuh).
// 2. The row is streamed once, from HBM; what reaches the threshold becomes a candidate. Blocks of a cluster send theirs
//    to the first one and are done.
// 3. The first block finds the k-th key among the candidates exactly: it counts 2048 digits of their distance from the
//    threshold, and compares those of the boundary's digit with each other (boundary.cuh).
// 4. Bits of positions above that key, and of positions equal to it, are set in two maps; ranks are prefix sums
//    over their words, so that positions come out in order, and the first of the equals are taken.
//
// The sample decides how fast a row is, never what comes out: where it misled (fewer than k candidates, or more
// than there is room for, as with ties without end) the first block counts digits over the whole row instead, in up
// to three more passes, and fills the maps from the row.
// Calls whose rows have up to 8192 scores are another kernel's: 44 KB, three blocks a multiprocessor (short_rows.cuh).

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/top_k/sm90/boundary.cuh"
#include "kernels/attention/top_k/sm90/candidates.cuh"
#include "kernels/attention/top_k/sm90/params.cuh"
#include "kernels/attention/top_k/sm90/short_rows.cuh"
#include "kernels/attention/top_k/sm90/top_k.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90 {
namespace top_k_kernel {

/// Writes the positions of everything above the boundary and of the first of its equals, in order.
template <bool kCandidates>
class Emitter {
 public:
  __device__ Emitter(const Row& row, Shared& s, Boundary boundary, unsigned count)
      : row_(row), s_(s), above_(map(s.above)), equal_(map(s.equal)), boundary_(boundary), count_(count) {}

  __device__ void emit(unsigned k) {
#pragma unroll 1
    for (int first = 0; first < row_.n && written_ < k; first += kWindow) {
      const int words = words_of(first);
      if constexpr (kCandidates) {
        mark_candidates(first, words);
      } else {
        mark_row(first, words);
      }
      __syncthreads();
      emit_window(first, words);
      __syncthreads();  // the maps are filled again
    }
  }

 private:
  /// Words that the maps of positions from `first` on have, each thread the same number of fours.
  __device__ int words_of(int first) const {
    const int words = (min(row_.n - first, kWindow) + 31) / 32;
    return (words + 4 * kThreads - 1) / (4 * kThreads) * (4 * kThreads);
  }

  __device__ void mark_candidates(int first, int words) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < words / 4; i += kThreads)
      s_.above[i] = s_.equal[i] = uint4{0, 0, 0, 0};
    __syncthreads();
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < count_; i += kThreads) {
      const unsigned key = selection::order_key(__uint_as_float(s_.list[i])),
                     at = s_.list[kCapacity + i] - static_cast<unsigned>(first);
      if (at >= static_cast<unsigned>(kWindow) || key < boundary_.key) continue;
      atomicOr((key > boundary_.key ? above_ : equal_) + at / 32, 1u << at % 32);
    }
  }

  __device__ void mark_row(int first, int words) {
    constexpr int kLoads = 8;
    const int last = row_.n - 1;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < words * 32; i += kThreads * kLoads) {
      float x[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) x[j] = __ldg(row_.scores + min(first + i + j * kThreads, last));
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int at = i + j * kThreads;
        const unsigned key = first + at <= last ? selection::order_key(x[j]) : 0;
        const unsigned above = __ballot_sync(~0u, key > boundary_.key);
        const unsigned equal = __ballot_sync(~0u, key == boundary_.key);
        if (at % kWarp == 0 && at < kWindow) {
          above_[at / 32] = above;
          equal_[at / 32] = equal;
        }
      }
    }
  }

  struct Counts {
    unsigned above, equal;
  };

  /// Each thread counts the bits of `words / kThreads` words. Candidates then look up their own ranks, from what is
  /// before each pair of words; the map of a row has too many equals for that and is read out word by word.
  __device__ void emit_window(int first, int words) {
    const int fours = words / 4 / kThreads, four = static_cast<int>(threadIdx.x) * fours;
    unsigned above = 0, equal = 0;
#pragma unroll 1
    for (int i = four; i < four + fours; ++i) {
      const uint4 a = s_.above[i], e = s_.equal[i];
      above += static_cast<unsigned>(__popc(a.x) + __popc(a.y) + __popc(a.z) + __popc(a.w));
      equal += static_cast<unsigned>(__popc(e.x) + __popc(e.y) + __popc(e.z) + __popc(e.w));
    }
    const Prefix before = prefix_sum(s_.block, above, equal);
    if constexpr (kCandidates) {
      unsigned* pairs = s_.block.counters();
      Counts up_to{before.a, before.b};
#pragma unroll 1
      for (int i = four; i < four + fours; ++i) {
        const uint4 a = s_.above[i], e = s_.equal[i];
        pairs[2 * i] = up_to.above << 16 | up_to.equal;
        up_to.above += static_cast<unsigned>(__popc(a.x) + __popc(a.y));
        up_to.equal += static_cast<unsigned>(__popc(e.x) + __popc(e.y));
        pairs[2 * i + 1] = up_to.above << 16 | up_to.equal;
        up_to.above += static_cast<unsigned>(__popc(a.z) + __popc(a.w));
        up_to.equal += static_cast<unsigned>(__popc(e.z) + __popc(e.w));
      }
      __syncthreads();
      write_candidates(first, pairs);
    } else {
      write_words(first, 4 * four, 4 * fours, Counts{before.a, before.b});
    }
    written_ += before.total_a + min(before.total_b, boundary_.ties);
    boundary_.ties -= min(before.total_b, boundary_.ties);
  }

  __device__ void write_candidates(int first, const unsigned* pairs) const {
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < count_; i += kThreads) {
      const unsigned key = selection::order_key(__uint_as_float(s_.list[i])),
                     at = s_.list[kCapacity + i] - static_cast<unsigned>(first);
      if (at >= static_cast<unsigned>(kWindow) || key < boundary_.key) continue;
      const unsigned word = at / 32, lower = (1u << at % 32) - 1, pair = pairs[word / 2];
      unsigned above = pair >> 16, equal = pair & 0xFFFFu;
      if (word % 2 != 0) {
        above += static_cast<unsigned>(__popc(above_[word - 1]));
        equal += static_cast<unsigned>(__popc(equal_[word - 1]));
      }
      above += static_cast<unsigned>(__popc(above_[word] & lower));
      equal += static_cast<unsigned>(__popc(equal_[word] & lower));
      if (key == boundary_.key && equal >= boundary_.ties) continue;
      row_.out[written_ + above + min(equal, boundary_.ties)] =
          row_.place(static_cast<int>(s_.list[kCapacity + i]));
    }
  }

  __device__ void write_words(int first, int word, int own, Counts before) const {
    unsigned tie = before.equal, at = written_ + before.above + min(tie, boundary_.ties);
#pragma unroll 1
    for (int w = word; w < word + own; ++w) {
      const unsigned more = above_[w];
      for (unsigned bits = more | equal_[w]; bits != 0; bits &= bits - 1) {
        const int bit = __ffs(static_cast<int>(bits)) - 1;
        if ((more >> bit & 1) == 0 && tie++ >= boundary_.ties) continue;
        row_.out[at++] = row_.place(first + w * 32 + bit);
      }
    }
  }

  const Row& row_;
  Shared& s_;
  unsigned *above_, *equal_;
  Boundary boundary_;
  unsigned count_, written_ = 0;
};

/// Candidates of a row that has more scores than fit, in the first block's list, and the range of their keys.
__device__ Range gather_candidates(const Row& row, Shared& s, int k, int rank, int blocks) {
  if (threadIdx.x == 0) s.num_candidates = 0;
  ptx::cluster_arrive();
  const int part = ((row.n + blocks - 1) / blocks + kVec - 1) / kVec * kVec;
  const int begin = min(rank * part, row.n), end = min((rank + 1) * part, row.n);
  // Of few rows memory need not wait for the sample: a line of the part for each thread.
  const int line = begin + static_cast<int>(threadIdx.x) * (128 / static_cast<int>(sizeof(float)));
  if (blocks == kMaxCluster && line < end) ptx::prefetch_l2(row.scores + line);
  const Range range = sample_range(row, k, reinterpret_cast<uint2*>(s.above), s.block);
  Collector(row, s, score_of(range.least)).collect(begin, end);
  ptx::
      cluster_wait();  // the first block is there, its counter set; all of this one's candidates are in its list
  __syncthreads();
  if (rank != 0) send_candidates(s);
  ptx::cluster_arrive();
  if (rank == 0) ptx::cluster_wait();  // the others are done: nobody reads or writes there any more
  return range;
}

/// A row that is chosen whole: true.
__device__ bool take_all(const Row& row, int k, int rank) {
  if (row.n > k) return false;
  if (rank == 0) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < k; i += kThreads)
      row.out[i] = i < row.n ? row.place(i) : -1;
  }
  return true;
}

__global__ void __launch_bounds__(kThreads, 2) select_rows(const __grid_constant__ Params p, int cluster) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Row row(p, blockIdx.x / static_cast<unsigned>(cluster));
  const auto rank = static_cast<int>(ptx::cluster_rank());
  if (take_all(row, p.k, rank)) return;
  if (row.n <= static_cast<int>(kCapacity)) {
    if (rank == 0) select_short_row(row, *reinterpret_cast<ShortShared*>(memory), p.k);
    return;
  }
  Shared& s = *reinterpret_cast<Shared*>(memory);
  clear_histogram(s.block);
  const Range range = gather_candidates(row, s, p.k, rank, cluster);
  if (rank != 0) return;
  const auto k = static_cast<unsigned>(p.k);
  const unsigned count = s.num_candidates;
  if (count >= k && count <= kCapacity) {
    const CandidateKeys keys{s.list, count};
    Emitter<true>(row, s, find_close_boundary(keys, s.block, s.boundary, range, k), count).emit(k);
  } else {
    Emitter<false>(row, s, find_boundary(RowKeys{row}, s.block, k), 0).emit(k);
  }
}

/// A block for a row.
__global__ void __launch_bounds__(kThreads, 3) select_short_rows(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Row row(p, blockIdx.x);
  if (!take_all(row, p.k, 0)) select_short_row(row, *reinterpret_cast<ShortShared*>(memory), p.k);
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
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.width <= kCapacity) {
    check(allow_shared_memory<select_short_rows>(sizeof(ShortShared)), "cudaFuncSetAttribute");
    const LaunchConfig config(dim3(static_cast<unsigned>(n)), kThreads, sizeof(ShortShared), on);
    check(launch(config, select_short_rows, p), "top_k");
    return;
  }
  int multiprocessors_there = 0;
  check(multiprocessors(multiprocessors_there), "cudaDeviceGetAttribute");
  check(allow_shared_memory<select_rows>(sizeof(Shared)), "cudaFuncSetAttribute");
  const unsigned cluster = cluster_of(n, multiprocessors_there);
  LaunchConfig config(dim3(static_cast<unsigned>(n) * cluster), kThreads, sizeof(Shared), on);
  check(launch(config.cluster(cluster), select_rows, p, static_cast<int>(cluster)), "top_k");
}

}  // namespace flash_mla::sm90
