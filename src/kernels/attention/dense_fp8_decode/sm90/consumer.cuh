#pragma once

// A consumer warpgroup, kWg 0 or 1. Tiles are taken in pairs: WG0 computes S^T and the softmax of the even one, WG1 of
// the odd one; each accumulates half of O's columns over both, V^T made from the stage's bytes where it is needed.
//
//   WG0   QK0 | softmax0 | O_left  += P0 V0 | O_left  += P1 V1 | next pair
//   WG1         QK1 | softmax1 | O_right += P0 V0 | O_right += P1 V1 | next pair
//
// WG1 issues its QK after WG0's, so that softmax0 runs under QK1 and softmax1 under P0 V0 of WG0. A product's A is made
// in registers while the one before it runs, in two sets by turns.

#include <cstdint>

#include "kernels/attention/dense_fp8_decode/sm90/epilogue.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/fragments.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/query.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/smem.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/softmax.cuh"

namespace flash_mla::sm90::dense_fp8 {

template <bool kBf16, KvFormat kFormat, int kHeads, int kWg>
struct Consumer {
  using Row = RowOf<kFormat>;
  static constexpr bool kScaled = Row::kScaled;
  static constexpr int kScores = kHeads / 2, kBarrier = kWg == 0 ? kWg0 : kWg1;
  using Scales = KeyScales<kScaled>;
  using Out = float[4][kScores];  // by 64 columns, two for each lane

  const DenseFp8Params& p;
  Smem<kHeads>& s;
  const int warp, lane, g, t;  // in the warpgroup; lane = 4 g + t
  int stage = 0;               // of the item's next even tile, and the parity of its barrier
  std::uint32_t parity = 0;

  __device__ Consumer(const DenseFp8Params& params, Smem<kHeads>& smem)
      : p(params),
        s(smem),
        warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32),
        g(lane / 4),
        t(lane % 4) {}

  __device__ void run(const PartRange& part) {
    const Epilogue<kBf16, kHeads, kWg> epilogue{p, s, warp, g, t};
    std::uint32_t q_parity = 0;
    const auto walk = walk_of(p, part);
    for (Item item = walk.first(); walk.holds(item); item = walk.next(item)) {
      if (item.begin_block >= item.end_block) {
        epilogue.store_empty(item);
        continue;
      }
      ptx::mbarrier_wait(&s.q_full, q_parity);
      q_parity ^= 1;
      begin_item(item);
      Out o;
#pragma unroll
      for (auto& block : o) {
#pragma unroll
        for (float& x : block) x = 0.0f;
      }
      float sum[2] = {0.0f, 0.0f};
      if constexpr (kWg == 0) {
        even_tiles(o, item, sum);
      } else {
        odd_tiles(o, item, sum);
      }
      epilogue.finish(item, o, sum);
    }
  }

 private:
  __device__ void begin_item(const Item& item) {
    convert_query<kBf16, kScaled>(s, p.scale_log2 * p.cache_scale);
    const int row = static_cast<int>(threadIdx.x);
    if (row < kHeads) {
      s.reference[row] = -INFINITY;
      s.base[row] = Base{0.0f, -INFINITY};
      s.limit[row] = limit_of(p, item, row);
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_sync<kItem, kConsumerThreads>();
  }

  // ---- stages

  __device__ void advance_stage() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ void wait_for_stage() const { ptx::mbarrier_wait(&s.kv_full[stage], parity); }
  // This warp has read all that it wants of the stage.
  __device__ void release() const {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&s.kv_empty[stage]);
  }
  // Rows from `count` on become zero: P is zero there, but 0 * NaN is not.
  __device__ void clear_rows(int count) const {
    constexpr int kWords = Row::kPitch / 16;
    auto* const to = reinterpret_cast<uint4*>(&s.raw[stage][count * Row::kPitch]);
    for (int i = static_cast<int>(threadIdx.x) % 128; i < (kTileTokens - count) * kWords; i += 128)
      to[i] = uint4{0, 0, 0, 0};
    ptx::fence_async_proxy();
    ptx::named_barrier_sync<kBarrier, 128>();
  }

  // ---- S^T = K Q^T

