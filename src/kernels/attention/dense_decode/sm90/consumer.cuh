#pragma once

// What the consumer warpgroups have in common, however a tile is divided between them: where rows go, masks,
// rescaling, releasing slots, storing results. kWg is 0 or 1; a warpgroup owns columns kWg * 256 to + 255 of
// O.

#include <cstdint>

#include "kernels/attention/dense_decode/sm90/smem.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace flash_mla::sm90 {

template <bool kBf16, int kCluster, int kWg>
struct ConsumerBase {
  const DecodeParams& p;
  DecodeSmem<ptx::Element<kBf16>>& s;
  const int warp, lane;       // in the warpgroup
  const int row;              // this thread's rows are `row` and `row + 8`
  std::uint32_t item_parity;  // of q_full
  float reference[2];         // of the softmax, per row, base 2; -inf until a key has been seen

  __device__ ConsumerBase(const DecodeParams& params, DecodeSmem<ptx::Element<kBf16>>& smem)
      : p(params),
        s(smem),
        warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32),
        row(warp * 16 + lane / 4) {}

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

  // First key that a row does not see.
  __device__ int limit_of(const Item& item, int r) const {
    if (!p.causal) return item.length;
    return min(item.length - p.s_q + place_of(p.blocks, static_cast<int>(blockIdx.x), r).token + 1,
               item.length);
  }

  // Scores that a row does not see become -inf.
  __device__ void mask(float (&x)[32], const Item& item, int tile) const {
    const int last_limit = p.causal ? item.length - p.s_q + 1 : item.length;
    if ((tile + 1) * kTileTokens <= last_limit) return;
    const int l0 = limit_of(item, row) - tile * kTileTokens,
              l1 = limit_of(item, row + 8) - tile * kTileTokens;
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

  // This thread's first row, in a form the compiler knows nothing about: it would compute an item's addresses
  // ahead of all tiles and keep them in registers that the tiles need.
  __device__ int epilogue_row() const {
    int r = row;
    asm volatile("" : "+r"(r));
    return r;
  }

  // Where row r of this CTA's block goes; false if it is padding.
  __device__ bool locate(int r, int& token, int& head) const {
    const RowPlace place = place_of(p.blocks, static_cast<int>(blockIdx.x), r);
    token = place.token;
    head = static_cast<int>(blockIdx.y) * p.group + place.head;
    return r < p.blocks.tokens * p.blocks.heads && token < p.s_q && place.head < p.group;
  }
  // This CTA's row block among those of a partial result's slot.
  __device__ std::int64_t partial_block(const Item& item) const {
    const int blocks = p.blocks.count();
    return (static_cast<std::int64_t>(item.slot) * gridDim.y + blockIdx.y) * blocks + blockIdx.x;
  }
  __device__ std::uint16_t* out_row(const Item& item, int token, int head) const {
    return static_cast<std::uint16_t*>(p.out) + item.req * p.out_stride_b + token * p.out_stride_s +
           head * p.out_stride_h;
  }
  __device__ void store_lse(const Item& item, int token, int head, float lse) const {
    // WG1: WG0 is the one that the next item waits for.
    if (kWg != 1 || lane % 4 != 0 || p.lse == nullptr) return;
    p.lse[item.req * p.lse_stride_b + head * p.lse_stride_h + token * p.lse_stride_s] = lse;
  }

  // A split's result as it stands in the registers: 512 contiguous bytes per warp and instruction, and as
  // little code as possible, for a small batch runs it once from a cold instruction cache.
  __device__ void store_partial(const Item& item, const float (&o)[128], const float (&sum)[2]) const {
    const int groups = row_groups(p.blocks);
    if (warp >= groups) return;
    const std::int64_t block = partial_block(item);
    store_stats(block, sum);
    float4* to =
        reinterpret_cast<float4*>(p.partial_out) + ((block * groups + warp) * 2 + kWg) * kFragment + lane;
#pragma unroll
    for (int i = 0; i < 32; ++i) to[i * 32] = float4{o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]};
  }
  __device__ void store_stats(std::int64_t block, const float (&sum)[2]) const {
    if (kWg != 0 || lane % 4 != 0) return;
    float2* stats = reinterpret_cast<float2*>(p.partial_stats) + block * row_groups(p.blocks) * 16 + row;
    stats[0] = float2{reference[0], sum[0]};
    stats[8] = float2{reference[1], sum[1]};
  }

  // What a row's O has to be multiplied with. Stores its lse.
  __device__ float finish_row(const Item& item, int h, float sum) const {
    const int r = epilogue_row() + 8 * h;
    // A row that saw no key gives 0 and lse = +inf. One whose every score is -inf gives NaN, as NaN scores
    // do.
    const bool none = sum == 0.0f, unseen = none && limit_of(item, r) <= 0;
    int token, head;
    if (locate(r, token, head)) {
      store_lse(item, token, head,
                unseen ? INFINITY
                : none ? NAN
                       : (reference[h] + log2_fast(sum)) * 0.69314718056f);
    }
    return unseen ? 0.0f : none ? NAN : 1.0f / sum;
  }

  // Writes this warpgroup's half of O and, from WG1, the lse.
  __device__ void store(const Item& item, const float (&o)[128], const float (&sum)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = finish_row(item, h, sum[h]);
      int token, head;
      const bool valid = locate(epilogue_row() + 8 * h, token, head);
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

  // Puts this warpgroup's half of O into slot 1, for a producer to copy out; the lse, from WG1, is stored
  // here.
  __device__ void stage(const Item& item, const float (&o)[128], const float (&sum)[2]) const {
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) factor[h] = finish_row(item, h, sum[h]);
    const int first = epilogue_row(), r = first / 16 * 16 + lane % 16;  // row whose address this lane gives
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const std::uint32_t chunk = ptx::smem_address(s.values(1, kWg).at(c));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = &o[32 * c + 8 * i];
        stmatrix_x4(ptx::swizzled_word(chunk, r, 2 * i + lane / 16),
                    pack2<kBf16>(x[0] * factor[0], x[1] * factor[0]),
                    pack2<kBf16>(x[2] * factor[1], x[3] * factor[1]),
                    pack2<kBf16>(x[4] * factor[0], x[5] * factor[0]),
                    pack2<kBf16>(x[6] * factor[1], x[7] * factor[1]));
      }
    }
    ptx::fence_async_proxy();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&s.out_full[kWg]);
  }

  // A request without keys.
  __device__ void store_empty(const Item& item) {
    if (item.is_split) {
      reference[0] = reference[1] = -INFINITY;
      if (warp < row_groups(p.blocks)) store_stats(partial_block(item), {0.0f, 0.0f});
      return;
    }
    for (int h = 0; h < 2; ++h) {
      int token, head;
      if (!locate(epilogue_row() + 8 * h, token, head)) continue;
      store_lse(item, token, head, INFINITY);
      std::uint16_t* to = out_row(item, token, head) + kWg * 256 + lane % 4 * 64;
      for (int i = 0; i < 64; i += 8) *reinterpret_cast<uint4*>(to + i) = uint4{0, 0, 0, 0};
    }
  }

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
        store_empty(item);
        continue;
      }
      float sum[2] = {0.0f, 0.0f};
      reference[0] = reference[1] = -INFINITY;
      item_parity = items & 1;
      ptx::mbarrier_wait(&s.q_full[0], item_parity);
      ++items;
      tiles(o, item, sum);
      add_sums(sum, items & 1);
      if (item.is_split) {
        store_partial(item, o, sum);
      } else if (is_staged<kCluster>(p, item)) {
        stage(item, o, sum);
      } else {
        store(item, o, sum);
      }
    }
  }
};

}  // namespace flash_mla::sm90
