#pragma once

// Attention over keys and values of their own on Hopper, for decoding and few queries: bound by reading keys and values.
//
// Tile:      16 query rows (the heads of a group, of one or more queries) by 16 keys, 32 of short heads; products are
//            m16n8k16.
// Threads:   4 warps, each with every fourth tile of keys, a ring of its own that it fills itself by asynchronous copies, and
//            a softmax of its own; no barrier but at the end of an item, where the four results are added up.
// Memory:    queries, then for each warp 3 to 8 stages of a tile of keys and values: see Shape. 100 to 150 KB are under way on a
//            multiprocessor while the rest is computed on.
// Registers: 4 times d_v / 8 for the output, d_qk / 4 for the queries where d_qk is at most 128; else they are read again.
//
// Grid:      (blocks of 16 rows, key heads, parts of the schedule or sequences).

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "base/element.h"
#include "kernels/attention/gqa/sm90/params.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/words.cuh"
#include "schedule/walk.h"

namespace flash_mla::sm90::gqa {

using flash_mla::gqa::Range;

inline constexpr float kMaxGrowth = 8.0f;  ///< of scores over the softmax's reference, base 2

extern __shared__ std::byte dynamic_smem[];

struct Tables {
  const Params& p;

  __device__ static constexpr int block_size() { return kBlockTokens; }
  __device__ int fixed_split_blocks() const { return p.split_blocks; }
  __device__ int length(int req) const { return static_cast<int>(p.problem.keys(req)); }
  __device__ int splits_before(int req) const { return p.num_splits[req]; }
  __device__ int begin_split() const { return p.parts[static_cast<std::int64_t>(blockIdx.z) * 8 + 4]; }
  __device__ int slot(int req, int before, int split, bool) const {
    return static_cast<int>(p.slot(req, before, split));
  }
};

/// A piece of work: keys [begin, end) of a sequence, for this CTA's rows.
struct Item {
  int req, queries, keys;
  int begin, end;
  int slot;  ///< of the partial result; -1: straight to out
};

/// A row of this CTA's block.
struct Row {
  int query, head;  ///< head of all
  bool valid;
};
__device__ __forceinline__ Row row_of(const Problem& p, const Item& item, int r) {
  const int row = static_cast<int>(blockIdx.x) * kTileRows + r;
  const int query = row / p.group;
  return {query, static_cast<int>(blockIdx.y) * p.group + row - query * p.group, query < item.queries};
}

/// What a row may see, and what its scores are changed by.
struct RowRules {
  int begin, end, position, query;
  float slope;
};
__device__ __forceinline__ RowRules rules_of(const Problem& p, const Item& item, int r) {
  const Row row = row_of(p, item, r);
  if (!row.valid) return {0, 0, 0, 0, 0.0f};
  const Range seen = p.visible(row.query, item.queries, item.keys);
  return {static_cast<int>(seen.begin), static_cast<int>(seen.end), item.keys - item.queries + row.query,
          row.query, p.slopes != nullptr ? p.slopes[row.head] : 0.0f};
}

template <class T, int kDqk, int kDv>
struct Worker {
  using S = Shape<kDqk, kDv>;
  static constexpr bool kBf16 = std::is_same_v<T, Bf16>;
  static constexpr bool kQueriesInRegisters = kDqk <= 128;
  static constexpr int kKeyChunks = kDqk / 8, kValueChunks = kDv / 8;  // of 16 bytes

  static constexpr int kTileKeys = S::kTileKeys, kStep = kWarps * kTileKeys;

  struct TilePlace {
    int page, offset;
  };

  const Params& params;
  const Problem& p;
  int warp, lane;
  std::uint32_t queries, stats, ring;  // shared memory
  float out[kDv / 8][4];
  float reference[2], sum[2];  // of the softmax, base 2; -inf until a key has been seen
  std::uint32_t q[kQueriesInRegisters ? kDqk / 16 : 1][4];
  // Of the item's copies: where its keys lie, and the next tile.
  const std::int32_t* pages;
  int first_page, to_fetch, fill;
  TilePlace place{0, 0};
  bool linear;  // a tile's rows are one token stride apart

