#pragma once

// The warpgroup of scores: S^T = K Q^T of a tile of 64 keys, its softmax, and P for the warpgroups of values.
//
// Warp w has keys 16 w to 16 w + 15, a slot of the ring; the thread of lane 4 g + c has keys g and g + 8 of them and, of
// every eight heads, 2 c and 2 c + 1. Of a row's block b of 128 columns it loads the 16 bytes at 128 b + 32 c + 16 j for
// j 0 and 1 (the eight lanes of a load's phase hit all banks), and takes four bytes of each for an instruction's k. So
// element k = 8 h + 2 c + e of instruction t of chunk 2 b + j is column 128 b + 32 c + 16 j + 4 t + 2 h + e: Q lies in
// that order. Scales are applied to a block's sums, in fp32.
//
// The softmax's reference moves only when a score passes it by 2^8: the four warps agree on that by one barrier a tile.
// P goes to shared memory four times, once for each block, times that block's scale of its key.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/fp8_decode/sm90/query.cuh"
#include "kernels/attention/fp8_decode/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace flash_mla::sm90::fp8_decode {

template <int kHeads, class Work>
struct Scores {
  static constexpr int kSums = kHeads / 2;      // of a thread: two keys' scores
  static constexpr int kOwnHeads = kHeads / 4;  // of a thread: 8 j + 2 c + e is number 2 j + e
  static constexpr float kNever = -100.0f;      // exponent of the scales before any has been seen

  const Work& work;
  Smem<kHeads>& s;
  const int warp, lane;
  float exponent = kNever;  // scales seen so far are at most 2^exponent; the same in all threads