  __device__ const std::byte* key_row(int h) const {
    return &s.raw[stage][key_of_row(warp * 16 + g + 8 * h) * Row::kPitch];
  }
  // Of this lane's two keys, the columns of chunk c that it takes.
  __device__ void load_keys(uint4 (&x)[2], const std::byte* first, const std::byte* second, int c) const {
    x[0] = load_as<uint4>(first + c * kChunkColumns + key_column(t));
    x[1] = load_as<uint4>(second + c * kChunkColumns + key_column(t));
  }
  template <bool kRope>
  __device__ void issue_chunk(float (&scores)[kScores], const Fragment (&a)[4], int c) const {
    const auto q = s.q.k_major();
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      ptx::wgmma_rs<kRope, false>(scores, a[i], q.step(4 * c + i).descriptor, c + i > 0);
    ptx::wgmma_commit();
  }

  // Of the tile in the current stage, `count` keys; not waited for.
  __device__ void issue_qk(float (&scores)[kScores], Scales& scales, int count) {
    wait_for_stage();
    if (count < kTileTokens) clear_rows(count);
    const std::byte *const first = key_row(0), *const second = key_row(1);
    scales.read(first, second);
    Fragment a[2][4];
    uint4 x[2];
    load_keys(x, first, second, 0);
    chunk<0>(scores, scales, a[0], x, first, second);
    chunk<1>(scores, scales, a[1], x, first, second);
    chunk<2>(scores, scales, a[0], x, first, second);
    chunk<3>(scores, scales, a[1], x, first, second);
    chunk<4>(scores, scales, a[0], x, first, second);
    chunk<5>(scores, scales, a[1], x, first, second);
    chunk<6>(scores, scales, a[0], x, first, second);
    chunk<7>(scores, scales, a[1], x, first, second);
    if constexpr (kScaled) {
      ptx::wgmma_wait<1>();
      rope_chunk(scores, scales, a[0], first, second);
    } else {
      chunk<8>(scores, scales, a[0], x, first, second);
    }
  }
  template <int kChunk>
  __device__ void chunk(float (&scores)[kScores], const Scales& scales, Fragment (&a)[4], uint4 (&x)[2],
                        const std::byte* first, const std::byte* second) const {
    constexpr int kTile = kChunk < 8 ? kChunk * kChunkColumns / kScaleTile : 0;
    constexpr int kLast = kScaled ? 7 : 8;
    if (kChunk >= 2) ptx::wgmma_wait<1>();  // `a` has been read
    key_fragments<kScaled>(a, x, scales.template of<kTile>(0), scales.template of<kTile>(1));
    if (kChunk < kLast) load_keys(x, first, second, kChunk + 1);
    issue_chunk<false>(scores, a, kChunk);
  }
  __device__ void rope_chunk(float (&scores)[kScores], const Scales& scales, Fragment (&a)[4],
                             const std::byte* first, const std::byte* second) const {
    const int offset = Row::kRopeOffset + key_column(t) * 2;
    const __nv_bfloat162 f0 = scales.of_rope(0), f1 = scales.of_rope(1);
    rope_fragments<0>(a, load_as<uint4>(first + offset), load_as<uint4>(second + offset), f0, f1);
    rope_fragments<1>(a, load_as<uint4>(first + offset + 16), load_as<uint4>(second + offset + 16), f0, f1);
    issue_chunk<true>(scores, a, 8);
  }

  // ---- O^T += V^T P^T