  __device__ explicit Worker(const Params& given)
      : params(given),
        p(given.problem),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32) {
    queries = ptx::smem_address(dynamic_smem);
    stats = queries + S::kQueryBytes;
    ring = stats + S::kStatsBytes + static_cast<std::uint32_t>(warp * S::kStages * S::kStageBytes);
  }

  /// The item's queries into shared memory, zeros for rows that are none.
  __device__ void load_queries(const Item& item) {
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kKeyChunks; i += kThreads) {
      const int r = i / kKeyChunks, chunk = i % kKeyChunks;
      const Row row = row_of(p, item, r);
      const T* from = static_cast<const T*>(p.q);
      if (row.valid) {
        from += (p.first_query(item.req) + row.query) * p.q_strides.token + row.head * p.q_strides.head +
                8 * chunk;
      }
      const uint4 x = row.valid ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
      ptx::store_shared_16(queries + static_cast<std::uint32_t>(r * S::kKeyPitch + 16 * chunk), x);
    }
    __syncthreads();
    if constexpr (kQueriesInRegisters) {
#pragma unroll
      for (int k = 0; k < kDqk / 16; ++k) load_query(k, q[k]);
    }
  }
  __device__ void load_query(int k, std::uint32_t (&to)[4]) const {
    ldmatrix_x4(to,
                queries + static_cast<std::uint32_t>(lane % 16 * S::kKeyPitch + 32 * k + 16 * (lane / 16)));
  }

  /// What a tile's rows are found by: its first key's place where its rows lie `token` strides apart, else lane l has that
  /// of key l % kTileKeys.
  __device__ TilePlace locate(const Item& item, int tile) const {
    // A place that is there, whatever the tile: what lies past the item is not copied.
    const int key = min(linear ? tile : tile + lane % kTileKeys, item.end - 1);
    if (p.table == nullptr) return {first_page, key};
    const int page = key / p.page_size;
    return {pages[page], key - page * p.page_size};
  }

  /// Asks for the `count` keys and values of a tile.
  __device__ void fetch(const TilePlace& at, int count, int stage) const {
    const std::uint32_t keys = ring + static_cast<std::uint32_t>(stage * S::kStageBytes);
    const int head = static_cast<int>(blockIdx.y);
    const auto offset = [&](const flash_mla::gqa::Strides& s) {
      return at.page * s.page + at.offset * s.token + head * s.head;
    };
    copy_rows<kKeyChunks, S::kKeyPitch>(static_cast<const T*>(p.k), offset(p.k_strides), p.k_strides.token,
                                        count, keys);
    copy_rows<kValueChunks, S::kValuePitch>(static_cast<const T*>(p.v), offset(p.v_strides),
                                            p.v_strides.token, count, keys + kTileKeys * S::kKeyPitch);
  }
  template <int kChunks, int kPitch>
  __device__ void copy_rows(const T* data, std::int64_t offset, std::int64_t token, int count,
                            std::uint32_t to) const {
    constexpr int kCopies = kTileKeys * kChunks / 32;
    if (linear) {
      if constexpr (32 % kChunks == 0) {
        constexpr int kRows = 32 / kChunks;
        const int row = lane / kChunks, chunk = lane % kChunks;
        const T* from = data + offset + row * token + 8 * chunk;
        to += static_cast<std::uint32_t>(row * kPitch + 16 * chunk);
#pragma unroll
        for (int i = 0; i < kCopies; ++i, from += kRows * token) {
          ptx::cp_async_16(to + i * kRows * kPitch, from, row + i * kRows < count ? 16 : 0);
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
      const std::int64_t at = linear ? offset + row * token : __shfl_sync(0xFFFFFFFFu, offset, row);
      ptx::cp_async_16(to + static_cast<std::uint32_t>(row * kPitch + 16 * chunk), data + at + 8 * chunk,
                       row < count ? 16 : 0);
    }
  }

  /// Scores of this thread's rows, lane / 4 and eight below: columns 8 n + 2 (lane % 4) and the next.
  __device__ void products(std::uint32_t keys, float (&s)[kTileKeys / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
    }
    const std::uint32_t at =
        keys + static_cast<std::uint32_t>((lane % 8 + lane / 16 * 8) * S::kKeyPitch + 16 * (lane / 8 % 2));
#pragma unroll
    for (int k = 0; k < kDqk / 16; ++k) {
      std::uint32_t a[4];
      if constexpr (kQueriesInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = q[k][i];
      } else {
        load_query(k, a);
      }
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; n += 2) {
        std::uint32_t b[4];
        ldmatrix_x4(b, at + 32 * k + n * 8 * S::kKeyPitch);
        ptx::mma_m16n8k16<kBf16>(s[n], a, b[0], b[1]);
        ptx::mma_m16n8k16<kBf16>(s[n + 1], a, b[2], b[3]);
      }
    }
  }

  /// A score in base 2 as the softmax takes it, -inf where the row does not see the key.
  __device__ float ruled(float x, const Item& item, const RowRules& rules, int key) const {
    bool seen = key >= rules.begin && key < rules.end;
    if (p.mask != nullptr && seen) seen = p.unmasked(item.req, rules.query, key, item.keys);
    if (!seen) return -__uint_as_float(0x7F800000);
    if (p.soft_cap > 0.0f) {
      // tanh(y) = 1 - 2 / (e^(2 y) + 1)
      const float y = x * p.scale * (2.0f * 1.44269504f / p.soft_cap);
      x = p.soft_cap * (1.0f - 2.0f / (exp2f(y) + 1.0f)) * 1.44269504f;
    } else {
      x *= params.scale_log2;
    }
    if (p.slopes != nullptr) x -= rules.slope * static_cast<float>(abs(key - rules.position)) * 1.44269504f;
    return x;
  }

  /// kPlain: all rows see all keys of the tile, and scores are only scaled.
  template <bool kPlain>
  __device__ void attend(const Item& item, const RowRules (&rules)[2], int tile, int stage) {
    const std::uint32_t keys = ring + static_cast<std::uint32_t>(stage * S::kStageBytes);
    const float minus_infinity = -__uint_as_float(0x7F800000), scale = kPlain ? params.scale_log2 : 1.0f;
    float s[kTileKeys / 8][4], shrink[2];
    products(keys, s);
    std::uint32_t weights[kTileKeys / 16][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float best = minus_infinity;
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[n][2 * h + i];
          if constexpr (!kPlain) x = ruled(x, item, rules[h], tile + 8 * n + 2 * (lane % 4) + i);
          best = fmaxf(best, x);
        }
      }
      best = quad_max(best) * scale;
      // The reference moves only where scores grow by much, so that the output is seldom rescaled.
      const bool moves = best > reference[h] + kMaxGrowth;
      shrink[h] = moves ? exp2_fast(reference[h] - best) : 1.0f;
      reference[h] = moves ? best : reference[h];
      // A row that has seen no key yet: subtract 0, so that -inf - -inf never arises.
      const float base = reference[h] == minus_infinity ? 0.0f : reference[h];
      sum[h] *= shrink[h];
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
        const float a = exp2_fast(fmaf(s[n][2 * h], scale, -base));
        const float b = exp2_fast(fmaf(s[n][2 * h + 1], scale, -base));
        sum[h] += a + b;
        weights[n / 2][n % 2 * 2 + h] = pack2<kBf16>(a, b);
      }
    }
    if (__any_sync(0xFFFFFFFFu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kDv / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= shrink[i / 2];
      }
    }
    const std::uint32_t values = keys + kTileKeys * S::kKeyPitch +
                                 static_cast<std::uint32_t>(lane % 16 * S::kValuePitch + 16 * (lane / 16));
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
#pragma unroll
      for (int c = 0; c < kDv / 16; ++c) {
        std::uint32_t b[4];
        ldmatrix_x4_transposed(b, values + k * 16 * S::kValuePitch + 32 * c);
        ptx::mma_m16n8k16<kBf16>(out[2 * c], weights[k], b[0], b[1]);
        ptx::mma_m16n8k16<kBf16>(out[2 * c + 1], weights[k], b[2], b[3]);
      }
    }
  }

  /// Asks for this warp's next tile, if there is one.
  __device__ void fetch_next(const Item& item) {
    if (to_fetch < item.end) {
      fetch(place, item.end - to_fetch, fill);
      to_fetch += kStep;
      place = locate(item, to_fetch);  // long before it is needed
      fill = fill + 1 == S::kStages ? 0 : fill + 1;
    }
    ptx::cp_async_commit();
  }

  /// Asks for this warp's first tiles.
  __device__ void start(const Item& item, int begin) {
    linear = p.table == nullptr || p.page_size % kTileKeys == 0;
    if (p.table != nullptr) {
      pages = p.pages(item.req);
    } else {
      first_page = p.cu_k != nullptr ? p.cu_k[item.req] : item.req;
    }
    to_fetch = begin + warp * kTileKeys;
    fill = 0;
    if (to_fetch < item.end) place = locate(item, to_fetch);
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) fetch_next(item);
  }

  /// This warp's tiles of the item's keys. All rows see the keys [plain_begin, plain_end), and need no more than scaling.
  __device__ void walk(const Item& item, int begin, int plain_begin, int plain_end) {
    const float minus_infinity = -__uint_as_float(0x7F800000);
    reference[0] = reference[1] = minus_infinity;
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    }
    const RowRules rules[2] = {rules_of(p, item, lane / 4), rules_of(p, item, lane / 4 + 8)};
    int stage = 0;
