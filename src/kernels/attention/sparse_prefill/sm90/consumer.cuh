#pragma once

// A consumer warpgroup: kWg is 0 or 1. Tiles are taken in pairs, as those of dense decode (dense_decode/sm90/consumer.cuh;
// the two could share the products and the softmax).
//
//   WG0   QK0 | softmax0 -> P0 | O_left  += P0 V0 | O_left  += P1 V1 | next pair
//   WG1         QK1 | O_right += P0 V0 | softmax1 -> P1 | O_right += P1 V1 | next pair
//
// A key that a list does not name counts as -inf; its bytes in the slot are zeros.

#include <cstdint>

#include "kernels/attention/sparse_prefill/sm90/epilogue.cuh"
#include "kernels/attention/sparse_prefill/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/tile.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::sparse_prefill {

template <bool kBf16, int kHeadDim, int kWg>
struct Consumer {
  static constexpr bool kIsBf16 = kBf16;
  static constexpr int kWarpgroup = kWg;
  using T = ptx::Element<kBf16>;
  // Q's first chunk as a first operand in registers: shared memory delivers no more than Q K^T reads.
  using FirstQ = std::uint32_t[4][4];

  const SparsePrefillParams& p;
  Smem<T>& s;
  const int warp, lane;   // in the warpgroup
  const int row;          // this thread's rows are `row` and `row + 8`
  float reference[2];     // of the softmax, per row, base 2; -inf until a key has been seen
  float highest_seen[2];  // of this lane's scores, per row, base 2

