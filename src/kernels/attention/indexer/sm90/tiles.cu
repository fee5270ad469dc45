// The indexer's logits where keys come as tiles of 64: relu of products of e4m3, weighted and summed over heads.
//
// Tile:      64 keys x 32 or 64 heads x 128, for 1, 2 or 4 query tokens that share the keys. A product is four wgmma with
//            the keys as A, in registers, which all query tokens share.
// Threads:   two warpgroups that take tiles in turn, each of which brings its own; two or three blocks a multiprocessor.
// Memory:    queries, 8 KB for 64 heads; a ring of 8 tiles of keys (8 KB) and their scales; weights.
// Registers: 128 a thread (one query token: 80): keys 16, the sums of two products 64.
//
// A tile lies in one piece, in one page or in the array of keys: two bulk copies bring it. A thread reads 32 bytes of a
// key's 128, which are 8 of each instruction's 32 bytes of k; queries lie in shared memory in that order of k.
// While the sums of one query token are weighed the product of the next is under way. Four lanes hold the heads of a key;
// their sums meet in a fixed order, so that a logit's bits depend on its row and key alone.

#include <cstdint>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/indexer/sm90/params.cuh"
#include "kernels/attention/indexer/sm90/tiles.h"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma_e4m3.cuh"
#include "kernels/ptx/words.cuh"

namespace flash_mla::sm90::index_kernel {
namespace {

constexpr int kKeys = 64, kRowBytes = 128;
constexpr int kTileBytes = kKeys * kRowBytes;
constexpr int kGroups = 2;  // warpgroups that score
constexpr int kThreads = kGroups * 128;
constexpr int kStages = 8;

template <int kRows, int kHeads>
struct alignas(1024) Smem {
  unsigned char queries[kRows][kHeads * kRowBytes];
  unsigned char keys[kStages][kTileBytes];
  float scales[kStages][kKeys];
  float weights[kRows][kHeads];
  std::uint64_t full[kStages], empty[kStages];
};

template <int kRows, int kHeads>
struct Tiles {
  static constexpr int kSums = kHeads / 2;
  using S = Smem<kRows, kHeads>;

  const BlockRows<kRows>& rows;
  S& s;
  const int first_tile, tiles;  // in tiles of 64 keys

  /// Where tile t begins, in bytes from the first page: of its keys, or of its scales, each of that many bytes.
  __device__ long long place_of(int t, int bytes) const {
    const indexer::Rows& r = rows.p.rows;
    const long long key = static_cast<long long>(first_tile + t) * kKeys;
    if (rows.table == nullptr) return key * bytes;
    const auto j = static_cast<unsigned>(key), page_size = static_cast<unsigned>(r.page_size);
    return rows.table[j / page_size] * r.page_bytes + static_cast<long long>(j % page_size) * bytes;
  }

  // ---- bringing tiles, by one thread of the warpgroup that scores them

  __device__ void bring(int t) const {
    const indexer::Rows& r = rows.p.rows;
    const int stage = t % kStages;
    const long long keys = place_of(t, kRowBytes), scales = place_of(t, 4);
    // Of an array of keys the last tile may be cut.
    const long long left =
        rows.table != nullptr ? kKeys : r.max_keys - static_cast<long long>(first_tile + t) * kKeys;
    const int count = static_cast<int>(min(left, static_cast<long long>(kKeys))), copied = count / 4 * 4;
    ptx::mbarrier_wait(&s.empty[stage], (t / kStages & 1) ^ 1);
    // Scales that make no 16 bytes, by hand, ahead of the arrival.
    for (int i = copied; i < count; ++i)
      s.scales[stage][i] = *reinterpret_cast<const float*>(r.scales + scales + 4 * i);
    ptx::mbarrier_arrive_expect_tx(&s.full[stage],
                                   static_cast<std::uint32_t>(count * kRowBytes + copied * 4));
    ptx::bulk_load(s.keys[stage], r.keys + keys, static_cast<std::uint32_t>(count * kRowBytes),
                   &s.full[stage]);
    if (copied > 0)
      ptx::bulk_load(s.scales[stage], r.scales + scales, static_cast<std::uint32_t>(copied * 4),
                     &s.full[stage]);
  }
  // The first tiles of a warpgroup.
  __device__ void bring_first(int group) const {
    for (int t = group; t < min(tiles, kStages); t += kGroups) bring(t);
  }

  // ---- queries and weights, by all threads; zeros where there is no head