#pragma unroll 1
    for (int tile = begin + warp * kTileKeys; tile < item.end; tile += kStep) {
      ptx::cp_async_wait<S::kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled next
      fetch_next(item);
      if (tile >= plain_begin && tile + kTileKeys <= plain_end) {
        attend<true>(item, rules, tile, stage);
      } else {
        attend<false>(item, rules, tile, stage);
      }
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }
    ptx::cp_async_wait<0>();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 2);
    }
  }

  /// Adds up the warps' results and stores them.
  __device__ void finish(const Item& item) {
    const float infinity = __uint_as_float(0x7F800000);
    const std::uint32_t maxima = stats, sums = stats + kWarps * kTileRows * 4;
    if (lane % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto at = static_cast<std::uint32_t>(4 * (warp * kTileRows + lane / 4 + 8 * h));
        ptx::store_shared_4(maxima + at, __float_as_uint(reference[h]));
        ptx::store_shared_4(sums + at, __float_as_uint(sum[h]));
      }
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = lane / 4 + 8 * h;
      float best = -infinity;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        best = fmaxf(best,
                     ptx::load_shared<float>(maxima + static_cast<std::uint32_t>(4 * (w * kTileRows + r))));
      }
      const float shrink = exp2_fast(reference[h] - (best == -infinity ? 0.0f : best));
