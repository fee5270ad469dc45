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

  __device__ std::uint32_t stage_address() const { return ptx::smem_address(s.raw[stage]); }
  // Of this lane's two keys, which follow each other, the columns of chunk c that it takes. `first`: of the first key,
  // where the lane's columns of chunk 0 are.
  __device__ static void load_keys(uint4 (&x)[2], std::uint32_t first, int c) {
    static_assert(key_of_row(8) == key_of_row(0) + 1);
    x[0] = ptx::load_shared<uint4>(first + c * kChunkColumns);
    x[1] = ptx::load_shared<uint4>(first + c * kChunkColumns + Row::kPitch);
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
    const std::uint32_t row = stage_address() + key_of_row(warp * 16 + g) * Row::kPitch,
                        first = row + key_column(t);
    scales.read(row, Row::kPitch);
    Fragment a[2][4];
    chunk<0>(scores, scales, a[0], first);
    chunk<1>(scores, scales, a[1], first);
    chunk<2>(scores, scales, a[0], first);
    chunk<3>(scores, scales, a[1], first);
    chunk<4>(scores, scales, a[0], first);
    chunk<5>(scores, scales, a[1], first);
    chunk<6>(scores, scales, a[0], first);
    chunk<7>(scores, scales, a[1], first);
    if constexpr (kScaled) {
      ptx::wgmma_wait<1>();
      rope_chunk(scores, scales, a[0], row);
    } else {
      chunk<8>(scores, scales, a[0], first);
    }
  }
  template <int kChunk>
  __device__ void chunk(float (&scores)[kScores], const Scales& scales, Fragment (&a)[4],
                        std::uint32_t first) const {
    constexpr int kTile = kChunk < 8 ? kChunk * kChunkColumns / kScaleTile : 0;
    uint4 x[2];
    load_keys(x, first, kChunk);
    if (kChunk >= 2) ptx::wgmma_wait<1>();  // `a` has been read
    key_fragments<kScaled>(a, x, scales.template of<kTile>(0), scales.template of<kTile>(1));
    issue_chunk<false>(scores, a, kChunk);
  }
  __device__ void rope_chunk(float (&scores)[kScores], const Scales& scales, Fragment (&a)[4],
                             std::uint32_t row) const {
    const std::uint32_t first = row + Row::kRopeOffset + key_column(t) * 2, second = first + Row::kPitch;
    const __nv_bfloat162 f0 = scales.of_rope(0), f1 = scales.of_rope(1);
    rope_fragments<0>(a, ptx::load_shared<uint4>(first), ptx::load_shared<uint4>(second), f0, f1);
    rope_fragments<1>(a, ptx::load_shared<uint4>(first + 16), ptx::load_shared<uint4>(second + 16), f0, f1);
    issue_chunk<true>(scores, a, 8);
  }

  // ---- O^T += V^T P^T

  // Eight columns of this lane's keys in a slice: the third and the fourth follow the first and the second.
  __device__ static void load_values(uint2 (&x)[4], std::uint32_t first, std::uint32_t second, int slice) {
    static_assert(key_of_row(value_position(0, 2)) == key_of_row(value_position(0, 0)) + 1);
    const int at = 16 * slice * Row::kPitch;
    x[0] = ptx::load_shared<uint2>(first + at);
    x[1] = ptx::load_shared<uint2>(second + at);
    x[2] = ptx::load_shared<uint2>(first + at + Row::kPitch);
    x[3] = ptx::load_shared<uint2>(second + at + Row::kPitch);
  }
  // Of the tile in the current stage, whose P lies in `slot`. Releases the stage; waited for.
  __device__ void add_values(Out& o, int slot) {
    wait_for_stage();
    const int column = value_column(kWg, warp, g);
    const std::uint32_t from = stage_address() + column,
                        first = from + key_of_row(value_position(t, 0)) * Row::kPitch,
                        second = from + key_of_row(value_position(t, 1)) * Row::kPitch;
    const std::uint32_t factors = ptx::smem_address(&s.factor[slot][column / kScaleTile][2 * t]);
    const auto weights = s.weights[slot].k_major();
    Fragment a[2][4];
    uint2 x[4];
#pragma unroll
    for (int i = 0; i < kTileTokens / 16; ++i) {
      load_values(x, first, second, i);
      if (i >= 2) ptx::wgmma_wait<1>();  // a[i % 2] has been read
      __half2 low{}, high{};
      if constexpr (kScaled) {
        low = as_half2(ptx::load_shared<std::uint32_t>(factors + 32 * i));
        high = as_half2(ptx::load_shared<std::uint32_t>(factors + 32 * i + 16));
      }
      value_fragments<kScaled>(a[i % 2], x, low, high);
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
      const auto alpha =
          ptx::load_shared<float2>(ptx::smem_address(&s.alpha[slot][2 * t]) + n * 8 * sizeof(float));
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
    if (ptx::load_shared<int>(ptx::smem_address(&s.moved[slot])) == 0) return;
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
        // One copy of the products' code: both warpgroups' loops have to stay in the instruction cache.
#pragma unroll 1
      for (int slot = 0;; slot = 1) {
        add_values(o, slot);
        if (slot == 1 || !paired) break;
        ptx::named_barrier_sync<kP1Ready, kConsumerThreads>();
        follow(o, sum, 1);
      }
    }
  }

  // As WG1 sees them: begin + 1, begin + 3, ..., and O of the even ones too.
  __device__ void odd_tiles(Out& o, const Item& item, float (&sum)[2]) {
    float scores[kScores];
    Scales scales;
    if (item.begin_block + 1 >= item.end_block) release_q();
    for (int tile = item.begin_block + 1; tile <= item.end_block; tile += 2) {
      const bool paired = tile < item.end_block;  // the last even tile may have no partner
      if (paired) {
        ptx::named_barrier_sync<kOrder, kConsumerThreads>();
        const int even_stage = stage;
        const std::uint32_t even_parity = parity;
        advance_stage();
        issue_qk(scores, scales, min(item.length - tile * kTileTokens, kTileTokens));
        stage = even_stage;
        parity = even_parity;
        ptx::wgmma_wait<0>();
        if (tile + 2 >= item.end_block) release_q();
      }
      ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
      follow(o, sum, 0);
      bool moved = false;
      if (paired) {
        moved = compute_weights(scores, scales, item, tile, sum);
        ptx::named_barrier_arrive<kP1Ready, kConsumerThreads>();
        ptx::named_barrier_sync<kBarrier, 128>();
      }
#pragma unroll 1
      for (int slot = 0;; slot = 1) {
        add_values(o, slot);
        if (slot == 1 || !paired) break;
        if (tile + 1 < item.end_block) ptx::named_barrier_arrive<kP0Free, kConsumerThreads>();
        if (moved) rescale(o, 1);
      }
    }
  }
};

}  // namespace flash_mla::sm90::dense_fp8
