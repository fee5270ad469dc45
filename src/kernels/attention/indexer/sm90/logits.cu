// The indexer's logits: relu of products of e4m3, weighted and summed over heads. Any page size, alignment, width and
// number of heads; what comes in whole tiles is tiles.cu's.
//
// Tile:      64 keys x 64 heads x 128 (dim 64 is padded with zeros, as heads are; more than 64 heads are two tiles),
//            for 1, 2 or 4 query tokens that share the keys. A product is four wgmma m64n64k32.
// Threads:   one warpgroup a block, which loads, multiplies and sums; several blocks on a multiprocessor take turns.
// Memory:    4 stages of 64 keys (8 KB) and their scales, 8 KB of queries and 256 bytes of weights for each 64 heads.
// Registers: 80 a thread, of which 32 are the sums of a product: a thread weighs its 16 heads of 2 keys.
//
// A block takes a run of keys of one group of query tokens. Keys come by cp.async, 16 bytes at a time where pages
// are aligned to that, else 4; a key past the last of a run is the last again and is not written.
// Four lanes hold the heads of a key; their sums meet in a fixed order, so that a logit's bits are its own.

#include <cuda_runtime.h>

#include <algorithm>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/indexer/sm90/indexer.h"
#include "kernels/attention/indexer/sm90/params.cuh"
#include "kernels/attention/indexer/sm90/tiles.h"
#include "kernels/ptx/wgmma_e4m3.cuh"

namespace flash_mla::sm90 {
namespace index_kernel {

constexpr int kThreads = 128;
constexpr int kKeys = 64, kHeads = 64, kRowBytes = 128;  // of a tile
constexpr int kStages = 4;
constexpr int kTileBytes = kKeys * kRowBytes;

template <int kBytes>
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
  }
}

/// kRows query tokens against runs of keys; kUnit: bytes of a copy.
template <int kRows, int kUnit>
class Block {
 public:
  __device__ Block(const Params& p, unsigned char* memory) : p_(p), r_(p.rows), rows_(p) {
    stages_ = memory;
    scales_ = reinterpret_cast<float*>(memory + kStages * kTileBytes);
    queries_ = memory + kStages * kTileBytes + 1024;  // scales take exactly that
    weights_ = reinterpret_cast<float*>(queries_ + kRows * p.head_tiles * kTileBytes);
  }

  __device__ void run() {
    if (rows_.rows <= 0) return;
    rows_.clean();
    long long begin, end;
    rows_.find_keys(begin, end);
    if (begin >= end) return;
    load_queries();
    score(begin, end);
  }

 private:
  __device__ static int swizzled(int row, int byte) { return row * kRowBytes + (byte ^ (row % 8 * 16)); }

