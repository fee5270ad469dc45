#pragma once

// Dense MLA decode, 64 query rows per CTA.
//
// Tile       64 rows (heads of one or more query tokens) x 64 keys x 576; O is 64 x 512 fp32 in registers.
// Threads    384: two consumer warpgroups (WG0, WG1) and a producer warpgroup of which one thread works.
// Shared     Q 72 KB | two key tiles, slot 0 and slot 1, 72 KB each | row statistics 1.3 KB | barriers.
//            Every 64-column chunk (8 KB, 128-byte swizzle) of a slot has its own "full" barrier. A slot's ninth
//            chunk, the rope part, is used by Q K^T alone; P overwrites it.
// Registers  consumers 240 (O half 128, S 32, P 16), producer 24, through setmaxnreg.
//
// Tiles are worked on in pairs. WG0 computes S and the softmax of the even tile (slot 0), WG1 of the odd one
// (slot 1); each accumulates half of the 512 output columns over both tiles, taking its own P from registers
// and the other's from shared memory:
//
//   WG0   QK0 | softmax0 -> P0 | O_left  += P0 V0 | O_left  += P1 V1 | next pair
//   WG1         QK1 | O_right += P0 V0 | softmax1 -> P1 | O_right += P1 V1 | next pair
//
// WG1 issues its QK after WG0's, so that softmax0 runs under QK1 and softmax1 under the products with V0.
//
// Softmax is taken relative to a reference that moves only when a row's maximum exceeds it by more than 2^8
// (kMaxGrowth), so that O is almost never rescaled; P stays within range of fp16 and bf16 and the final
// division by the sum makes the result independent of the reference.
//
// With a cluster of two CTAs, both work on the same keys for different rows: each loads half of every chunk and
// multicasts it to both, which halves the traffic from L2.

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm90/decode/params.h"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/mbarrier.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flash_mla::sm90 {

inline constexpr int kChunks = kHeadDim / 64;  // of 64 columns
inline constexpr int kRopeChunk = kChunks - 1;
inline constexpr int kChunkElements = 64 * 64;
inline constexpr int kConsumerThreads = 256;
inline constexpr int kThreads = kConsumerThreads + 128;
inline constexpr float kMaxGrowth = 8.0f;  // base 2

struct alignas(1024) DecodeSmem {
  std::uint16_t q[kChunks][kChunkElements];
  std::uint16_t kv[2][kChunks][kChunkElements];
  float reference[kTileRows];
  float alpha[2][kTileRows];
  float row_sum[2][kTileRows];
  std::uint64_t q_full, q_empty;
  std::uint64_t kv_full[2][kChunks];
  std::uint64_t kv_empty[2][2];  // by slot and half: chunks 0-3 are WG0's columns, 4-7 WG1's. The rope chunk
                                 // of a slot is freed by the warpgroup that reads P there: half 1 - slot.
};

enum NamedBarrier : int { kP0Ready = 1, kP1Ready, kOrder, kItemEnd, kFillWg0, kFillWg1 };

/// The work of a part on one request.
struct Item {
  int req;
  int length;
  int begin_tile, end_tile;
  bool is_split;  // other parts work on this request too
  int slot;       // of the partial result
};

/// The n-th request of a part.
__device__ __forceinline__ Item item_of(const DecodeParams& p, const std::int32_t* part, int req) {
  Item item;
  const int begin_req = part[0], end_req = part[1];
  item.req = req;
  item.length = p.cache_seqlens[req];
  item.begin_tile = req == begin_req ? part[2] : 0;
  const int tiles = (item.length + kTileTokens - 1) / kTileTokens;
  item.end_tile = req == end_req ? min(part[3], tiles) : tiles;
  item.is_split = p.num_splits[req + 1] - p.num_splits[req] > 1;
  item.slot = 2 * static_cast<int>(blockIdx.z) + (req != begin_req ? 1 : 0);
  return item;
}

template <bool kBf16>
__device__ __forceinline__ std::uint32_t pack2(float low, float high) {
  if constexpr (kBf16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(x);
  } else {
    const __half2 x = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(x);
  }
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Transposes a 4 x 4 matrix of words held by the four lanes of a quad, one row each.
__device__ __forceinline__ void quad_transpose(std::uint32_t (&x)[4]) {
  const bool b0 = threadIdx.x & 1, b1 = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t t = __shfl_xor_sync(0xFFFFFFFFu, b0 ? x[i] : x[i + 1], 1);
    (b0 ? x[i] : x[i + 1]) = t;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t t = __shfl_xor_sync(0xFFFFFFFFu, b1 ? x[i] : x[i + 2], 2);
    (b1 ? x[i] : x[i + 2]) = t;
  }
}

