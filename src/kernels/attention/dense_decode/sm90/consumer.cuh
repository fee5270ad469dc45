#pragma once

// A consumer warpgroup: kWg is 0 or 1. Tiles are taken in pairs.
//
// WG0 computes S and the softmax of the even tile (slot 0), WG1 of the odd one (slot 1); each accumulates
// half of the 512 output columns over both tiles, taking its own P from registers and the other's from shared
// memory:
//
//   WG0   QK0 | softmax0 -> P0 | O_left  += P0 V0 | O_left  += P1 V1 | next pair
//   WG1         QK1 | O_right += P0 V0 | softmax1 -> P1 | O_right += P1 V1 | next pair
//
// WG1 issues its QK after WG0's, so that softmax0 runs under QK1 and softmax1 under the products with V0.

#include <cstdint>

#include "kernels/attention/dense_decode/sm90/epilogue.cuh"
#include "kernels/attention/dense_decode/sm90/smem.cuh"
#include "kernels/attention/dense_decode/sm90/work.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/tile.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90 {

template <bool kBf16, int kCluster, int kWg>
struct Consumer {
  static constexpr bool kIsBf16 = kBf16;
  static constexpr int kCtas = kCluster, kWarpgroup = kWg;
  using T = ptx::Element<kBf16>;
  // Q's first chunk as a first operand in registers: Q K^T reads as much of Q as of K from shared memory,
  // which is all that shared memory delivers. Two chunks would spill.
  using FirstQ = std::uint32_t[4][4];

  const DecodeParams& p;
  DecodeSmem<T>& s;
  const int warp, lane;       // in the warpgroup
  const int row;              // this thread's rows are `row` and `row + 8`
  std::uint32_t item_parity;  // of q_full
  float reference[2];         // of the softmax, per row, base 2; -inf until a key has been seen

