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

#include "sm90/decode/consumer.cuh"

namespace flash_mla::sm90 {

template <bool kBf16, int kCluster, int kWg>
struct PairedConsumer : ConsumerBase<kBf16, kCluster, kWg> {
  using Base = ConsumerBase<kBf16, kCluster, kWg>;
  using Base::Base;
  using Base::lane;
  using Base::p;
  using Base::row;
  using Base::s;

  __device__ void run(const std::int32_t* part) {
    int uses = 0;  // of this warpgroup's slot so far
    this->for_each_item(part, [&](float(&o)[128], const Item& item, float(&sum)[2]) {
      if constexpr (kWg == 0) {
        even_tiles(o, item, uses, sum);
      } else {
        odd_tiles(o, item, uses, sum);
      }
    });
  }

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

  // O half += P V of the tile in `slot`, P from this warpgroup's registers.
  __device__ void issue_pv_own(float (&o)[128], const std::uint32_t (&weights)[4][4], int slot) {
    const std::uint64_t v = ptx::swizzled_descriptor(s.kv[slot][kWg * 4], 8192, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::wgmma_m64n256k16_rs<kBf16>(o, weights[i], v + i * 128, true);
    }
    ptx::wgmma_commit();
  }
  // The softmax of one tile relative to the running reference, which it may move; alpha says by how much.
  __device__ void softmax(float (&x)[32], std::uint32_t (&weights)[4][4], int slot, const Item& item,
                          int tile, bool first, float (&sum)[2], float (&alpha)[2]) {
    this->mask(x, item, tile, 0);
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float highest = this->row_max(x, h);
      const float before = first ? -INFINITY : s.reference[row + 8 * h];
      const float now = highest > before + kMaxGrowth ? highest : before;
      alpha[h] = now == before ? 1.0f : exp2_fast(before - now);
      base[h] = now == -INFINITY ? 0.0f : now;
      sum[h] *= alpha[h];
      if (lane % 4 == 0) {
        s.reference[row + 8 * h] = now;
        s.alpha[kWg][row + 8 * h] = alpha[h];
      }
    }
    this->exponentiate(x, base, sum, slot, 0, weights);
  }

  // Q K^T of the next tile is issued before the loop goes round: the tensor cores have it to work on while
  // the products with the last V are waited for and the other warpgroup catches up.

  __device__ void issue_tile(float (&scores)[32], const Item& item, int tile, int slot, int& uses) {
    const std::uint32_t parity = uses++ & 1;
    const int count = item.length - tile * kTileTokens;
    if (count < kTileTokens) {
      for (int c = 0; c < kChunks; ++c) ptx::mbarrier_wait(&s.kv_full[slot][c], parity);
      this->clear_rows(slot, count, 0, kRopeChunk);
    }
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
      ptx::named_barrier_arrive<kOrder, kConsumerThreads>();
      ptx::wgmma_wait<0>();
      const bool last = tile + 2 >= end;
      if (last && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
      softmax(scores, weights, 0, item, tile, first, sum, alpha);
      ptx::named_barrier_arrive<kP0Ready, kConsumerThreads>();
      if (this->any_scaled(alpha[0], alpha[1])) this->rescale(o, alpha[0], alpha[1]);
      issue_pv_own(o, weights, 0);
      ptx::wgmma_wait<0>();
      this->release(0);
      ptx::named_barrier_sync<kP1Ready, kConsumerThreads>();
      const float a0 = s.alpha[1][row], a1 = s.alpha[1][row + 8];
      if (this->any_scaled(a0, a1)) this->rescale(o, a0, a1);
      sum[0] *= a0;
      sum[1] *= a1;
      this->issue_pv_shared(o, 1);
      if (last) {
        ptx::wgmma_wait<0>();
        this->release(1);
        return;
      }
      tile += 2;
      first = false;
      issue_tile(scores, item, tile, 0, uses);
      ptx::wgmma_wait<1>();
      this->release(1);
    }
    // An odd number of tiles: one is left without a partner.
    ptx::wgmma_wait<0>();
    if (lane == 0) ptx::mbarrier_arrive(&s.q_empty);
    softmax(scores, weights, 0, item, tile, first, sum, alpha);
    ptx::named_barrier_arrive<kP0Ready, kConsumerThreads>();
    if (this->any_scaled(alpha[0], alpha[1])) this->rescale(o, alpha[0], alpha[1]);
    issue_pv_own(o, weights, 0);
    ptx::wgmma_wait<0>();
    this->release(0);
  }

  // The tiles of an item as WG1 sees them: begin + 1, begin + 3, ...
  __device__ void odd_tiles(float (&o)[128], const Item& item, int& uses, float (&sum)[2]) {
    float scores[32];
    std::uint32_t weights[4][4];
    float alpha[2];
    const int end = item.end_tile;
    int tile = item.begin_tile + 1;
    if (tile < end) {
      ptx::named_barrier_sync<kOrder, kConsumerThreads>();
      issue_tile(scores, item, tile, 1, uses);
      while (true) {
        ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
        take_alpha(o, sum);
        this->issue_pv_shared(o, 0);
        ptx::wgmma_wait<1>();
        const bool last = tile + 2 >= end;
        if (last && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
        softmax(scores, weights, 1, item, tile, false, sum, alpha);
        ptx::named_barrier_arrive<kP1Ready, kConsumerThreads>();
        ptx::wgmma_wait<0>();
        this->release(0);
        if (this->any_scaled(alpha[0], alpha[1])) this->rescale(o, alpha[0], alpha[1]);
        issue_pv_own(o, weights, 1);
        tile += 2;
        // Nothing is lost by draining here: WG0's next Q K^T comes first.
        ptx::wgmma_wait<0>();
        this->release(1);
        if (last) break;
        ptx::named_barrier_sync<kOrder, kConsumerThreads>();
        issue_tile(scores, item, tile, 1, uses);
      }
    } else if (lane == 0) {
      ptx::mbarrier_arrive(&s.q_empty);
    }
    if (tile == end) {
      // The last even tile has no partner.
      ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
      take_alpha(o, sum);
      this->issue_pv_shared(o, 0);
      ptx::wgmma_wait<0>();
      this->release(0);
    }
  }

  // Follows a move of the reference that WG0 made.
  __device__ void take_alpha(float (&o)[128], float (&sum)[2]) {
    const float a0 = s.alpha[0][row], a1 = s.alpha[0][row + 8];
    if (this->any_scaled(a0, a1)) this->rescale(o, a0, a1);
    sum[0] *= a0;
    sum[1] *= a1;
  }
};

}  // namespace flash_mla::sm90