  __device__ void load_queries() const {
    const indexer::Rows& r = rows.p.rows;
    constexpr int kUnits = kRows * kHeads * (kRowBytes / 16);
    for (int i = static_cast<int>(threadIdx.x); i < kUnits; i += kThreads) {
      const int query = i / (kHeads * 8), head = i / 8 % kHeads, c = i % 8 / 2, half = i % 2;
      uint4 x{0, 0, 0, 0};
      if (query < rows.rows && head < r.heads)
        x = __ldg(reinterpret_cast<const uint4*>(query_of(query) + head * kRowBytes + 32 * c + 16 * half));
      // Byte 32 c + 8 t + 4 h + e of a row is k = 16 h + 4 c + e of instruction t.
      const std::uint32_t row = ptx::smem_address(s.queries[query]) + head * kRowBytes, turn = head % 8 * 16;
      ptx::store_shared_4(row + ((64 * half) ^ turn) + 4 * c, x.x);
      ptx::store_shared_4(row + ((64 * half + 16) ^ turn) + 4 * c, x.y);
      ptx::store_shared_4(row + ((64 * half + 32) ^ turn) + 4 * c, x.z);
      ptx::store_shared_4(row + ((64 * half + 48) ^ turn) + 4 * c, x.w);
    }
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kHeads; i += kThreads) {
      const int query = i / kHeads, head = i % kHeads;
      s.weights[query][head] = query < rows.rows && head < r.heads
                                   ? r.weights[(rows.row0 + query) * r.weights_stride + head]
                                   : 0.0f;
    }
    ptx::fence_async_proxy();
  }
  __device__ const std::byte* query_of(int query) const {
    const indexer::Rows& r = rows.p.rows;
    const long long at = rows.row0 + query;
    return r.q + at / r.rows_per_request * r.q_request_bytes + at % r.rows_per_request * r.q_row_bytes;
  }

  // ---- the warpgroups that score

  /// Of two keys, g and g + 8 of a warp's 16: the bytes 32 c to 32 c + 31, as A of the four instructions.
  struct Keys {
    std::uint32_t a[4][4];
    float low_scale, high_scale;
  };
  __device__ void load_keys(Keys& k, int stage) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, c = lane % 4;
    const int row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + g;
    // Lanes of odd rows load their second 16 bytes first: eight lanes hit all banks.
    const bool odd = g % 2 != 0;
    const std::uint32_t from = ptx::smem_address(s.keys[stage]) + row * kRowBytes + 32 * c + (odd ? 16 : 0);
    const std::uint32_t other = odd ? from - 16 : from + 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto x = ptx::load_shared<uint4>(from + h * 8 * kRowBytes),
                 y = ptx::load_shared<uint4>(other + h * 8 * kRowBytes);
      k.a[0][h] = odd ? y.x : x.x;
      k.a[0][h + 2] = odd ? y.y : x.y;
      k.a[1][h] = odd ? y.z : x.z;
      k.a[1][h + 2] = odd ? y.w : x.w;
      k.a[2][h] = odd ? x.x : y.x;
      k.a[2][h + 2] = odd ? x.y : y.y;
      k.a[3][h] = odd ? x.z : y.z;
      k.a[3][h + 2] = odd ? x.w : y.w;
    }
    k.low_scale = s.scales[stage][row];
    k.high_scale = s.scales[stage][row + 8];
  }

  __device__ void multiply(float (&sums)[kSums], const Keys& k, int query) const {
    const std::uint64_t b = ptx::swizzled_descriptor(s.queries[query], 0, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      ptx::wgmma_e4m3(sums, k.a[step], ptx::advance(b, 2 * step), step > 0);
    ptx::wgmma_commit();
  }
  /// This thread's heads of its two keys.
  __device__ void weigh(const float (&sums)[kSums], int query, float& low, float& high) const {
    const auto* w = reinterpret_cast<const float2*>(s.weights[query]) + threadIdx.x % 4;
    low = high = 0.0f;
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      const float2 pair = w[4 * j];
      low += pair.x * positive(sums[4 * j]);
      high += pair.x * positive(sums[4 * j + 2]);
      low += pair.y * positive(sums[4 * j + 1]);
      high += pair.y * positive(sums[4 * j + 3]);
    }
  }

  /// What of a tile's logits a lane writes: of one query token its two keys, or of one alone that key's.
  struct Target {
    int query, begin, end;  // keys of the row
    float* out;             // of key 0
    bool has_low, has_high;
  };
  __device__ Target target() const {
    const int c = static_cast<int>(threadIdx.x) % 4;
    Target to{};
    to.query = kRows == 4 ? c % 2 * 2 + c / 2 : kRows == 2 ? c % 2 : 0;
    to.has_low = kRows == 4 || (kRows == 2 ? c / 2 == 0 : c == 0);
    to.has_high = kRows == 4 || (kRows == 2 ? c / 2 == 1 : c == 1);
    if (to.query >= rows.rows) return to;
    const auto begin = rows.key_begin(to.query);
    to.begin = static_cast<int>(begin);
    to.end = static_cast<int>(min(rows.key_end(to.query), rows.run_end));
    const long long shift = rows.p.logits.compressed ? begin : 0;
    to.end = static_cast<int>(min(static_cast<long long>(to.end), rows.p.logits.width + shift));
    to.out = rows.logits_of(to.query) - shift;
    return to;
  }
  /// Adds up what four lanes have: low and high of every query token. Each lane keeps what it writes.
  __device__ static float2 gather(const float (&low)[kRows], const float (&high)[kRows]) {
    const int c = static_cast<int>(threadIdx.x) % 4;
    const bool odd = c % 2 != 0, late = c / 2 != 0;
    const auto trade = [](float mine, float other, int mask) {
      return mine + __shfl_xor_sync(~0u, other, mask);
    };
    if constexpr (kRows == 4) {
      const float a = trade(odd ? low[2] : low[0], odd ? low[0] : low[2], 1),
                  b = trade(odd ? high[2] : high[0], odd ? high[0] : high[2], 1),
                  d = trade(odd ? low[3] : low[1], odd ? low[1] : low[3], 1),
                  e = trade(odd ? high[3] : high[1], odd ? high[1] : high[3], 1);
      return {trade(late ? d : a, late ? a : d, 2), trade(late ? e : b, late ? b : e, 2)};
    } else if constexpr (kRows == 2) {
      const float a = trade(odd ? low[1] : low[0], odd ? low[0] : low[1], 1),
                  b = trade(odd ? high[1] : high[0], odd ? high[0] : high[1], 1);
      const float sum = trade(late ? b : a, late ? a : b, 2);
      return {sum, sum};
    } else {
      const float a = trade(odd ? high[0] : low[0], odd ? low[0] : high[0], 1);
      const float sum = trade(a, a, 2);
      return {sum, sum};
    }
  }

  __device__ void score(int group) const {
    const bool brings = threadIdx.x % 128 == 0;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int own = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
    const Target to = target();
    for (int t = group; t < tiles; t += kGroups) {
      const int stage = t % kStages;
      Keys k;
      ptx::mbarrier_wait(&s.full[stage], t / kStages & 1);
      load_keys(k, stage);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&s.empty[stage]);
      // The place of the tile before is free by now, or nearly.
      if (brings && t >= kGroups && t - kGroups + kStages < tiles) bring(t - kGroups + kStages);
      __syncwarp();
      float sums[2][kSums], low[kRows], high[kRows];
      multiply(sums[0], k, 0);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i + 1 < kRows) {
          multiply(sums[(i + 1) % 2], k, i + 1);
          ptx::wgmma_wait<1>();
        } else {
          ptx::wgmma_wait<0>();
        }
        weigh(sums[i % 2], i, low[i], high[i]);
      }
      const float2 sum = gather(low, high);
      const int key = (first_tile + t) * kKeys + own;
      if (to.has_low && key >= to.begin && key < to.end) to.out[key] = sum.x * k.low_scale;
      if (to.has_high && key + 8 >= to.begin && key + 8 < to.end) to.out[key + 8] = sum.y * k.high_scale;
    }
  }
};