  __device__ Consumer(const DecodeParams& params, DecodeSmem<T>& smem)
      : p(params),
        s(smem),
        warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32),
        row(warp * 16 + lane / 4) {}

  __device__ void run(const PartRange& part) {
    int uses = 0;  // of this warpgroup's slot so far
    for_each_item(part, [&](float(&o)[128], const Item& item, float(&sum)[2]) {
      if constexpr (kWg == 0) {
        even_tiles(o, item, uses, sum);
      } else {
        odd_tiles(o, item, uses, sum);
      }
    });
  }

  __device__ Epilogue<Consumer> epilogue() { return {*this}; }

  // Row sums over all columns of both warpgroups' tiles, in the same order in both.
  __device__ void add_sums(float (&sum)[2], int parity) {
    float(&row_sum)[2][kTileRows] = s.row_sum[parity];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 2);
      if (lane % 4 == 0) row_sum[kWg][row + 8 * h] = sum[h];
    }
    ptx::named_barrier_sync<kItemEnd, kConsumerThreads>();
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] = row_sum[0][row + 8 * h] + row_sum[1][row + 8 * h];
  }

  // Walks the items of a part; `tiles(o, item, sum)` does the work on one. O is not cleared: the first
  // product of an item overwrites it.
  template <class Tiles>
  __device__ void for_each_item(const PartRange& part, Tiles&& tiles) {
    float o[128];
    int items = 0;
    const auto walk = walk_of(p, part);
    for (Item item = walk.first(); walk.holds(item); item = walk.next(item)) {
      if (item.begin_block >= item.end_block) {
        epilogue().store_empty(item);
        continue;
      }
      float sum[2] = {0.0f, 0.0f};
      reference[0] = reference[1] = -INFINITY;
      item_parity = items & 1;
      ptx::mbarrier_wait(&s.q_full[0], item_parity);
      ++items;
      tiles(o, item, sum);
      add_sums(sum, items & 1);
      epilogue().finish(item, o, sum);
    }
  }

  __device__ void load_first(FirstQ& first) const {
    const int r = warp * 16 + lane % 16;
    const std::uint32_t chunk = ptx::smem_address(s.q.at(0));
#pragma unroll
    for (int i = 0; i < 4; ++i) ldmatrix_x4(first[i], ptx::swizzled_word(chunk, r, 2 * i + lane / 16));
  }

  // S = Q K^T of the tile in `slot`, as its chunks arrive.
  __device__ void issue_qk(float (&scores)[32], const FirstQ& first, int slot, std::uint32_t parity) {
    const auto q = s.q.k_major(), k = s.kv[slot].k_major();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      // (WG1 does not come here in an item of one tile. The next item's Q is loaded after this one's was
      // used.)
      if (c == kFirstQChunks) ptx::mbarrier_wait(&s.q_full[1], item_parity);
      if (c % 4 == 0) ptx::mbarrier_wait(&s.kv_full[slot][c / 4], parity);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c == 0) {
          ptx::wgmma(scores, first[i], k.step(i), i > 0);
        } else {
          ptx::wgmma(scores, q.step(4 * c + i), k.step(4 * c + i), true);
        }
      }
    }
    ptx::wgmma_commit();
  }

  // O half (+)= P V of keys 16 kBegin to 16 kEnd - 1 of the tile in `slot`, P from this warpgroup's
  // registers.
  template <int kBegin = 0, int kEnd = 4>
  __device__ void issue_pv_own(float (&o)[128], const std::uint32_t (&weights)[4][4], int slot,
                               bool accumulate) {
    const auto v = s.values(slot, kWg).mn_major();
    ptx::wgmma_fence();
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      ptx::wgmma(o, weights[i], v.step(i), i > 0 || accumulate);
    }
    ptx::wgmma_commit();
  }

  // The reference of one tile's softmax: base is what to subtract. True if O has to be multiplied with alpha.
  // Almost always none does, and then no row's maximum is needed: that no lane's exceeds the
  // reference by much is enough, which spares the shuffles.
  __device__ bool find_reference(float (&x)[32], const Item& item, int tile, float (&sum)[2],
                                 float (&alpha)[2], float (&base)[2]) {
    mask(x, item, tile);
    const float highest[2] = {lane_max(x, 0) * p.scale_log2, lane_max(x, 1) * p.scale_log2};
    bool scaled = false;
    if (__any_sync(0xFFFFFFFFu,
                   highest[0] > reference[0] + kMaxGrowth || highest[1] > reference[1] + kMaxGrowth)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float of_row = quad_max(highest[h]);
        alpha[h] = move_reference(h, of_row > reference[h] + kMaxGrowth ? of_row : reference[h]);
        sum[h] *= alpha[h];
      }
      scaled = any_scaled(alpha[0], alpha[1]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      base[h] = reference[h] == -INFINITY ? 0.0f : reference[h];
      if (lane % 4 == 0) ptx::store_shared(&s.exchange[kWg][row + 8 * h], reference[h]);
    }
    return scaled;
  }

  __device__ void issue_tile(float (&scores)[32], const FirstQ& first, const Item& item, int tile, int slot,
                             int& uses) {
    const std::uint32_t parity = uses++ & 1;
    const int count = item.length - tile * kTileTokens;
    if (count < kTileTokens) {
      for (auto& full : s.kv_full[slot]) ptx::mbarrier_wait(&full, parity);
      clear_rows(slot, count, 0, kRopeChunk);
    }
    issue_qk(scores, first, slot, parity);
  }

  // The tiles of an item as WG0 sees them: begin, begin + 2, ... Everything is drained before the loop goes
  // round: the slot is released without waiting for the keys that the next Q K^T may have to wait for, and
  // ptxas serialises products whose accumulators are in flight there.
  __device__ void even_tiles(float (&o)[128], const Item& item, int& uses, float (&sum)[2]) {
    float scores[32];
    std::uint32_t weights[4][4];
    float alpha[2], base[2];
    FirstQ first;
    load_first(first);
    for (int tile = item.begin_block; tile < item.end_block; tile += 2) {
      const bool paired = tile + 1 < item.end_block;
      issue_tile(scores, first, item, tile, 0, uses);
      if (paired) ptx::named_barrier_arrive<kOrder, kConsumerThreads>();
      ptx::wgmma_wait<0>();
      if (tile + 2 >= item.end_block && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
      const bool scaled = find_reference(scores, item, tile, sum, alpha, base);
      exponentiate<0, 4>(scores, base, sum, 0, weights);
      ptx::named_barrier_arrive<kP0Ready, kConsumerThreads>();
      if (scaled) rescale(o, alpha[0], alpha[1]);
      issue_pv_own(o, weights, 0, tile > item.begin_block);
      ptx::wgmma_wait<0>();
      release(0);
      if (!paired) break;
      ptx::named_barrier_sync<kP1HalfReady, kConsumerThreads>();
      take_reference(o, sum);
      issue_pv_shared<0, 2>(o, 1, true);
      ptx::named_barrier_sync<kP1Ready, kConsumerThreads>();
      issue_pv_shared<2, 4>(o, 1, true);
      ptx::wgmma_wait<0>();
      release_odd(item, tile + 3 >= item.end_block);
    }
  }

  // The tiles of an item as WG1 sees them: begin + 1, begin + 3, ...
  __device__ void odd_tiles(float (&o)[128], const Item& item, int& uses, float (&sum)[2]) {
    float scores[32];
    std::uint32_t weights[4][4];
    float alpha[2], base[2];
    FirstQ first;
    load_first(first);
    int tile = item.begin_block + 1;
    if (tile >= item.end_block && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
    for (; tile < item.end_block; tile += 2) {
      ptx::named_barrier_sync<kOrder, kConsumerThreads>();
      issue_tile(scores, first, item, tile, 1, uses);
      ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
      take_reference(o, sum);
      issue_pv_shared(o, 0, tile > item.begin_block + 1);
      ptx::wgmma_wait<1>();
      if (tile + 2 >= item.end_block && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
      // In halves: the first product with V1 starts while the second half of P1 is being computed.
      const bool scaled = find_reference(scores, item, tile, sum, alpha, base);
      exponentiate<0, 2>(scores, base, sum, 1, weights);
      ptx::named_barrier_arrive<kP1HalfReady, kConsumerThreads>();
      ptx::wgmma_wait<0>();
      release(0);
      if (scaled) rescale(o, alpha[0], alpha[1]);
      issue_pv_own<0, 2>(o, weights, 1, true);
      exponentiate<2, 4>(scores, base, sum, 1, weights);
      ptx::named_barrier_arrive<kP1Ready, kConsumerThreads>();
      issue_pv_own<2, 4>(o, weights, 1, true);
      ptx::wgmma_wait<0>();
      release_odd(item, tile + 2 >= item.end_block);
    }
    if (tile == item.end_block) {
      // The last even tile has no partner.
      ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
      take_reference(o, sum);
      issue_pv_shared(o, 0, tile > item.begin_block + 1);
      ptx::wgmma_wait<0>();
      release(0);
    }
  }

  // Follows a move of the reference that the other warpgroup made.
  __device__ void take_reference(float (&o)[128], float (&sum)[2]) {
    const float to0 = ptx::load_shared(&s.exchange[1 - kWg][row]),
                to1 = ptx::load_shared(&s.exchange[1 - kWg][row + 8]);
    if (!__any_sync(0xFFFFFFFFu, to0 != reference[0] || to1 != reference[1])) return;
    const float a0 = move_reference(0, to0), a1 = move_reference(1, to1);
    if (!any_scaled(a0, a1)) return;  // an item's first reference
    rescale(o, a0, a1);
    sum[0] *= a0;
    sum[1] *= a1;
  }

  // This warpgroup is done with its half of slot 1's columns; of the last tile there only if they do not take
  // O.
  __device__ void release_odd(const Item& item, bool last) {
    if (!(last && is_staged<kCluster>(p, item))) release(1);
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

  // Key rows `count` to 63 of chunks [begin, end) become zero: P is zero there, but 0 * NaN is not.
  __device__ void clear_rows(int slot, int count, int begin, int end) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int words = (kTileTokens - count) * 8;  // 16-byte words of a chunk
    for (int i = thread; i < words * (end - begin); i += 128) {
      reinterpret_cast<uint4*>(s.kv[slot].at(begin + i / words, count))[i % words] = uint4{0, 0, 0, 0};
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_sync<(kWg == 0 ? kFillWg0 : kFillWg1), 128>();
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

  // Scores that a row does not see become -inf.
  __device__ void mask(float (&x)[32], const Item& item, int tile) const {
    const int last_limit = p.causal ? item.length - p.s_q + 1 : item.length;
    if ((tile + 1) * kTileTokens <= last_limit) return;
    const int l0 = limit_of(p, item, row) - tile * kTileTokens,
              l1 = limit_of(p, item, row + 8) - tile * kTileTokens;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (column >= (i % 4 < 2 ? l0 : l1)) x[i] = -INFINITY;
    }
  }

  // Moves a row's reference; returns what O and the sum have to be multiplied with. Both are 0 before the
  // first key.
  __device__ float move_reference(int h, float to) {
    const float alpha = reference[h] == to || reference[h] == -INFINITY ? 1.0f : exp2_fast(reference[h] - to);
    reference[h] = to;
    return alpha;
  }

  // S -> P = 2^(scale S - base) of keys 16 kBegin to 16 kEnd - 1, its row sums, and its place in the slot's
  // rope chunk.
  template <int kBegin, int kEnd>
  __device__ void exponentiate(float (&x)[32], const float (&base)[2], float (&sum)[2], int slot,
                               std::uint32_t (&weights)[4][4]) {
    float part[2][2] = {};
#pragma unroll
    for (int i = 8 * kBegin; i < 8 * kEnd; ++i) {
      const int h = i % 4 / 2;
      x[i] = exp2_fast(fmaf(x[i], p.scale_log2, -base[h]));
      part[h][i % 2] += x[i];
    }
    sum[0] += part[0][0] + part[0][1];
    sum[1] += part[1][0] + part[1][1];
    const std::uint32_t chunk = ptx::smem_address(&s.weights(slot));
    const int r = warp * 16 + lane % 16;  // row whose address this lane gives
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) weights[i][j] = pack2<kBf16>(x[8 * i + 2 * j], x[8 * i + 2 * j + 1]);
      stmatrix_x4(ptx::swizzled_word(chunk, r, 2 * i + lane / 16), weights[i][0], weights[i][1],
                  weights[i][2], weights[i][3]);
    }
    ptx::fence_async_proxy();
  }

  // O half (+)= P V of keys 16 kBegin to 16 kEnd - 1 of the tile in `slot`, P from the slot's rope chunk.
  template <int kBegin = 0, int kEnd = 4>
  __device__ void issue_pv_shared(float (&o)[128], int slot, bool accumulate) {
    const auto weights = s.weights(slot).k_major();
    const auto v = s.values(slot, kWg).mn_major();
    ptx::wgmma_fence();
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      ptx::wgmma(o, weights.step(i), v.step(i), i > 0 || accumulate);
    }
    ptx::wgmma_commit();
  }
};

}  // namespace flash_mla::sm90
