#pragma once

// Consumers for compute-bound work (many rows per key): tiles in pairs.
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

#include "kernels/attention/dense_decode/sm90/consumer.cuh"

namespace flash_mla::sm90 {

template <bool kBf16, int kCluster, int kWg>
struct Consumer : ConsumerBase<kBf16, kCluster, kWg> {
  using Base = ConsumerBase<kBf16, kCluster, kWg>;
  using Base::Base;
  using Base::lane;
  using Base::p;
  using Base::reference;
  using Base::row;
  using Base::s;

  __device__ void run(const PartRange& part) {
    int uses = 0;  // of this warpgroup's slot so far
    this->for_each_item(part, [&](float(&o)[128], const Item& item, float(&sum)[2]) {
      if constexpr (kWg == 0) {
        even_tiles(o, item, uses, sum);
      } else {
        odd_tiles(o, item, uses, sum);
      }
    });
  }

  // Q's first chunk as a first operand in registers: Q K^T reads as much of Q as of K from shared memory,
  // which is all that shared memory delivers. Two chunks would spill.
  using FirstQ = std::uint32_t[4][4];
  __device__ void load_first(FirstQ& first) const {
    const int r = this->warp * 16 + lane % 16;
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
      if (c == kFirstQChunks) ptx::mbarrier_wait(&s.q_full[1], this->item_parity);
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
    this->mask(x, item, tile);
    const float highest[2] = {lane_max(x, 0) * p.scale_log2, lane_max(x, 1) * p.scale_log2};
    bool scaled = false;
    if (__any_sync(0xFFFFFFFFu,
                   highest[0] > reference[0] + kMaxGrowth || highest[1] > reference[1] + kMaxGrowth)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float of_row = quad_max(highest[h]);
        alpha[h] = this->move_reference(h, of_row > reference[h] + kMaxGrowth ? of_row : reference[h]);
        sum[h] *= alpha[h];
      }
      scaled = this->any_scaled(alpha[0], alpha[1]);
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
      this->clear_rows(slot, count, 0, kRopeChunk);
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
      this->template exponentiate<0, 4>(scores, base, sum, 0, weights);
      ptx::named_barrier_arrive<kP0Ready, kConsumerThreads>();
      if (scaled) this->rescale(o, alpha[0], alpha[1]);
      issue_pv_own(o, weights, 0, tile > item.begin_block);
      ptx::wgmma_wait<0>();
      this->release(0);
      if (!paired) break;
      ptx::named_barrier_sync<kP1HalfReady, kConsumerThreads>();
      take_reference(o, sum);
      this->template issue_pv_shared<0, 2>(o, 1, true);
      ptx::named_barrier_sync<kP1Ready, kConsumerThreads>();
      this->template issue_pv_shared<2, 4>(o, 1, true);
      ptx::wgmma_wait<0>();
      this->release_odd(item, tile + 3 >= item.end_block);
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
      this->issue_pv_shared(o, 0, tile > item.begin_block + 1);
      ptx::wgmma_wait<1>();
      if (tile + 2 >= item.end_block && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
      // In halves: the first product with V1 starts while the second half of P1 is being computed.
      const bool scaled = find_reference(scores, item, tile, sum, alpha, base);
      this->template exponentiate<0, 2>(scores, base, sum, 1, weights);
      ptx::named_barrier_arrive<kP1HalfReady, kConsumerThreads>();
      ptx::wgmma_wait<0>();
      this->release(0);
      if (scaled) this->rescale(o, alpha[0], alpha[1]);
      issue_pv_own<0, 2>(o, weights, 1, true);
      this->template exponentiate<2, 4>(scores, base, sum, 1, weights);
      ptx::named_barrier_arrive<kP1Ready, kConsumerThreads>();
      issue_pv_own<2, 4>(o, weights, 1, true);
      ptx::wgmma_wait<0>();
      this->release_odd(item, tile + 2 >= item.end_block);
    }
    if (tile == item.end_block) {
      // The last even tile has no partner.
      ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
      take_reference(o, sum);
      this->issue_pv_shared(o, 0, tile > item.begin_block + 1);
      ptx::wgmma_wait<0>();
      this->release(0);
    }
  }

  // Follows a move of the reference that the other warpgroup made.
  __device__ void take_reference(float (&o)[128], float (&sum)[2]) {
    const float to0 = ptx::load_shared(&s.exchange[1 - kWg][row]),
                to1 = ptx::load_shared(&s.exchange[1 - kWg][row + 8]);
    if (!__any_sync(0xFFFFFFFFu, to0 != reference[0] || to1 != reference[1])) return;
    const float a0 = this->move_reference(0, to0), a1 = this->move_reference(1, to1);
    if (!this->any_scaled(a0, a1)) return;  // an item's first reference
    this->rescale(o, a0, a1);
    sum[0] *= a0;
    sum[1] *= a1;
  }
};

}  // namespace flash_mla::sm90