  /// Queries and weights; zeros where there is no head or dimension. The stages' own zeros too.
  __device__ void load_queries() {
    const int tiles = kRows * p_.head_tiles;
    for (int i = static_cast<int>(threadIdx.x); i < tiles * kTileBytes / 4; i += kThreads) {
      const int tile = i / (kTileBytes / 4), row = i / (kRowBytes / 4) % kHeads,
                byte = i % (kRowBytes / 4) * 4;
      const int query = tile / p_.head_tiles, head = tile % p_.head_tiles * kHeads + row;
      unsigned word = 0;
      if (query < rows_.rows && head < r_.heads && byte < r_.dim) {
        const long long at = rows_.row0 + query;
        const std::byte* from = r_.q + at / r_.rows_per_request * r_.q_request_bytes +
                                at % r_.rows_per_request * r_.q_row_bytes + head * r_.dim + byte;
        for (int b = 0; b < 4; ++b) word |= static_cast<unsigned>(from[b]) << 8 * b;
      }
      *reinterpret_cast<unsigned*>(queries_ + tile * kTileBytes + swizzled(row, byte)) = word;
    }
    for (int i = static_cast<int>(threadIdx.x); i < tiles * kHeads; i += kThreads) {
      const int query = i / kHeads / p_.head_tiles, head = i % (kHeads * p_.head_tiles);
      weights_[i] = query < rows_.rows && head < r_.heads
                        ? r_.weights[(rows_.row0 + query) * r_.weights_stride + head]
                        : 0;
    }
    if (r_.dim < kRowBytes) {
      for (int i = static_cast<int>(threadIdx.x); i < kStages * kTileBytes / 4; i += kThreads) {
        reinterpret_cast<unsigned*>(stages_)[i] = 0;
      }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
  }

  __device__ const std::byte* place(const std::byte* base, long long key, int bytes) const {
    if (rows_.table == nullptr) return base + key * bytes;
    const auto j = static_cast<unsigned>(key), page_size = static_cast<unsigned>(r_.page_size);
    return base + rows_.table[j / page_size] * r_.page_bytes + static_cast<long long>(j % page_size) * bytes;
  }

  __device__ void load_keys(int stage, long long first, long long end) const {
    const int units = r_.dim / kUnit;  // of a key
    const std::uint32_t to = ptx::smem_address(stages_ + stage * kTileBytes);
    for (int i = static_cast<int>(threadIdx.x); i < kKeys * units; i += kThreads) {
      const int row = i / units, byte = i % units * kUnit;
      const std::byte* key =
          place(r_.keys, min(first + row, end - 1), r_.table != nullptr ? r_.dim : key_bytes());
      copy_async<kUnit>(to + static_cast<std::uint32_t>(swizzled(row, byte)), key + byte);
    }
    if (threadIdx.x < kKeys) {
      copy_async<4>(ptx::smem_address(scales_ + stage * kKeys + threadIdx.x),
                    place(r_.scales, min(first + static_cast<int>(threadIdx.x), end - 1), 4));
    }
  }
  __device__ int key_bytes() const { return static_cast<int>(r_.key_bytes); }

  /// Starts the product of the keys in `stage` and the heads of tile `tile`.
  __device__ void multiply(float (&sums)[32], int stage, int tile) const {
    const std::uint64_t a = ptx::swizzled_descriptor(stages_ + stage * kTileBytes, 0, 1024);
    const std::uint64_t b = ptx::swizzled_descriptor(queries_ + tile * kTileBytes, 0, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kRowBytes / 32; ++step) {
      ptx::wgmma_e4m3(sums, ptx::advance(a, 2 * step), ptx::advance(b, 2 * step), step > 0);
    }
    ptx::wgmma_commit();
  }

  /// Adds this thread's heads of its two keys.
  __device__ void weigh(const float (&sums)[32], int tile, float& low, float& high) const {
    const auto* w = reinterpret_cast<const float2*>(weights_ + tile * kHeads) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 pair = w[4 * j];
      low += pair.x * positive(sums[4 * j]) + pair.y * positive(sums[4 * j + 1]);
      high += pair.x * positive(sums[4 * j + 2]) + pair.y * positive(sums[4 * j + 3]);
    }
  }

  __device__ void write(int query, long long first, long long end, int stage, float low, float high) const {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      low += __shfl_xor_sync(~0u, low, step);
      high += __shfl_xor_sync(~0u, high, step);
    }
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane % 4 > 1 || query >= rows_.rows) return;
    const int key = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4 + lane % 4 * 8;
    const long long j = first + key, begin = rows_.key_begin(query);
    if (j < begin || j >= min(rows_.key_end(query), end)) return;
    const long long column = p_.logits.compressed ? j - begin : j;
    if (column >= p_.logits.width) return;
    rows_.logits_of(query)[column] = (lane % 4 == 0 ? low : high) * scales_[stage * kKeys + key];
  }

  __device__ void score(long long begin, long long end) {
    const auto tiles = static_cast<int>((end - begin + kKeys - 1) / kKeys);
    for (int t = 0; t < kStages - 1; ++t) {
      if (t < tiles) load_keys(t, begin + t * kKeys, end);
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
    const int products = kRows * p_.head_tiles;
    for (int t = 0; t < tiles; ++t) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncthreads();  // the tile is there, and the last one has been read
      const int next = t + kStages - 1;
      if (next < tiles) load_keys(next % kStages, begin + static_cast<long long>(next) * kKeys, end);
      asm volatile("cp.async.commit_group;" ::: "memory");
      const int stage = t % kStages;
      const long long first = begin + static_cast<long long>(t) * kKeys;
      float low = 0, high = 0;
      for (int i = 0; i < products; ++i) {
        float sums[32];
        multiply(sums, stage, i);
        ptx::wgmma_wait<0>();
        finish(sums, i, stage, first, end, low, high);
      }
    }
  }
  __device__ void finish(const float (&sums)[32], int tile, int stage, long long first, long long end,
                         float& low, float& high) const {
    weigh(sums, tile, low, high);
    if ((tile + 1) % p_.head_tiles != 0) return;
    write(tile / p_.head_tiles, first, end, stage, low, high);
    low = high = 0;
  }

  const Params& p_;
  const indexer::Rows& r_;
  unsigned char *stages_, *queries_;
  float *scales_, *weights_;
  const BlockRows<kRows> rows_;
};

template <int kRows, int kUnit>
__global__ void __launch_bounds__(kThreads) score_keys(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Block<kRows, kUnit>(p, memory).run();
}

