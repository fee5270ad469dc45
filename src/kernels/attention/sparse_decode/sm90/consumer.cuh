#pragma once

// The consumer warpgroups: tiles in pairs, as those of dense decode (dense_decode/sm90/paired.cuh).
//
//   WG0   QK0 | softmax0 -> P0 | O_left  += P0 V0 | O_left  += P1 V1 | next pair
//   WG1         QK1 | O_right += P0 V0 | softmax1 -> P1 | O_right += P1 V1 | next pair
//
// A key that a list does not name counts as -inf; its bytes in the slot are zeros.

#include <cstdint>

#include "kernels/attention/sparse_decode/sm90/smem.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace flash_mla::sm90::sparse {

template <KvFormat kFormat, int kWg>
struct Consumer {
  const SparseDecodeParams& p;
  Smem& s;
  const int warp, lane;       // in the warpgroup
  const int row;              // this thread's rows are `row` and `row + 8`
  std::uint32_t item_parity;  // of q_full
  float reference[2];         // of the softmax, per row, base 2; -inf until a key has been seen

  __device__ Consumer(const SparseDecodeParams& params, Smem& smem)
      : p(params),
        s(smem),
        warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32),
        row(warp * 16 + lane / 4) {}

  // Walks the items of a part.
  __device__ void run(const PartRange& part) {
    float o[2][64];
    int items = 0, uses = 0;
    const auto walk = walk_of(p, part);
    for (Item item = walk.first(); walk.holds(item); item = walk.next(item)) {
      if (item.begin_block >= item.end_block) {
        store_empty(item);
        continue;
      }
      float sum[2] = {0.0f, 0.0f};
      reference[0] = reference[1] = -INFINITY;
      item_parity = items & 1;
      ptx::mbarrier_wait(&s.q_full, item_parity);
      ++items;
      if constexpr (kWg == 0) {
        even_tiles(o, item, uses, sum);
      } else {
        odd_tiles(o, item, uses, sum);
      }
      add_sums(sum, items & 1);
      if (item.is_split) {
        store_partial(item, o, sum);
      } else {
        store(item, o, sum);
      }
    }
  }

  // ---- products

  // S = Q K^T of the tile in `slot`, as its halves arrive.
  __device__ void issue_qk(float (&scores)[32], int slot, int& uses) {
    const std::uint32_t parity = uses++ & 1;
    const auto q = s.q.k_major(), k = s.kv[slot].k_major();
#pragma unroll
    for (int c = 0; c < FormatOf<kFormat>::kHeadDim / 64; ++c) {
      if (c == 0 || c == 4) {
        ptx::mbarrier_wait(&s.kv_full[slot][c / 4], parity);
        ptx::fence_async_proxy();
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::wgmma(scores, q.step(4 * c + i), k.step(4 * c + i), c + i > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // O half (+)= P V of keys 16 kBegin to 16 kEnd - 1 of the tile in `slot`, P from this warpgroup's registers.
  template <int kBegin = 0, int kEnd = 4>
  __device__ void issue_pv_own(float (&o)[2][64], const std::uint32_t (&weights)[4][4], int slot,
                               bool accumulate) {
    const auto left = s.values(slot, 2 * kWg).mn_major(), right = s.values(slot, 2 * kWg + 1).mn_major();
    ptx::wgmma_fence();
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      ptx::wgmma(o[0], weights[i], left.step(i), i > 0 || accumulate);
      ptx::wgmma(o[1], weights[i], right.step(i), i > 0 || accumulate);
    }
    ptx::wgmma_commit();
  }
  // The same, P from the slot.
  template <int kBegin = 0, int kEnd = 4>
  __device__ void issue_pv_shared(float (&o)[2][64], int slot, bool accumulate) {
    const auto weights = s.weights(slot).k_major();
    const auto left = s.values(slot, 2 * kWg).mn_major(), right = s.values(slot, 2 * kWg + 1).mn_major();
    ptx::wgmma_fence();
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      ptx::wgmma(o[0], weights.step(i), left.step(i), i > 0 || accumulate);
      ptx::wgmma(o[1], weights.step(i), right.step(i), i > 0 || accumulate);
    }
    ptx::wgmma_commit();
  }
  // This warpgroup is done with its half of the slot's columns.
  __device__ void release(int slot) {
    if (lane == 0) ptx::mbarrier_arrive(&s.kv_empty[slot][kWg]);
  }

  // ---- softmax

  // Scores of keys that are none become -inf.
  __device__ void mask(float (&x)[32], int slot) const {
    const uint2 valid = *reinterpret_cast<const uint2*>(s.valid[slot]);
    if ((valid.x & valid.y) == 0xFFFFFFFFu) return;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int column = i / 4 * 8 + i % 2;  // plus lane % 4 * 2
      const std::uint32_t bits = (column < 32 ? valid.x : valid.y) >> (lane % 4 * 2);
      if ((bits >> column % 32 & 1) == 0) x[i] = -INFINITY;
    }
  }

  // Moves a row's reference; returns what O and the sum have to be multiplied with.
  __device__ float move_reference(int h, float to) {
    const float alpha = reference[h] == to || reference[h] == -INFINITY ? 1.0f : exp2_fast(reference[h] - to);
    reference[h] = to;
    return alpha;
  }
  __device__ static bool any_scaled(float a0, float a1) {
    return __any_sync(0xFFFFFFFFu, a0 != 1.0f || a1 != 1.0f);
  }
  __device__ void rescale(float (&o)[2][64], float a0, float a1) {
#pragma unroll
    for (int i = 0; i < 128; i += 4) {
      float* x = &o[i / 64][i % 64];
      x[0] *= a0;
      x[1] *= a0;
      x[2] *= a1;
      x[3] *= a1;
    }
  }

  // The reference of one tile's softmax: base is what to subtract. True if O has to be multiplied with alpha.
  __device__ bool find_reference(float (&x)[32], int slot, float (&sum)[2], float (&alpha)[2],
                                 float (&base)[2]) {
    mask(x, slot);
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
  // Follows a move of the reference that the other warpgroup made.
  __device__ void take_reference(float (&o)[2][64], float (&sum)[2]) {
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
      for (int j = 0; j < 4; ++j) weights[i][j] = pack2<true>(x[8 * i + 2 * j], x[8 * i + 2 * j + 1]);
      stmatrix_x4(ptx::swizzled_word(chunk, r, 2 * i + lane / 16), weights[i][0], weights[i][1],
                  weights[i][2], weights[i][3]);
    }
    ptx::fence_async_proxy();
  }

  // ---- the tiles of an item

  // As WG0 sees them: begin, begin + 2, ...
  __device__ void even_tiles(float (&o)[2][64], const Item& item, int& uses, float (&sum)[2]) {
    float scores[32];
    std::uint32_t weights[4][4];
    float alpha[2], base[2];
    for (int tile = item.begin_block; tile < item.end_block; tile += 2) {
      const bool paired = tile + 1 < item.end_block;
      issue_qk(scores, 0, uses);
      if (paired) ptx::named_barrier_arrive<kOrder, kConsumerThreads>();
      ptx::wgmma_wait<0>();
      if (tile + 2 >= item.end_block && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
      const bool scaled = find_reference(scores, 0, sum, alpha, base);
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
      release(1);
    }
  }

  // As WG1 sees them: begin + 1, begin + 3, ...
  __device__ void odd_tiles(float (&o)[2][64], const Item& item, int& uses, float (&sum)[2]) {
    float scores[32];
    std::uint32_t weights[4][4];
    float alpha[2], base[2];
    int tile = item.begin_block + 1;
    if (tile >= item.end_block && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
    for (; tile < item.end_block; tile += 2) {
      ptx::named_barrier_sync<kOrder, kConsumerThreads>();
      issue_qk(scores, 1, uses);
      ptx::named_barrier_sync<kP0Ready, kConsumerThreads>();
      take_reference(o, sum);
      issue_pv_shared(o, 0, tile > item.begin_block + 1);
      ptx::wgmma_wait<1>();
      if (tile + 2 >= item.end_block && lane == 0) ptx::mbarrier_arrive(&s.q_empty);
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
      release(1);
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

  // ---- the end of an item

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

  // This thread's first row, in a form the compiler knows nothing about: it would compute an item's addresses ahead
  // of all tiles and keep them in registers that the tiles need.
  __device__ int epilogue_row() const {
    int r = row;
    asm volatile("" : "+r"(r));
    return r;
  }
  // Head of row r of this CTA's block; false if it is padding.
  __device__ bool locate(int r, int& head) const {
    head = (static_cast<int>(blockIdx.x) - token_of_block(p) * p.blocks.head_chunks) * kTileRows + r;
    return head < p.h_q;
  }
  __device__ std::uint16_t* out_row(const Item& item, int head) const {
    return static_cast<std::uint16_t*>(p.out) + item.req * p.out_stride_b +
           token_of_block(p) * p.out_stride_s + head * p.out_stride_h;
  }
  __device__ void store_lse(const Item& item, int head, float lse) const {
    if (kWg != 1 || lane % 4 != 0 || p.lse == nullptr) return;
    p.lse[item.req * p.lse_stride_b + head * p.lse_stride_h + token_of_block(p) * p.lse_stride_s] = lse;
  }
  __device__ std::int64_t partial_block(const Item& item) const {
    return static_cast<std::int64_t>(item.slot) * p.blocks.count() + blockIdx.x;
  }
  __device__ void store_stats(std::int64_t block, const float (&sum)[2]) const {
    if (kWg != 0 || lane % 4 != 0) return;
    float2* stats = reinterpret_cast<float2*>(p.partial_stats) + block * row_groups(p.blocks) * 16 + row;
    stats[0] = float2{reference[0], sum[0]};
    stats[8] = float2{reference[1], sum[1]};
  }
  // A split's result as it stands in the registers.
  __device__ void store_partial(const Item& item, const float (&o)[2][64], const float (&sum)[2]) const {
    const int groups = row_groups(p.blocks);
    if (warp >= groups) return;
    const std::int64_t block = partial_block(item);
    store_stats(block, sum);
    float4* to =
        reinterpret_cast<float4*>(p.partial_out) + ((block * groups + warp) * 2 + kWg) * kFragment + lane;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const float* x = &o[i / 16][i % 16 * 4];
      to[i * 32] = float4{x[0], x[1], x[2], x[3]};
    }
  }
  // What a row's O has to be multiplied with. Stores its lse, which knows nothing of the sink.
  __device__ float finish_row(const Item& item, int h, float sum) const {
    int head;
    const bool valid = locate(epilogue_row() + 8 * h, head), none = sum == 0.0f;
    if (valid) store_lse(item, head, none ? INFINITY : (reference[h] + log2_fast(sum)) * 0.69314718056f);
    if (none) return 0.0f;
    if (valid && p.attn_sink != nullptr) sum += exp2f(p.attn_sink[head] * 1.44269504089f - reference[h]);
    return 1.0f / sum;
  }
  // Writes this warpgroup's half of O and, from WG1, the lse.
  __device__ void store(const Item& item, const float (&o)[2][64], const float (&sum)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = finish_row(item, h, sum[h]);
      int head;
      const bool valid = locate(epilogue_row() + 8 * h, head);
      std::uint16_t* to = out_row(item, head) + kWg * 256 + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        std::uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* from = &o[(i + j) / 16][(i + j) % 16 * 4 + 2 * h];
          x[j] = pack2<true>(from[0] * factor, from[1] * factor);
        }
        quad_transpose(x);
        if (valid) *reinterpret_cast<uint4*>(to + i * 8) = uint4{x[0], x[1], x[2], x[3]};
      }
    }
  }
  // A request without keys.
  __device__ void store_empty(const Item& item) {
    if (item.is_split) {
      reference[0] = reference[1] = -INFINITY;
      if (warp < row_groups(p.blocks)) store_stats(partial_block(item), {0.0f, 0.0f});
      return;
    }
    for (int h = 0; h < 2; ++h) {
      int head;
      if (!locate(epilogue_row() + 8 * h, head)) continue;
      store_lse(item, head, INFINITY);
      std::uint16_t* to = out_row(item, head) + kWg * 256 + lane % 4 * 64;
      for (int i = 0; i < 64; i += 8) *reinterpret_cast<uint4*>(to + i) = uint4{0, 0, 0, 0};
    }
  }
};

}  // namespace flash_mla::sm90::sparse