// ---------------------------------------------------------------------------------------------- producer

template <int kCluster>
struct Producer {
  const DecodeParams& p;
  DecodeSmem& s;
  const CUtensorMap* q_map;
  const CUtensorMap* k_map;
  int rank;

  // Tokens of a tile that one box holds; boxes of the whole tile that hold any of `count` tokens.
  __device__ int box_tokens() const { return min(p.page_size, kTileTokens / kCluster); }

  __device__ void load_chunks(const Item& item, int tile, int slot, int begin, int end) const {
    const int box = box_tokens();
    const int count = min(item.length - tile * kTileTokens, kTileTokens);
    const std::int32_t* pages = p.block_table + item.req * p.block_table_stride;
    const int per_cta = kTileTokens / kCluster;
    const std::uint32_t bytes = static_cast<std::uint32_t>((count + box - 1) / box * box) * 128;
    for (int c = begin; c < end; ++c) ptx::mbarrier_arrive_expect_tx(&s.kv_full[slot][c], bytes);
    for (int t = rank * per_cta; t < min((rank + 1) * per_cta, count); t += box) {
      const int token = tile * kTileTokens + t;
      const int page = pages[token / p.page_size], offset = token % p.page_size;
      for (int c = begin; c < end; ++c) {
        std::uint16_t* to = &s.kv[slot][c][t * 64];
        if constexpr (kCluster == 1) {
          ptx::tma_load_4d(to, k_map, &s.kv_full[slot][c], c * 64, blockIdx.y, offset, page);
        } else {
          ptx::tma_load_4d_multicast(to, k_map, &s.kv_full[slot][c], (1 << kCluster) - 1, c * 64, blockIdx.y, offset,
                                     page);
        }
      }
    }
  }