#pragma unroll
      for (int n = 0; n < kDv / 8; ++n) {
        const auto at = ring + static_cast<std::uint32_t>(4 * (r * S::kOutPitch + 8 * n + 2 * (lane % 4)));
        ptx::store_shared_4(at, __float_as_uint(out[n][2 * h] * shrink));
        ptx::store_shared_4(at + 4, __float_as_uint(out[n][2 * h + 1] * shrink));
      }
    }
    __syncthreads();
    store(item, maxima, sums);
    __syncthreads();  // shared memory is the next item's
  }

  // Eight threads a row, four columns each at a time.
  __device__ void store(const Item& item, std::uint32_t maxima, std::uint32_t sums) {
    const float infinity = __uint_as_float(0x7F800000);
    const int r = static_cast<int>(threadIdx.x) / 8, first = static_cast<int>(threadIdx.x) % 8;
    const Row row = row_of(p, item, r);
    if (!row.valid) return;
    float best = -infinity, total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      best =
          fmaxf(best, ptx::load_shared<float>(maxima + static_cast<std::uint32_t>(4 * (w * kTileRows + r))));
    }
    const float base = best == -infinity ? 0.0f : best;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const auto at = static_cast<std::uint32_t>(4 * (w * kTileRows + r));
      total += ptx::load_shared<float>(sums + at) * exp2_fast(ptx::load_shared<float>(maxima + at) - base);
    }
    const float lse = total == 0.0f ? -infinity : best + log2f(total);
    const bool to_slot = item.slot >= 0;
    float factor = total == 0.0f ? 0.0f : 1.0f / total;
    if (!to_slot) factor *= sink_factor(p, row.head, lse);
    const std::uint32_t rings = stats + S::kStatsBytes;
    const std::int64_t slot_row =
        (static_cast<std::int64_t>(item.slot) * params.max_queries + row.query) * p.h_q + row.head;
    const bool is_nan =
        !to_slot && lse == -infinity && sees_a_key(p, item.req, row.query, item.queries, item.keys);