  __device__ void load_values(uint2 (&x)[4], const std::byte* from, int slice) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      x[j] = load_as<uint2>(from + key_of_row(16 * slice + value_position(t, j)) * Row::kPitch);
  }
  // Of the tile in the current stage, whose P lies in `slot`. Releases the stage; waited for.
  __device__ void add_values(Out& o, int slot) {
    wait_for_stage();
    const int column = value_column(kWg, warp, g);
    const std::byte* const from = &s.raw[stage][column];
    const __half* const factors = s.factor[slot][column / kScaleTile];
    const auto weights = s.weights[slot].k_major();
    Fragment a[2][4];
    uint2 x[4];
    load_values(x, from, 0);
#pragma unroll
    for (int i = 0; i < kTileTokens / 16; ++i) {
      if (i >= 2) ptx::wgmma_wait<1>();
      __half2 low{}, high{};
      if constexpr (kScaled) {
        low = *reinterpret_cast<const __half2*>(&factors[16 * i + 2 * t]);
        high = *reinterpret_cast<const __half2*>(&factors[16 * i + 2 * t + 8]);
      }
      value_fragments<kScaled>(a[i % 2], x, low, high);
      if (i < kTileTokens / 16 - 1) load_values(x, from, i + 1);
      ptx::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j)
        ptx::wgmma_rs<false, false>(o[j], a[i % 2][j], weights.step(i).descriptor, true);
      ptx::wgmma_commit();
    }
    release();
    advance_stage();
    ptx::wgmma_wait<0>();
  }

  // Follows a move of the reference.
  __device__ void rescale(Out& o, int slot) const {
#pragma unroll
    for (int n = 0; n < kHeads / 8; ++n) {
      const auto alpha = *reinterpret_cast<const float2*>(&s.alpha[slot][8 * n + 2 * t]);
#pragma unroll
      for (auto& block : o) {
        block[4 * n] *= alpha.x;
        block[4 * n + 1] *= alpha.y;
        block[4 * n + 2] *= alpha.x;
        block[4 * n + 3] *= alpha.y;
      }
    }
  }

  // ---- the tiles of an item

  __device__ bool is_limited(const Item& item, int tile) const {
    const int last_limit = p.causal ? item.length - p.s_q + 1 : item.length;
    return (tile + 1) * kTileTokens > last_limit;
  }
  __device__ bool compute_weights(float (&scores)[kScores], const Scales& scales, const Item& item, int tile,
                                  float (&sum)[2]) const {
    const Softmax<kHeads, kWg> softmax{s, warp, g, t};
    scales.publish(s.factor[kWg], warp * 16 + g, t);
    return softmax.run(scores, scales, is_limited(item, tile), tile * kTileTokens, sum);
  }
  __device__ void follow(Out& o, float (&sum)[2], int slot) const {
    if (s.moved[slot] == 0) return;
    rescale(o, slot);
    Softmax<kHeads, kWg>{s, warp, g, t}.follow(sum, slot);
  }
  __device__ void release_q() const {
    if (lane == 0) ptx::mbarrier_arrive(&s.q_empty);
  }

  // As WG0 sees them: begin, begin + 2, ...
  __device__ void even_tiles(Out& o, const Item& item, float (&sum)[2]) {
    float scores[kScores];
    Scales scales;
    for (int tile = item.begin_block; tile < item.end_block; tile += 2) {
      const bool paired = tile + 1 < item.end_block;
      issue_qk(scores, scales, min(item.length - tile * kTileTokens, kTileTokens));
      if (paired) ptx::named_barrier_arrive<kOrder, kConsumerThreads>();
      ptx::wgmma_wait<0>();
      if (tile + 2 >= item.end_block) release_q();
      // WG1 has read the last pair's P0.
      if (tile > item.begin_block) ptx::named_barrier_sync<kP0Free, kConsumerThreads>();
      const bool moved = compute_weights(scores, scales, item, tile, sum);
      ptx::named_barrier_arrive<kP0Ready, kConsumerThreads>();
      ptx::named_barrier_sync<kBarrier, 128>();
      if (moved) rescale(o, 0);
      add_values(o, 0);
      if (!paired) break;
      ptx::named_barrier_sync<kP1Ready, kConsumerThreads>();
      follow(o, sum, 1);
      add_values(o, 1);
    }
  }

  // As WG1 sees them: begin + 1, begin + 3, ...
  __device__ void odd_tiles(Out& o, const Item& item, float (&sum)[2]) {
    float scores[kScores];
    Scales scales;
    int tile = item.begin_block + 1;
    if (tile >= item.end_block) release_q();
    for (; tile < item.end_block; tile += 2) {
      ptx::named_barrier_sync<kOrder, kConsumerThreads>();
      const int even_stage = stage;
      const std::uint32_t even_parity = parity;
      advance_stage();
      issue_qk(scores, scales, min(item.length - tile * kTileTokens, kTileTokens));
      stage = even_stage;
      parity = even_parity;
      ptx::wgmma_wait<0>();
      if (tile + 2 >= item.end_block) release_q();
      ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
      follow(o, sum, 0);
      const bool moved = compute_weights(scores, scales, item, tile, sum);
      ptx::named_barrier_arrive<kP1Ready, kConsumerThreads>();
      ptx::named_barrier_sync<kBarrier, 128>();
      add_values(o, 0);
      if (tile + 1 < item.end_block) ptx::named_barrier_arrive<kP0Free, kConsumerThreads>();
      if (moved) rescale(o, 1);
      add_values(o, 1);
    }
    if (tile == item.end_block) {
      // The last even tile has no partner.
      ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
      follow(o, sum, 0);
      add_values(o, 0);
    }
  }
};

}  // namespace flash_mla::sm90::dense_fp8