  __device__ void run(const std::int32_t* part) const {
    int items = 0, uses[2] = {0, 0};
    const int m_block = blockIdx.x;
    const int first_token = m_block / p.blocks.head_chunks * p.blocks.tokens;
    const int first_head = static_cast<int>(blockIdx.y) * p.group + m_block % p.blocks.head_chunks * kTileRows;
    for (int req = part[0]; req <= part[1]; ++req) {
      const Item item = item_of(p, part, req);
      if (item.begin_tile >= item.end_tile) continue;
      ptx::mbarrier_wait(&s.q_empty, (items & 1) ^ 1);
      ptx::mbarrier_arrive_expect_tx(&s.q_full, static_cast<std::uint32_t>(p.blocks.tokens * p.blocks.heads) * 128 *
                                                    kChunks);
      for (int c = 0; c < kChunks; ++c) {
        ptx::tma_load_4d(s.q[c], q_map, &s.q_full, c * 64, first_head, first_token, req);
      }
      ++items;
      for (int tile = item.begin_tile, slot = 0; tile < item.end_tile; ++tile, slot ^= 1) {
        const std::uint32_t free = (uses[slot]++ & 1) ^ 1;
        // Halves in the order in which they are freed.
        ptx::mbarrier_wait_cluster(&s.kv_empty[slot][0], free);
        load_chunks(item, tile, slot, 0, 4);
        ptx::mbarrier_wait_cluster(&s.kv_empty[slot][1], free);
        load_chunks(item, tile, slot, 4, kChunks);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------- consumers

template <bool kBf16, int kCluster, int kWg>
struct Consumer {
  const DecodeParams& p;
  DecodeSmem& s;
  const int warp, lane;  // in the warpgroup
  const int row;         // this thread's rows are `row` and `row + 8`

  __device__ Consumer(const DecodeParams& params, DecodeSmem& smem)
      : p(params),
        s(smem),
        warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32),
        row(warp * 16 + lane / 4) {}

  // S = Q K^T of the tile in `slot`, as its chunks arrive.
  __device__ void issue_qk(float (&scores)[32], int slot, std::uint32_t parity) {
    const std::uint64_t q = ptx::swizzled_descriptor(s.q[0], 0, 1024);
    const std::uint64_t k = ptx::swizzled_descriptor(s.kv[slot][0], 0, 1024);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      ptx::mbarrier_wait(&s.kv_full[slot][c], parity);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::wgmma_m64n64k16_ss<kBf16>(scores, q + c * 512 + i * 2, k + c * 512 + i * 2, c + i > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // O half += P V of the tile in `slot`; P from this warpgroup's registers or from the slot's rope chunk.
  __device__ void issue_pv_own(float (&o)[128], const std::uint32_t (&weights)[4][4], int slot) {
    const std::uint64_t v = ptx::swizzled_descriptor(s.kv[slot][kWg * 4], 8192, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::wgmma_m64n256k16_rs<kBf16>(o, weights[i], v + i * 128, true);
    }
    ptx::wgmma_commit();
  }
  __device__ void issue_pv_other(float (&o)[128], int slot) {
    const std::uint64_t weights = ptx::swizzled_descriptor(s.kv[slot][kRopeChunk], 0, 1024);
    const std::uint64_t v = ptx::swizzled_descriptor(s.kv[slot][kWg * 4], 8192, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::wgmma_m64n256k16_ss<kBf16>(o, weights + i * 2, v + i * 128, true);
    }
    ptx::wgmma_commit();
  }

  // This warpgroup is done with its half of the slot's columns.
  __device__ void release(int slot) {
    if (lane < kCluster) {
      if constexpr (kCluster == 1) {
        ptx::mbarrier_arrive(&s.kv_empty[slot][kWg]);
      } else {
        ptx::mbarrier_arrive_cluster(&s.kv_empty[slot][kWg], lane);
      }
    }
  }

  // Rows of the tile past the request's end become zero: P is zero there, but 0 * NaN is not.
  __device__ void clear_tail(int slot, std::uint32_t parity, int count) {
    for (int c = 0; c < kChunks; ++c) ptx::mbarrier_wait(&s.kv_full[slot][c], parity);
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int words = (kTileTokens - count) * 8;  // 16-byte words of a chunk
    for (int i = thread; i < words * (kChunks - 1); i += 128) {
      reinterpret_cast<uint4*>(&s.kv[slot][i / words][count * 64])[i % words] = uint4{0, 0, 0, 0};
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(kWg == 0 ? kFillWg0 : kFillWg1, 128);
  }

  __device__ void rescale(float (&o)[128], float a0, float a1) {
#pragma unroll
    for (int i = 0; i < 128; i += 4) {
      o[i] *= a0;
      o[i + 1] *= a0;
      o[i + 2] *= a1;
      o[i + 3] *= a1;
    }
  }

  __device__ static bool any_scaled(float a0, float a1) {
    return __any_sync(0xFFFFFFFFu, a0 != 1.0f || a1 != 1.0f);
  }

  // First key that a row does not see.
  __device__ int limit_of(const Item& item, int r) const {
    if (!p.causal) return item.length;
    const int token = static_cast<int>(blockIdx.x) / p.blocks.head_chunks * p.blocks.tokens + r / p.blocks.heads;
    return min(item.length - p.s_q + token + 1, item.length);
  }

  // S -> P in registers and in the slot's rope chunk; moves the reference; leaves alpha for the other warpgroup.
  __device__ void softmax(float (&x)[32], std::uint32_t (&weights)[4][4], int slot, const Item& item, int tile,
                          bool first, float (&sum)[2], float (&alpha)[2]) {
    const int last_limit = p.causal ? item.length - p.s_q + 1 : item.length;
    if ((tile + 1) * kTileTokens > last_limit) {
      const int l0 = limit_of(item, row) - tile * kTileTokens, l1 = limit_of(item, row + 8) - tile * kTileTokens;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (column >= (i % 4 < 2 ? l0 : l1)) x[i] = -INFINITY;
      }
    }
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = x[2 * h];
#pragma unroll
      for (int i = 0; i < 8; ++i) highest = fmaxf(highest, fmaxf(x[4 * i + 2 * h], x[4 * i + 2 * h + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFFu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFFu, highest, 2)) * p.scale_log2;
      const float before = first ? -INFINITY : s.reference[row + 8 * h];
      const float now = highest > before + kMaxGrowth ? highest : before;
      alpha[h] = now == before ? 1.0f : exp2_fast(before - now);
      base[h] = now == -INFINITY ? 0.0f : now;
      if (lane % 4 == 0) {
        s.reference[row + 8 * h] = now;
        s.alpha[kWg][row + 8 * h] = alpha[h];
      }
    }
    float part[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int h = i % 4 / 2;
      x[i] = exp2_fast(fmaf(x[i], p.scale_log2, -base[h]));
      part[h] += x[i];
    }
    sum[0] = sum[0] * alpha[0] + part[0];
    sum[1] = sum[1] * alpha[1] + part[1];
    const std::uint32_t chunk = ptx::smem_address(s.kv[slot][kRopeChunk]);
    const int r = warp * 16 + lane % 16;  // row whose address this lane gives
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i][0] = pack2<kBf16>(x[8 * i], x[8 * i + 1]);
      weights[i][1] = pack2<kBf16>(x[8 * i + 2], x[8 * i + 3]);
      weights[i][2] = pack2<kBf16>(x[8 * i + 4], x[8 * i + 5]);
      weights[i][3] = pack2<kBf16>(x[8 * i + 6], x[8 * i + 7]);
      const std::uint32_t to = chunk + r * 128 + (((2 * i + lane / 16) ^ (r % 8)) * 16);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(weights[i][0]),
                   "r"(weights[i][1]), "r"(weights[i][2]), "r"(weights[i][3])
                   : "memory");
    }
    ptx::fence_async_proxy();
  }

  // Where row r of this CTA's block goes; false if it is padding.
  __device__ bool locate(int r, int& token, int& head) const {
    const int in_group = static_cast<int>(blockIdx.x) % p.blocks.head_chunks * kTileRows + r % p.blocks.heads;
    token = static_cast<int>(blockIdx.x) / p.blocks.head_chunks * p.blocks.tokens + r / p.blocks.heads;
    head = static_cast<int>(blockIdx.y) * p.group + in_group;
    return r < p.blocks.tokens * p.blocks.heads && token < p.s_q && in_group < p.group;
  }
  __device__ std::int64_t partial_row(const Item& item, int token, int head) const {
    return (static_cast<std::int64_t>(item.slot) * p.s_q + token) * p.h_q + head;
  }
  __device__ std::uint16_t* out_row(const Item& item, int token, int head) const {
    return static_cast<std::uint16_t*>(p.out) + item.req * p.out_stride_b + token * p.out_stride_s +
           head * p.out_stride_h;
  }
  __device__ void store_lse(const Item& item, int token, int head, float lse) const {
    if (kWg != 0 || lane % 4 != 0) return;
    if (item.is_split) {
      p.partial_lse[partial_row(item, token, head)] = lse;
    } else if (p.lse != nullptr) {
      p.lse[item.req * p.lse_stride_b + head * p.lse_stride_h + token * p.lse_stride_s] =
          lse == -INFINITY ? INFINITY : lse * 0.69314718056f;
    }
  }

  // Writes this warpgroup's half of O and, from WG0, the lse.
  __device__ void store(const Item& item, const float (&o)[128], const float (&sum)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int token, head;
      const bool valid = locate(row + 8 * h, token, head);
      const bool none = !(sum[h] > 0.0f);
      const float factor = none ? 0.0f : 1.0f / sum[h];
      if (valid) store_lse(item, token, head, none ? -INFINITY : s.reference[row + 8 * h] + log2f(sum[h]));
      if (item.is_split) {
        float* to = p.partial_out + partial_row(item, token, head) * kHeadDimV + kWg * 256 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const float2 x{o[4 * i + 2 * h] * factor, o[4 * i + 2 * h + 1] * factor};
          if (valid) *reinterpret_cast<float2*>(to + i * 8) = x;
        }
      } else {
        std::uint16_t* to = out_row(item, token, head) + kWg * 256 + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
          std::uint32_t x[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            x[j] = pack2<kBf16>(o[4 * (i + j) + 2 * h] * factor, o[4 * (i + j) + 2 * h + 1] * factor);
          }
          quad_transpose(x);
          if (valid) *reinterpret_cast<uint4*>(to + i * 8) = uint4{x[0], x[1], x[2], x[3]};
        }
      }
    }
  }

  // A request without keys.
  __device__ void store_empty(const Item& item) const {
    for (int h = 0; h < 2; ++h) {
      int token, head;
      if (!locate(row + 8 * h, token, head)) continue;
      store_lse(item, token, head, -INFINITY);
      if (item.is_split) {
        float* to = p.partial_out + partial_row(item, token, head) * kHeadDimV + kWg * 256 + lane % 4 * 64;
        for (int i = 0; i < 64; i += 4) *reinterpret_cast<float4*>(to + i) = float4{0, 0, 0, 0};
      } else {
        std::uint16_t* to = out_row(item, token, head) + kWg * 256 + lane % 4 * 64;
        for (int i = 0; i < 64; i += 8) *reinterpret_cast<uint4*>(to + i) = uint4{0, 0, 0, 0};
      }
    }
  }

  __device__ void run(const std::int32_t* part) {
    float o[128];
    int items = 0, uses = 0;  // of this warpgroup's slot so far
    for (int req = part[0]; req <= part[1]; ++req) {
      const Item item = item_of(p, part, req);
      if (item.begin_tile >= item.end_tile) {
        store_empty(item);
        continue;
      }
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (float& x : o) x = 0.0f;
      ptx::mbarrier_wait(&s.q_full, items & 1);
      ++items;
      if constexpr (kWg == 0) {
        even_tiles(o, item, uses, sum);
      } else {
        odd_tiles(o, item, uses, sum);
      }
      add_sums(sum);
      store(item, o, sum);
    }
  }

  // Q K^T of the next tile is issued before the loop goes round: the tensor cores have it to work on while the
  // products with the last V are waited for and the other warpgroup catches up.

  __device__ void issue_tile(float (&scores)[32], const Item& item, int tile, int slot, int& uses) {
    const std::uint32_t parity = uses++ & 1;
    const int count = item.length - tile * kTileTokens;
    if (count < kTileTokens) clear_tail(slot, parity, count);
    issue_qk(scores, slot, parity);
  }

  // The tiles of an item as WG0 sees them: begin, begin + 2, ...
  __device__ void even_tiles(float (&o)[128], const Item& item, int& uses, float (&sum)[2]) {
    float scores[32];
    std::uint32_t weights[4][4];
    float alpha[2];
    const int end = item.end_tile;
    int tile = item.begin_tile;
    bool first = true;
    issue_tile(scores, item, tile, 0, uses);
    while (tile + 1 < end) {
      ptx::named_barrier_arrive(kOrder, kConsumerThreads);
      ptx::wgmma_wait<0>();
      const bool last = tile + 2 >= end;
      if (last && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
      softmax(scores, weights, 0, item, tile, first, sum, alpha);
      ptx::named_barrier_arrive(kP0Ready, kConsumerThreads);
      if (any_scaled(alpha[0], alpha[1])) rescale(o, alpha[0], alpha[1]);
      issue_pv_own(o, weights, 0);
      ptx::named_barrier_sync(kP1Ready, kConsumerThreads);
      const float a0 = s.alpha[1][row], a1 = s.alpha[1][row + 8];
      ptx::wgmma_wait<0>();
      release(0);
      if (any_scaled(a0, a1)) rescale(o, a0, a1);
      sum[0] *= a0;
      sum[1] *= a1;
      issue_pv_other(o, 1);
      if (last) {
        ptx::wgmma_wait<0>();
        release(1);
        return;
      }
      tile += 2;
      first = false;
      issue_tile(scores, item, tile, 0, uses);
      ptx::wgmma_wait<1>();
      release(1);
    }
    // An odd number of tiles: one is left without a partner.
    ptx::wgmma_wait<0>();
    if (lane == 0) ptx::mbarrier_arrive(&s.q_empty);
    softmax(scores, weights, 0, item, tile, first, sum, alpha);
    ptx::named_barrier_arrive(kP0Ready, kConsumerThreads);
    if (any_scaled(alpha[0], alpha[1])) rescale(o, alpha[0], alpha[1]);
    issue_pv_own(o, weights, 0);
    ptx::wgmma_wait<0>();
    release(0);
  }

  // The tiles of an item as WG1 sees them: begin + 1, begin + 3, ...
  __device__ void odd_tiles(float (&o)[128], const Item& item, int& uses, float (&sum)[2]) {
    float scores[32];
    std::uint32_t weights[4][4];
    float alpha[2];
    const int end = item.end_tile;
    int tile = item.begin_tile + 1;
    if (tile < end) {
      ptx::named_barrier_sync(kOrder, kConsumerThreads);
      issue_tile(scores, item, tile, 1, uses);
      while (true) {
        ptx::named_barrier_sync(kP0Ready, kConsumerThreads);
        take_alpha(o, sum);
        issue_pv_other(o, 0);
        ptx::wgmma_wait<1>();
        const bool last = tile + 2 >= end;
        if (last && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
        softmax(scores, weights, 1, item, tile, false, sum, alpha);
        ptx::named_barrier_arrive(kP1Ready, kConsumerThreads);
        ptx::wgmma_wait<0>();
        release(0);
        if (any_scaled(alpha[0], alpha[1])) rescale(o, alpha[0], alpha[1]);
        issue_pv_own(o, weights, 1);
        tile += 2;
        // Nothing is lost by draining here: WG0's next Q K^T comes first.
        ptx::wgmma_wait<0>();
        release(1);
        if (last) break;
        ptx::named_barrier_sync(kOrder, kConsumerThreads);
        issue_tile(scores, item, tile, 1, uses);
      }
    } else if (lane == 0) {
      ptx::mbarrier_arrive(&s.q_empty);
    }
    if (tile == end) {
      // The last even tile has no partner.
      ptx::named_barrier_sync(kP0Ready, kConsumerThreads);
      take_alpha(o, sum);
      issue_pv_other(o, 0);
      ptx::wgmma_wait<0>();
      release(0);
    }
  }

  // Follows a move of the reference that WG0 made.
  __device__ void take_alpha(float (&o)[128], float (&sum)[2]) {
    const float a0 = s.alpha[0][row], a1 = s.alpha[0][row + 8];
    if (any_scaled(a0, a1)) rescale(o, a0, a1);
    sum[0] *= a0;
    sum[1] *= a1;
  }

  // Row sums over all columns of both warpgroups' tiles, in the same order in both.
  __device__ void add_sums(float (&sum)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 2);
      if (lane % 4 == 0) s.row_sum[kWg][row + 8 * h] = sum[h];
    }
    ptx::named_barrier_sync(kItemEnd, kConsumerThreads);
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] = s.row_sum[0][row + 8 * h] + s.row_sum[1][row + 8 * h];
  }
};