#pragma unroll
    for (int c = 4 * first; c < kDv; c += 32) {
      float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const auto v = ptx::load_shared<float4>(
            rings + static_cast<std::uint32_t>(w * S::kStages * S::kStageBytes + 4 * (r * S::kOutPitch + c)));
        x[0] += v.x;
        x[1] += v.y;
        x[2] += v.z;
        x[3] += v.w;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = is_nan ? __uint_as_float(0x7FC00000) : x[i] * factor;
      if (to_slot) {
        *reinterpret_cast<float4*>(params.partial_out + slot_row * kDv + c) = {x[0], x[1], x[2], x[3]};
      } else {
        T* to = static_cast<T*>(p.out) + (p.first_query(item.req) + row.query) * p.out_strides.token +
                row.head * p.out_strides.head + c;
        *reinterpret_cast<uint2*>(to) = {pack2<kBf16>(x[0], x[1]), pack2<kBf16>(x[2], x[3])};
      }
    }
    if (first != 0) return;
    if (to_slot) {
      params.partial_lse[slot_row] = lse;
    } else {
      store_lse(p, item.req, row.query, row.head, lse, is_nan);
    }
  }

  /// What a sink leaves of the output of a row with this log2 of its sum.
  __device__ static float sink_factor(const Problem& p, int head, float lse) {
    if (p.sinks == nullptr) return 1.0f;
    return 1.0f / (1.0f + exp2f(p.sinks[head] * 1.44269504f - lse));
  }
  __device__ static void store_lse(const Problem& p, int req, int query, int head, float lse, bool is_nan) {
    if (p.lse == nullptr) return;
    const float infinity = __uint_as_float(0x7F800000);
    float natural = lse * 0.693147181f;
    if (lse == -infinity) natural = is_nan ? __uint_as_float(0x7FC00000) : infinity;
    p.lse[head * p.lse_head_stride + (p.first_query(req) + query) * p.lse_token_stride] = natural;
  }
  /// A row whose weights add up to 0 sees no key, and is 0; or all its scores are -inf, and it is NaN.
  __device__ static bool sees_a_key(const Problem& p, int req, int query, int queries_of, int keys_of) {
    const Range seen = p.visible(query, queries_of, keys_of);
    for (std::int64_t j = seen.begin; j < seen.end; ++j) {
      if (p.unmasked(req, query, j, keys_of)) return true;
    }
    return false;
  }

  __device__ void run(Item item) {
    item.queries = static_cast<int>(p.queries(item.req));
    const int first_row = static_cast<int>(blockIdx.x) * kTileRows;
    if (first_row >= item.queries * p.group) return;
    // The block's first query sees the earliest keys, its last the latest.
    const int last_query = min((first_row + kTileRows - 1) / p.group, item.queries - 1);
    const int least = static_cast<int>(p.visible(first_row / p.group, item.queries, item.keys).begin);
    const int most = static_cast<int>(p.visible(last_query, item.queries, item.keys).end);
    const bool ruled_all = p.mask != nullptr || p.slopes != nullptr || p.soft_cap > 0.0f;
    const int plain_begin = static_cast<int>(p.visible(last_query, item.queries, item.keys).begin);
    const int plain_end =
        ruled_all ? 0 : static_cast<int>(p.visible(first_row / p.group, item.queries, item.keys).end);
    item.end = min(item.end, most);
    const int begin = max(item.begin, least / kTileKeys * kTileKeys);
    start(item, begin);
    load_queries(item);
    walk(item, begin, plain_begin, min(plain_end, item.end));
    finish(item);
  }
};

template <class T, int kDqk, int kDv>
__global__ void __launch_bounds__(kThreads, Shape<kDqk, kDv>::kCtas)
    attention_kernel(const __grid_constant__ Params params) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  Worker<T, kDqk, kDv> worker(params);
  if (params.parts == nullptr) {
    const int req = static_cast<int>(blockIdx.z), keys = static_cast<int>(params.problem.keys(req));
    worker.run({req, 0, keys, 0, keys, -1});
    return;
  }
  const int4 row = reinterpret_cast<const int4*>(params.parts)[2 * static_cast<std::int64_t>(blockIdx.z)];
  const PartRange part = part_range<int>(row.x, row.y, row.z, row.w, params.token_rows, kBlockTokens);
  if (part.begin_req >= params.problem.batch) return;
  const PartWalk<int, Tables> walk{part, {params}};
  for (auto item = walk.first(); walk.holds(item); item = walk.next(item)) {
    worker.run({item.req, 0, item.length, item.begin_block * kBlockTokens,
                min(item.end_block * kBlockTokens, item.length), item.is_split ? item.slot : -1});
  }
}