  __device__ Scores(const Work& w, Smem<kHeads>& smem)
      : work(w),
        s(smem),
        warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    RingPlace<kHeads> place(warp);
    int tiles = 0, items = 0;
    const auto walk = work.walk();
    for (auto item = walk.first(); walk.holds(item); item = walk.next(item)) {
      if (item.begin_block >= item.end_block) {
        store_empty(item);
        continue;
      }
      exponent = kNever;
      if (threadIdx.x % kGroupThreads < kHeads) s.reference[threadIdx.x % kGroupThreads] = -INFINITY;
      const auto q_factors = load_query(work, s, item);  // ends in a barrier of this warpgroup
      float sum[kOwnHeads] = {};
      float highest[Work::kMaxima ? kOwnHeads : 1];
      for (float& x : highest) x = -INFINITY;
      for (int tile = item.begin_block; tile < item.end_block; ++tile, ++tiles) {
        float x[kSums], scale[2][kBlocks];
        bool known[2];
        ptx::mbarrier_wait(&s.rows_full[place.slot], place.phase);
        score(x, scale, known, place.slot, q_factors);
        work.mask(x, item, tile, warp, lane, known);
        if constexpr (Work::kMaxima) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) highest[head_of(i)] = fmaxf(highest[head_of(i)], x[i]);
        }
        exponentiate(x, scale, sum, tiles);
        place.advance(kGroups);
      }
      finish(item, sum, highest, items++);
    }
  }

  // ---- products

  // The rows' words that two instructions take.
  struct Words {
    uint4 first, second;
  };
  __device__ static Words load_words(std::uint32_t at) {
    return {ptx::load_shared<uint4>(at), ptx::load_shared<uint4>(at + 8 * kRowStride)};
  }
  __device__ static void widen(std::uint32_t (&a)[4], std::uint32_t first, std::uint32_t second) {
    a[0] = widen_low(first);
    a[1] = widen_low(second);
    a[2] = widen_high(first);
    a[3] = widen_high(second);
  }

  // x = scale_log2 q k, of this warp's 16 keys: 16 units of two instructions for the latent, two for the rope part. A
  // unit is made while the one before it runs.
  __device__ void score(float (&x)[kSums], float (&scale)[2][kBlocks], bool (&known)[2], int slot,
                        const QueryFactors<kHeads>& q_factors) {
    const std::uint32_t rows = ptx::smem_address(s.rows[slot]) + lane / 4 * kRowStride;
    const std::uint32_t at = rows + lane % 4 * 32;
    float sums[kSums];
    std::uint32_t a[2][2][4];
    const auto q = s.q.k_major();
    Words w = load_words(at);
    load_scales(scale, known, rows, slot);
#pragma unroll
    for (int u = 0; u < 16; ++u) {
      const int b = u / 4;
      if (u >= 2) ptx::wgmma_wait<1>();  // unit u - 2 has read its registers
      if (u % 2 == 0) {
        widen(a[0][0], w.first.x, w.second.x);
        widen(a[0][1], w.first.y, w.second.y);
      } else {
        widen(a[1][0], w.first.z, w.second.z);
        widen(a[1][1], w.first.w, w.second.w);
        const int chunk = (u + 1) / 2;
        w = load_words(u < 15 ? at + chunk / 2 * 128 + chunk % 2 * 16 : at + Row::kRopeOffset);
      }
      if (u % 4 == 0 && u > 0) add_block(x, sums, scale, b - 1);
      ptx::wgmma_fence();
      ptx::wgmma(sums, a[u % 2][0], q.step(2 * u), u % 4 > 0);
      ptx::wgmma(sums, a[u % 2][1], q.step(2 * u + 1), true);
      ptx::wgmma_commit();
    }
    add_block(x, sums, scale, 3);
    const Words second = load_words(at + Row::kRopeOffset + 16);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&s.rows_empty[slot]);
    const std::uint32_t rope[4][4] = {
        {rope_pair(w.first.x), rope_pair(w.second.x), rope_pair(w.first.y), rope_pair(w.second.y)},
        {rope_pair(w.first.z), rope_pair(w.second.z), rope_pair(w.first.w), rope_pair(w.second.w)},
        {rope_pair(second.first.x), rope_pair(second.second.x), rope_pair(second.first.y),
         rope_pair(second.second.y)},
        {rope_pair(second.first.z), rope_pair(second.second.z), rope_pair(second.first.w),
         rope_pair(second.second.w)}};
    using RopeTile = ptx::Tile<ptx::Element<Work::kBf16>, kHeads, kv::kRopeWidth>;
    const auto q_rope = reinterpret_cast<RopeTile&>(s.q_rope).k_major();
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::wgmma(sums, rope[i], q_rope.step(i), i > 0);
    ptx::wgmma_commit();
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] *= work.scale_log2() * q_factors.of[2 * i / kScaledHeads<kHeads>];
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] = fmaf(sums[i], work.scale_log2(), x[i]);
  }
  // Two bfloat16 of a row as Q's type.
  __device__ static std::uint32_t rope_pair(std::uint32_t x) {
    if constexpr (Work::kBf16) return x;
    const float2 f = floats<true>(x);
    return pack2<false>(f.x, f.y);
  }
  __device__ void load_scales(float (&scale)[2][kBlocks], bool (&known)[2], std::uint32_t rows,
                              int slot) const {
    const std::uint32_t valid = s.valid[slot];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 x = ptx::load_shared<uint4>(rows + 8 * h * kRowStride + Row::kScaleOffset);
      scale[h][0] = __uint_as_float(x.x);
      scale[h][1] = __uint_as_float(x.y);
      scale[h][2] = __uint_as_float(x.z);
      scale[h][3] = __uint_as_float(x.w);
      known[h] = (valid >> (lane / 4 + 8 * h) & 1) != 0;
    }
  }
  // x (+)= scale * sums of block b, once they are there.
  __device__ void add_block(float (&x)[kSums], const float (&sums)[kSums], const float (&scale)[2][kBlocks],
                            int b) {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float f = scale[i % 4 / 2][b];
      x[i] = b == 0 ? sums[i] * f : fmaf(sums[i], f, x[i]);
    }
  }

  // ---- softmax

  __device__ float2 references(int j) const {
    return *reinterpret_cast<const float2*>(&s.reference[8 * j + lane % 4 * 2]);
  }

  // P of a tile, into the buffer of weights that it takes; its sums.
  __device__ void exponentiate(float (&x)[kSums], float (&scale)[2][kBlocks], float (&sum)[kOwnHeads],
                               int tile) {
    const int buffer = tile % kWeightBuffers<kHeads>;
    const std::uint32_t phase = tile / kWeightBuffers<kHeads> & 1;
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) largest = fmaxf(largest, fabsf(scale[i / kBlocks][i % kBlocks]));
    bool passes = largest > exp2_fast(exponent);
    float base[kOwnHeads];
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      const float2 reference = references(j);
      base[2 * j] = reference.x;
      base[2 * j + 1] = reference.y;
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) passes |= x[i] > base[head_of(i)] + kMaxGrowth;
    const bool moved = any_of_group(passes);
    ptx::mbarrier_wait(&s.weights_empty[buffer], phase ^ 1);
    if (moved) move_references(x, largest, base, sum, buffer);
    if (threadIdx.x % kGroupThreads == 0) s.rescaled[buffer] = moved;
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i) base[i] = base[i] == -INFINITY ? 0.0f : base[i];
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] = exp2_fast(x[i] - base[head_of(i)]);
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
      sum[head_of(i)] += x[i] + x[i + 2];
      sum[head_of(i + 1)] += x[i + 1] + x[i + 3];
    }
    store_weights(x, scale, buffer);
    ptx::fence_async_proxy();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&s.weights_full[buffer]);
  }
  // Number among a thread's own heads of its i-th score.
  __device__ static constexpr int head_of(int i) { return i / 4 * 2 + i % 2; }

  // True in all threads of the warpgroup if it is in one.
  __device__ static bool any_of_group(bool x) {
    return ptx::named_barrier_or<kScoresReady, kGroupThreads>(x);
  }
  __device__ static void wait_for_group() { ptx::named_barrier_sync<kScoresReady, kGroupThreads>(); }

  // Moves the references that this tile's scores pass, and the exponent of the scales.
  __device__ void move_references(const float (&x)[kSums], float largest, float (&base)[kOwnHeads],
                                  float (&sum)[kOwnHeads], int buffer) {
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i) {
      float best = fmaxf(x[i / 2 * 4 + i % 2], x[i / 2 * 4 + i % 2 + 2]);
      for (int step = 4; step < 32; step *= 2) best = fmaxf(best, __shfl_xor_sync(0xFFFFFFFFu, best, step));
      if (lane < 4) s.exchange[warp][i / 2 * 8 + lane * 2 + i % 2] = best;
    }
    for (int step = 1; step < 32; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
    if (lane == 0) s.warp_scale[warp] = largest;
    wait_for_group();
    for (int i = 0; i < kWarpsOfGroup; ++i) largest = fmaxf(largest, s.warp_scale[i]);
    const float before = exponent;
    // Scales that are infinite are no measure of the others.
    if (largest > exp2f(exponent) && largest < INFINITY) exponent = static_cast<float>(ilogbf(largest) + 1);
    const float shift = exp2f(before - exponent);
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i) {
      const int head = i / 2 * 8 + lane % 4 * 2 + i % 2;
      float best = s.exchange[0][head];
      for (int w = 1; w < kWarpsOfGroup; ++w) best = fmaxf(best, s.exchange[w][head]);
      const float to = best > base[i] + kMaxGrowth ? best : base[i];
      const float alpha = to == base[i] || base[i] == -INFINITY ? 1.0f : exp2_fast(base[i] - to);
      sum[i] *= alpha;
      base[i] = to;
      if (warp == 0 && lane < 4) {
        s.reference[head] = to;
        s.rescale[buffer][head] = alpha * shift;
      }
    }
    wait_for_group();
  }

  // P times a block's scales, for each block: (heads, keys).
  __device__ void store_weights(const float (&x)[kSums], const float (&scale)[2][kBlocks], int buffer) {
    const float unit = exp2f(static_cast<float>(kWeightShift) - exponent);
    const int head = lane / 16 * 8 + lane % 8,
              word = 2 * warp + lane / 8 % 2;  // what this lane gives the address of
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const float f0 = scale[0][b] * unit, f1 = scale[1][b] * unit;
      const std::uint32_t to = ptx::smem_address(s.weights[buffer][b].at(0));
#pragma unroll
      for (int j = 0; j < kHeads / 8; j += 2) {
        const float* y = &x[4 * j];
        stmatrix_x4_transposed(ptx::swizzled_word(to, 8 * j + head, word), pack2<false>(y[0] * f0, y[1] * f0),
                               pack2<false>(y[2] * f1, y[3] * f1), pack2<false>(y[4] * f0, y[5] * f0),
                               pack2<false>(y[6] * f1, y[7] * f1));
      }
    }
  }

  // ---- the end of an item

  // The sums of all keys, the lse or the statistics of a split, and what O is multiplied with.
  template <class Item, int kMaxima>
  __device__ void finish(const Item& item, float (&sum)[kOwnHeads], float (&highest)[kMaxima], int items) {
    const int row = static_cast<int>(threadIdx.x) % kGroupThreads;
    float of_row = 0.0f;
    if constexpr (Work::kMaxima) {
#pragma unroll
      for (int i = 0; i < kOwnHeads; ++i) {
        for (int step = 4; step < 32; step *= 2)
          highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xFFFFFFFFu, highest[i], step));
        if (lane < 4) s.exchange[warp][i / 2 * 8 + lane * 2 + i % 2] = highest[i];
      }
      wait_for_group();
      of_row = s.exchange[0][row % kHeads];
      for (int w = 1; w < kWarpsOfGroup; ++w) of_row = fmaxf(of_row, s.exchange[w][row % kHeads]);
      wait_for_group();
    }
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i) {
      for (int step = 4; step < 32; step *= 2) sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], step);
      if (lane < 4) s.exchange[warp][i / 2 * 8 + lane * 2 + i % 2] = sum[i];
    }
    wait_for_group();
    ptx::mbarrier_wait(&s.end_empty, (items & 1) ^ 1);
    if (row < kHeads) {
      float total = s.exchange[0][row];
      for (int w = 1; w < kWarpsOfGroup; ++w) total += s.exchange[w][row];
      const float unit = exp2f(exponent - static_cast<float>(kWeightShift));
      if (item.is_split) {
        work.store_stats(item, row, s.reference[row], total);
        s.factor[row] = unit;
      } else {
        s.factor[row] = work.finish_row(item, row, s.reference[row], total, of_row) * unit;
      }
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&s.end_full);
    wait_for_group();  // Q and the references are the next item's
  }
  // A request without keys: what is not O.
  template <class Item>
  __device__ void store_empty(const Item& item) {
    const int row = static_cast<int>(threadIdx.x) % kGroupThreads;
    if (row >= kHeads) return;
    if (item.is_split) {
      work.store_stats(item, row, -INFINITY, 0.0f);
    } else {
      work.finish_row(item, row, -INFINITY, 0.0f, -INFINITY);
    }
  }
};

}  // namespace flash_mla::sm90::fp8_decode