template <int kRows, int kHeads>
__global__ void __launch_bounds__(kThreads, blocks_of_tiles(kRows))
    score_tiles(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& s = *reinterpret_cast<Smem<kRows, kHeads>*>(memory);
  const BlockRows<kRows> rows(p);
  if (rows.rows <= 0) return;
  rows.clean();
  long long begin, end;
  rows.find_keys(begin, end);
  if (begin >= end) return;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      ptx::mbarrier_init(&s.empty[i], 4);
    }
    ptx::fence_barrier_init();
  }
  const auto first_tile = static_cast<int>(begin / kKeys);
  const Tiles<kRows, kHeads> tiles{rows, s, first_tile,
                                   static_cast<int>((end + kKeys - 1) / kKeys) - first_tile};
  // The same in all lanes, and known to be.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  __syncthreads();
  if (threadIdx.x % 128 == 0) tiles.bring_first(group);
  tiles.load_queries();
  __syncthreads();
  tiles.score(group);
}

template <int kRows, int kHeads>
void launch(const Params& p, long long groups, long long runs, cudaStream_t stream) {
  constexpr auto kKernel = score_tiles<kRows, kHeads>;
  constexpr std::size_t kBytes = sizeof(Smem<kRows, kHeads>);
  check(allow_shared_memory<kKernel>(kBytes), "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(runs));
  check(flash_mla::launch(LaunchConfig(grid, kThreads, kBytes, stream), kKernel, p), "score_tiles");
}

template <int kRows>
void launch_heads(const Params& p, long long groups, long long runs, cudaStream_t stream) {
  (p.rows.heads <= 32 ? launch<kRows, 32> : launch<kRows, 64>)(p, groups, runs, stream);
}

}  // namespace

bool comes_in_tiles(const Params& p) {
  const indexer::Rows& r = p.rows;
  const auto aligned = [](const void* at) { return reinterpret_cast<std::uintptr_t>(at) % 16 == 0; };
  const bool whole =
      r.table == nullptr ? r.key_bytes == kRowBytes : r.page_bytes % 16 == 0 && r.page_size % kKeys == 0;
  return whole && r.dim == kRowBytes && r.heads <= 64 && r.scales != nullptr &&
         r.max_keys < INT32_MAX - kKeys && aligned(r.keys) && aligned(r.scales) && aligned(r.q) &&
         r.q_request_bytes % 16 == 0 && r.q_row_bytes % 16 == 0;
}

void launch_tiles(const Params& p, int together, long long groups, long long runs, cudaStream_t stream) {
  (together == 1   ? launch_heads<1>
   : together == 2 ? launch_heads<2>
                   : launch_heads<4>)(p, groups, runs, stream);
}

}  // namespace flash_mla::sm90::index_kernel