/// Combines the splits of sequence blockIdx.y's rows blockIdx.x, blockIdx.x + gridDim.x, ...: a row at a time, every warp
/// with every fourth split.
template <class T, int kDqk, int kDv>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Params params) {
  using W = Worker<T, kDqk, kDv>;
  static_assert(kDv <= 2 * kThreads && kDv % 32 == 0);
  // Shared memory: the warps' outputs, their maxima, their sums.
  float* const shared_out = reinterpret_cast<float*>(dynamic_smem);
  float *const shared_best = shared_out + kWarps * kDv, *const shared_sum = shared_best + kWarps;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const Problem& p = params.problem;
  const float infinity = __uint_as_float(0x7F800000);
  const int req = static_cast<int>(blockIdx.y), before = params.num_splits[req],
            n = params.num_splits[req + 1] - before;
  if (n <= 1) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int queries = static_cast<int>(p.queries(req)), rows = queries * p.h_q;
  for (int row = static_cast<int>(blockIdx.x); row < rows; row += static_cast<int>(gridDim.x)) {
    const auto slot_row = [&](int split) {
      return static_cast<std::int64_t>(params.slot(req, before, split)) * params.max_queries * p.h_q + row;
    };
    float best = -infinity;
    for (int s = warp; s < n; s += kWarps) best = fmaxf(best, params.partial_lse[slot_row(s)]);
    const float base = best == -infinity ? 0.0f : best;
    float sum = 0.0f, x[kDv / 32] = {};
#pragma unroll 4
    for (int s = warp; s < n; s += kWarps) {
      const float weight = exp2f(params.partial_lse[slot_row(s)] - base);
      const float* from = params.partial_out + slot_row(s) * kDv;
      sum += weight;
#pragma unroll
      for (int c = 0; c < kDv / 32; ++c) x[c] += weight * from[c * 32 + lane];
    }
#pragma unroll
    for (int c = 0; c < kDv / 32; ++c) shared_out[warp * kDv + c * 32 + lane] = x[c];
    if (lane == 0) {
      shared_best[warp] = best;
      shared_sum[warp] = sum;
    }
    __syncthreads();
    float most = -infinity, total = 0.0f, weights[kWarps];
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, shared_best[w]);
    for (int w = 0; w < kWarps; ++w) {
      weights[w] = exp2f(shared_best[w] - (most == -infinity ? 0.0f : most));
      total += weights[w] * shared_sum[w];
    }
    const int query = row / p.h_q, head = row - query * p.h_q;
    const float lse = total == 0.0f ? -infinity : most + log2f(total);
    const float factor = total == 0.0f ? 0.0f : W::sink_factor(p, head, lse) / total;
    const bool is_nan =
        lse == -infinity && W::sees_a_key(p, req, query, queries, static_cast<int>(p.keys(req)));
    T* to = static_cast<T*>(p.out) + (p.first_query(req) + query) * p.out_strides.token +
            head * p.out_strides.head;
    const int c = 2 * static_cast<int>(threadIdx.x);
    if (c < kDv) {
      float value[2] = {0.0f, 0.0f};
      for (int w = 0; w < kWarps; ++w) {
        value[0] += weights[w] * shared_out[w * kDv + c];
        value[1] += weights[w] * shared_out[w * kDv + c + 1];
      }
      const float nan = __uint_as_float(0x7FC00000);
      *reinterpret_cast<std::uint32_t*>(to + c) =
          pack2<std::is_same_v<T, Bf16>>(is_nan ? nan : value[0] * factor, is_nan ? nan : value[1] * factor);
    }
    if (threadIdx.x == 0) W::store_lse(p, req, query, head, lse, is_nan);
    __syncthreads();
  }
}

}  // namespace flash_mla::sm90::gqa
