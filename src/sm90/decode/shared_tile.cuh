#pragma once

// Consumers for memory-bound work and for latency: both warpgroups share every tile.
//
// Each computes S for 32 of the 64 keys, both agree on the reference through shared memory, each turns its
// half into P, and each accumulates half of the output columns over all 64 keys:
//
//   QK (own 32 keys) | row maxima exchanged | softmax -> P | P complete | O half += P V
//
// A tile takes longer than in the paired form (about 2700 clocks against 2180), but it holds its slot for
// that long only, so that the other slot and most of this one are always being filled.

#include <cstdint>

#include "sm90/decode/consumer.cuh"

namespace flash_mla::sm90 {

template <bool kBf16, int kCluster, int kWg>
struct SharedTileConsumer : ConsumerBase<kBf16, kCluster, kWg> {
  using Base = ConsumerBase<kBf16, kCluster, kWg>;
  using Base::Base;
  using Base::lane;
  using Base::p;
  using Base::reference;
  using Base::row;
  using Base::s;

  __device__ void run(const int4& part) {
    int uses[2] = {0, 0};  // of the slots so far
    this->for_each_item(part,
                        [&](float(&o)[128], const Item& item, float(&sum)[2]) { tiles(o, item, uses, sum); });
  }

  __device__ void issue_qk(float (&scores)[16], int slot, std::uint32_t parity) {
    const std::uint64_t q = ptx::swizzled_descriptor(s.q[0], 0, 1024);
    const std::uint64_t k = ptx::swizzled_descriptor(&s.kv[slot][0][kWg * 32 * 64], 0, 1024);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c % 4 == 0 && c < kRopeChunk) ptx::mbarrier_wait(&s.kv_full[slot][c / 4], parity);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::wgmma_m64n32k16_ss<kBf16>(scores, q + c * 512 + i * 2, k + c * 512 + i * 2, c + i > 0);
      }
    }
    ptx::wgmma_commit();
  }

  __device__ void tiles(float (&o)[128], const Item& item, int (&uses)[2], float (&sum)[2]) {
    int slot = 0;
    for (int tile = item.begin_tile; tile < item.end_tile; ++tile, slot ^= 1) {
      float scores[16];
      std::uint32_t weights[2][4];
      issue_qk(scores, slot, (slot == 0 ? uses[0] : uses[1]) & 1);
      ++(slot == 0 ? uses[0] : uses[1]);
      ptx::wgmma_wait<0>();
      if (tile + 1 == item.end_tile && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
      const int count = item.length - tile * kTileTokens;
      if (count < kTileTokens) this->clear_rows(slot, count, kWg * 4, kWg * 4 + 4);
      this->mask(scores, item, tile, kWg * 32);
      float highest[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        highest[h] = this->row_max(scores, h);
        if (lane % 4 == 0) s.exchange[kWg][row + 8 * h] = highest[h];
      }
      ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
      float alpha[2], base[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        highest[h] = fmaxf(highest[h], s.exchange[1 - kWg][row + 8 * h]);
        alpha[h] =
            this->move_reference(h, highest[h] > reference[h] + kMaxGrowth ? highest[h] : reference[h]);
        base[h] = reference[h] == -INFINITY ? 0.0f : reference[h];
        sum[h] *= alpha[h];
      }
      this->exponentiate(scores, base, sum, slot, kWg * 32, weights);
      ptx::named_barrier_sync<kP1Ready, kConsumerThreads>();
      if (this->any_scaled(alpha[0], alpha[1])) this->rescale(o, alpha[0], alpha[1]);
      this->issue_pv_shared(o, slot, tile > item.begin_tile);
      // Drained at once: the sooner the slot is free, the more is in flight from memory.
      ptx::wgmma_wait<0>();
      this->release(slot);
    }
  }
};

}  // namespace flash_mla::sm90