template <int kRows, int kUnit>
void launch_rows(const Params& p, long long groups, long long runs, cudaStream_t stream) {
  constexpr std::size_t kMost =
      kStages * kTileBytes + 1024 + std::size_t{kRows} * 2 * (kTileBytes + kHeads * 4);
  const std::size_t bytes = kStages * kTileBytes + 1024 +
                            static_cast<std::size_t>(kRows * p.head_tiles) * (kTileBytes + kHeads * 4);
  check(allow_shared_memory<score_keys<kRows, kUnit>>(kMost), "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(runs));
  check(launch(LaunchConfig(grid, kThreads, bytes, stream), score_keys<kRows, kUnit>, p), "index_logits");
}

__global__ void write_lengths(const __grid_constant__ indexer::Rows r, long long first, long long last,
                              int* lengths) {
  const long long row = first + blockIdx.x * 256ll + threadIdx.x;
  if (row >= last) return;
  const long long begin = r.key_begin != nullptr ? max(r.key_begin[row], 0) : 0;
  long long end = r.end_of_last_row ? r.key_end[row / r.rows_per_request] -
                                          (r.rows_per_request - 1 - row % r.rows_per_request)
                                    : r.key_end[row];
  end = min(end, static_cast<long long>(r.max_keys));
  lengths[row - first] = static_cast<int>(max(end - begin, 0ll));
}

/// Into how many runs to cut the keys of each group: of up to 8192 keys, and blocks that fill the places on the
/// multiprocessors a whole number of times, or nearly.
long long runs_of_tiles(long long groups, long long columns, long long places) {
  constexpr long long kMost = 8192;
  const long long rounds = (groups * columns + places * kMost - 1) / (places * kMost);
  return std::max<long long>(rounds * places / groups, (columns + 2 * kMost - 1) / (2 * kMost));
}

}  // namespace index_kernel

void index_logits(const indexer::Rows& rows, std::int64_t first, std::int64_t last,
                  const indexer::Logits& logits, void* stream) {
  using namespace index_kernel;
  if (first >= last) return;
  Params p{};
  p.rows = rows;
  p.logits = logits;
  p.first = first;
  p.last = last;
  p.head_tiles = (rows.heads + kHeads - 1) / kHeads;
  const bool paged = rows.table != nullptr;
  p.span = paged ? rows.rows_per_request : last - first;
  p.first_request = paged ? first / p.span : 0;
  const int together = p.span == 1 ? 1 : p.span == 2 ? 2 : 4;
  p.groups_of_span = (p.span + together - 1) / together;
  const long long spans = paged ? (last - 1) / p.span - p.first_request + 1 : 1;
  const long long groups = spans * p.groups_of_span;
  int multiprocessors_there = 0;
  check(multiprocessors(multiprocessors_there), "cudaDeviceGetAttribute");
  const long long columns = std::max<long long>({rows.max_keys, logits.clean ? logits.width : 0, 1});
  auto* on = static_cast<cudaStream_t>(stream);
  if (comes_in_tiles(p)) {
    const long long runs = runs_of_tiles(
        groups, columns, static_cast<long long>(multiprocessors_there) * blocks_of_tiles(together));
    p.run = (columns + runs - 1) / runs;
    p.run = std::max<long long>((p.run + kKeys - 1) / kKeys * kKeys, 256);
    while (columns / p.run >= 65535) p.run *= 2;
    return launch_tiles(p, together, groups, (columns + p.run - 1) / p.run, on);
  }
  // Enough blocks for all multiprocessors several times over, of 256 to 4096 keys.
  p.run = std::clamp<long long>(groups * columns / (multiprocessors_there * 20) / kKeys * kKeys, 256, 4096);
  while (columns / p.run >= 65535) p.run *= 2;
  const long long runs = (columns + p.run - 1) / p.run;
  const auto address = reinterpret_cast<std::uintptr_t>(rows.keys);
  const bool aligned = address % 16 == 0 && (paged ? rows.page_bytes : rows.key_bytes) % 16 == 0;
  const auto with_unit = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    aligned ? launch_rows<kRows, 16>(p, groups, runs, on) : launch_rows<kRows, 4>(p, groups, runs, on);
  };
  if (together == 1) {
    with_unit(std::integral_constant<int, 1>{});
  } else if (together == 2) {
    with_unit(std::integral_constant<int, 2>{});
  } else {
    with_unit(std::integral_constant<int, 4>{});
  }
}

void index_lengths(const indexer::Rows& rows, std::int64_t first, std::int64_t last, std::int32_t* lengths,
                   void* stream) {
  const dim3 grid(static_cast<unsigned>((last - first + 255) / 256));
  check(launch(LaunchConfig(grid, 256, 0, static_cast<cudaStream_t>(stream)), index_kernel::write_lengths,
               rows, static_cast<long long>(first), static_cast<long long>(last), lengths),
        "index_lengths");
}

}  // namespace flash_mla::sm90