// ---------------------------------------------------------------------------------------------- kernel

template <bool kBf16, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    dense_decode_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                        const DecodeParams p) {
  extern __shared__ std::byte dynamic_smem[];
  auto& s = *reinterpret_cast<DecodeSmem*>((reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == kConsumerThreads / 32 && threadIdx.x % 32 == 0) {
    ptx::prefetch_tensor_map(&q_map);
    ptx::prefetch_tensor_map(&k_map);
    ptx::mbarrier_init(&s.q_full, 1);
    ptx::mbarrier_init(&s.q_empty, 8);
    for (int slot = 0; slot < 2; ++slot) {
      for (auto& barrier : s.kv_full[slot]) ptx::mbarrier_init(&barrier, 1);
      for (auto& barrier : s.kv_empty[slot]) ptx::mbarrier_init(&barrier, 4 * kCluster);
    }
    ptx::fence_barrier_init();
  }
  if constexpr (kCluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
  ptx::grid_dependency_wait();
  const std::int32_t* part = p.parts + static_cast<std::int64_t>(blockIdx.z) * 8;
  if (part[0] < p.batch) {
    if (warp >= kConsumerThreads / 32) {
      ptx::set_max_registers_down<24>();
      if (warp == kConsumerThreads / 32 && threadIdx.x % 32 == 0) {
        Producer<kCluster>{p, s, &q_map, &k_map, kCluster > 1 ? static_cast<int>(ptx::cluster_rank()) : 0}.run(part);
      }
      __syncwarp();
    } else if (warp < 4) {
      ptx::set_max_registers_up<240>();
      Consumer<kBf16, kCluster, 0>(p, s).run(part);
    } else {
      ptx::set_max_registers_up<240>();
      Consumer<kBf16, kCluster, 1>(p, s).run(part);
    }
  }
  ptx::grid_dependency_launch();
  if constexpr (kCluster > 1) {
    // No CTA leaves while the other may still write to it or arrive at its barriers.
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

}  // namespace flash_mla::sm90