  __device__ Consumer(const SparsePrefillParams& params, Smem<T>& smem)
      : p(params),
        s(smem),
        warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32),
        row(warp * 16 + lane / 4) {}

  // Walks the items. O is not cleared: the first product of an item overwrites it.
  __device__ void run() {
    float o[128];
    int uses = 0;  // of this warpgroup's slot so far
    int items = 0;
    const int stride = static_cast<int>(gridDim.x);
    int index = static_cast<int>(blockIdx.x);
    int length = index < p.items ? list_length(p, item_at(p, index).token) : 0;
    for (; index < p.items; index += stride) {
      const int tiles = tiles_of(length);
      if (index + stride < p.items) length = list_length(p, item_at(p, index + stride).token);
      const Epilogue<Consumer> epilogue{*this, item_at(p, index)};
      if (tiles == 0) {
        epilogue.store_empty();
        continue;
      }
      float sum[2] = {0.0f, 0.0f};
      reference[0] = reference[1] = highest_seen[0] = highest_seen[1] = -INFINITY;
      ptx::mbarrier_wait(&s.q_full, items & 1);
      ++items;
      if constexpr (kWg == 0) {
        even_tiles(o, tiles, uses, sum);
      } else {
        odd_tiles(o, tiles, uses, sum);
      }
      merge_statistics(sum, items & 1);
      if (is_staged(tiles)) {
        epilogue.stage(o, sum);
      } else {
        epilogue.store(o, sum);
      }
    }
  }

  // ---- products

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
    for (int c = 0; c < kHeadDim / 64; ++c) {
      if (c % 4 == 0) {
        ptx::mbarrier_wait(&s.kv_full[slot][c / 4], parity);
        ptx::fence_async_proxy();
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c == 0) {
          ptx::wgmma(scores, first[i], k.step(i), i > 0);
        } else {
          ptx::wgmma(scores, q.step(4 * c + i), k.step(4 * c + i), c + i > 0);
        }
      }
    }
    ptx::wgmma_commit();
  }

  // O half (+)= P V of keys 16 kBegin to 16 kEnd - 1 of the tile in `slot`, P from this warpgroup's registers.
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
  // The same, P from the slot.
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

  // This warpgroup is done with its half of the slot's columns.
  __device__ void release(int slot) {
    if (lane == 0) ptx::mbarrier_arrive(&s.kv_empty[slot][kWg]);
  }
  // The same of slot 1; of an item's last tile there O takes its place, and whoever copies it out releases it.
  __device__ void release_odd(bool last) {
    if (!last) release(1);
  }
  __device__ void release_q() {
    if (lane == 0) ptx::mbarrier_arrive(&s.q_empty);
  }

  // ---- softmax

  // Scores of keys that are none become -inf.
  __device__ void mask(float (&x)[32], int slot) const {
    const uint4 valid = *reinterpret_cast<const uint4*>(s.valid[slot]);
    if ((valid.x & valid.y & valid.z & valid.w) == 0x0F0F0F0Fu) return;
    const std::uint32_t words[4] = {valid.x, valid.y, valid.z, valid.w};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      // Key 8 (i / 4) + 2 (lane % 4) + i % 2: of warp i / 8, bit 2 (i / 4 % 2) + lane / 2 % 2 of byte 2 (lane % 2) + i % 2.
      const int bit = lane % 2 * 16 + i % 2 * 8 + i / 4 % 2 * 2 + lane / 2 % 2;
      if ((words[i / 8] >> bit & 1) == 0) x[i] = -INFINITY;
    }
  }

  // Moves a row's reference; returns what O and the sum have to be multiplied with. Both are 0 before the first key.
  __device__ float move_reference(int h, float to) {
    const float alpha = reference[h] == to || reference[h] == -INFINITY ? 1.0f : exp2_fast(reference[h] - to);
    reference[h] = to;
    return alpha;
  }
  __device__ static bool any_scaled(float a0, float a1) {
    return __any_sync(0xFFFFFFFFu, a0 != 1.0f || a1 != 1.0f);
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

  // The reference of one tile's softmax: base is what to subtract. True if O has to be multiplied with alpha. Almost
  // always no lane's highest score exceeds the reference by much, and then no row's maximum is needed.
  __device__ bool find_reference(float (&x)[32], int slot, float (&sum)[2], float (&alpha)[2],
                                 float (&base)[2]) {
    mask(x, slot);
    const float highest[2] = {lane_max(x, 0) * p.scale_log2, lane_max(x, 1) * p.scale_log2};
#pragma unroll
    for (int h = 0; h < 2; ++h) highest_seen[h] = fmaxf(highest_seen[h], highest[h]);
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

  // S -> P = 2^(scale S - base) of keys 16 kBegin to 16 kEnd - 1, its row sums, and its place in the slot.
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

  // Row sums and highest scores over all columns of both warpgroups' tiles, in the same order in both.
  __device__ void merge_statistics(float (&sum)[2], int parity) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 2);
      highest_seen[h] = quad_max(highest_seen[h]);
      if (lane % 4 == 0) {
        s.row_sum[parity][kWg][row + 8 * h] = sum[h];
        s.row_highest[parity][kWg][row + 8 * h] = highest_seen[h];
      }
    }
    ptx::named_barrier_sync<kItemEnd, kConsumerThreads>();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      sum[h] = s.row_sum[parity][0][r] + s.row_sum[parity][1][r];
      highest_seen[h] = fmaxf(s.row_highest[parity][0][r], s.row_highest[parity][1][r]);
    }
  }

  // ---- the tiles of an item

  // As WG0 sees them: 0, 2, ... Everything is drained before the loop goes round: ptxas serialises products whose
  // accumulators are in flight there.
  __device__ void even_tiles(float (&o)[128], int tiles, int& uses, float (&sum)[2]) {
    float scores[32];
    std::uint32_t weights[4][4];
    float alpha[2], base[2];
    FirstQ first;
    load_first(first);
    for (int tile = 0; tile < tiles; tile += 2) {
      const bool paired = tile + 1 < tiles;
      issue_qk(scores, first, 0, uses++ & 1);
      if (paired) ptx::named_barrier_arrive<kOrder, kConsumerThreads>();
      ptx::wgmma_wait<0>();
      if (tile + 2 >= tiles) release_q();
      const bool scaled = find_reference(scores, 0, sum, alpha, base);
      exponentiate<0, 4>(scores, base, sum, 0, weights);
      ptx::named_barrier_arrive<kP0Ready, kConsumerThreads>();
      if (scaled) rescale(o, alpha[0], alpha[1]);
      issue_pv_own(o, weights, 0, tile > 0);
      ptx::wgmma_wait<0>();
      release(0);
      if (!paired) break;
      ptx::named_barrier_sync<kP1HalfReady, kConsumerThreads>();
      take_reference(o, sum);
      issue_pv_shared<0, 2>(o, 1, true);
      ptx::named_barrier_sync<kP1Ready, kConsumerThreads>();
      issue_pv_shared<2, 4>(o, 1, true);
      ptx::wgmma_wait<0>();
      release_odd(tile + 3 >= tiles);
    }
  }

  // As WG1 sees them: 1, 3, ...
  __device__ void odd_tiles(float (&o)[128], int tiles, int& uses, float (&sum)[2]) {
    float scores[32];
    std::uint32_t weights[4][4];
    float alpha[2], base[2];
    FirstQ first;
    load_first(first);
    int tile = 1;
    if (tile >= tiles) release_q();
    for (; tile < tiles; tile += 2) {
      ptx::named_barrier_sync<kOrder, kConsumerThreads>();
      issue_qk(scores, first, 1, uses++ & 1);
      ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
      take_reference(o, sum);
      issue_pv_shared(o, 0, tile > 1);
      ptx::wgmma_wait<1>();
      if (tile + 2 >= tiles) release_q();
      // In halves: the first product with V1 starts while the second half of P1 is being computed.
      const bool scaled = find_reference(scores, 1, sum, alpha, base);
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
      release_odd(tile + 2 >= tiles);
    }
    if (tile == tiles) {
      // The last even tile has no partner.
      ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
      take_reference(o, sum);
      issue_pv_shared(o, 0, tile > 1);
      ptx::wgmma_wait<0>();
      release(0);
    }
  }
};

}  // namespace flash_mla::sm90::sparse_prefill
