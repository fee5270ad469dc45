#pragma once

// The warpgroup of scores: S^T of a tile of 64 keys (products.cuh, which says what a thread has), its softmax, and P for
// the warpgroups of values.
//
// The softmax's reference moves only when a score passes it by 2^8: the four warps agree on that by one barrier a tile.
// P goes to shared memory once for each scale of a key: times that.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/raw_rows/sm90/products.cuh"
#include "kernels/attention/raw_rows/sm90/query.cuh"
#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::raw_rows {

template <int kHeads, class F, class Work>
struct Scores {
  using S = Smem<F, kHeads>;
  static constexpr int kSums = kHeads / 2;      // of a thread: two keys' scores
  static constexpr int kOwnHeads = kHeads / 4;  // of a thread: 8 j + 2 c + e is number 2 j + e

  /// Of the highest scores a thread keeps those of its own heads, or, of 64 heads, where registers are few, of two: the
  /// eight lanes that have the same own heads, 4 g + c, then share them out.
  static constexpr int kKeptHeads = kHeads == 64 ? 2 : kOwnHeads;

  const Work& work;
  S& s;
  const int warp, lane;
  float exponent = F::kLeastExponent;  // scales seen so far are at most 2^exponent; the same in all threads

  __device__ Scores(const Work& w, S& smem)
      : work(w),
        s(smem),
        warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    RingPlace<S::kRing> place(warp);
    int tiles = 0, items = 0;
    const auto walk = work.walk();
    for (auto item = walk.first(); walk.holds(item); item = walk.next(item)) {
      if (item.begin_block >= item.end_block) {
        store_empty(item);
        continue;
      }
      exponent = F::kLeastExponent;
      if (threadIdx.x % kGroupThreads < kHeads) s.reference[threadIdx.x % kGroupThreads] = kNoReference;
      load_query<kHeads>(work, s, item);  // ends in a barrier of this warpgroup
      float sum[kOwnHeads] = {};
      bool seen = false;  // a key, by this thread
      float highest[Work::kMaxima ? kKeptHeads : 1];
      for (float& x : highest) x = -INFINITY;
      for (int tile = item.begin_block; tile < item.end_block; ++tile, ++tiles) {
        float x[kSums];
        KeyScales<F> scales;
        ptx::mbarrier_wait(&s.rows_full[place.slot], place.phase);
        KeyProducts<F, kHeads, Work::kBf16>(s, lane, place.slot).score(x, scales, work.scale_log2());
        seen = seen || scales.known[0] || scales.known[1];
        work.mask(x, item, tile, warp, lane, scales.known);
        if constexpr (Work::kMaxima) find_highest(x, highest);
        exponentiate(x, scales, sum, tiles);
        place.advance(kGroups);
      }
      finish(item, sum, highest, seen, items++);
    }
  }

  // ---- softmax

  // Of a thread's own heads, number of the first that it keeps.
  __device__ int first_kept() const { return kKeptHeads == 2 ? lane / 4 * 2 : 0; }
  __device__ void find_highest(const float (&x)[kSums], float (&highest)[kKeptHeads]) const {
    float own[kOwnHeads];
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i) own[i] = fmaxf(x[i / 2 * 4 + i % 2], x[i / 2 * 4 + i % 2 + 2]);
    if constexpr (kKeptHeads < kOwnHeads) {
      // Each step gives half of what is left away: of the lanes that differ in bit 4, 3, 2 the upper one keeps the last.
#pragma unroll
      for (int half = kOwnHeads / 2, bit = 16; half >= kKeptHeads; half /= 2, bit /= 2) {
        const bool upper = (lane & bit) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const float other = __shfl_xor_sync(0xFFFFFFFFu, upper ? own[i] : own[i + half], bit);
          own[i] = fmaxf(upper ? own[i + half] : own[i], other);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kKeptHeads; ++i) highest[i] = fmaxf(highest[i], own[i]);
  }

  __device__ float2 references(int j) const {
    return *reinterpret_cast<const float2*>(&s.reference[8 * j + lane % 4 * 2]);
  }

  // P of a tile, into the buffer of weights that it takes; its sums.
  __device__ void exponentiate(float (&x)[kSums], const KeyScales<F>& scales, float (&sum)[kOwnHeads],
                               int tile) {
    const int buffer = tile % S::kBuffers;
    const std::uint32_t phase = tile / S::kBuffers & 1;
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * F::kKeyScales; ++i) largest = fmaxf(largest, fabsf(scales.of[i % 2][i / 2]));
    float base[kOwnHeads], growth = -INFINITY;
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      const float2 reference = references(j);
      base[2 * j] = reference.x;
      base[2 * j + 1] = reference.y;
    }
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i)
      growth = fmaxf(growth, fmaxf(x[i / 2 * 4 + i % 2], x[i / 2 * 4 + i % 2 + 2]) - base[i]);
    const bool moved = any_of_group(growth > kMaxGrowth || (F::kScaled && largest > exp2_fast(exponent)));
    ptx::mbarrier_wait(&s.weights_empty[buffer], phase ^ 1);
    if (__builtin_expect(moved, 0)) move_references(x, largest, base, sum, buffer);
    if (threadIdx.x % kGroupThreads == 0) s.rescaled[buffer] = moved;
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] = exp2_fast(x[i] - base[head_of(i)]);
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
      sum[head_of(i)] += x[i] + x[i + 2];
      sum[head_of(i + 1)] += x[i + 1] + x[i + 3];
    }
    store_weights(x, scales, buffer);
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
    if (F::kScaled && largest > exp2f(exponent) && largest < INFINITY)
      exponent = static_cast<float>(ilogbf(largest) + 1);
    const float shift = exp2f(before - exponent);
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i) {
      const int head = i / 2 * 8 + lane % 4 * 2 + i % 2;
      float best = s.exchange[0][head];
      for (int w = 1; w < kWarpsOfGroup; ++w) best = fmaxf(best, s.exchange[w][head]);
      const float to = best > base[i] + kMaxGrowth ? best : base[i];
      const float alpha = to == base[i] ? 1.0f : exp2_fast(base[i] - to);
      sum[i] *= alpha;
      base[i] = to;
      if (warp == 0 && lane < 4) {
        s.reference[head] = to;
        s.rescale[buffer][head] = alpha * shift;
      }
    }
    wait_for_group();
  }

  // What every P is multiplied with, so that it is a good fp16.
  __device__ float weight_unit() const {
    return F::kScaled ? exp2f(static_cast<float>(kWeightShift) - exponent) : 1.0f;
  }
  // P times each of a key's scales: (heads, keys).
  __device__ void store_weights(const float (&x)[kSums], const KeyScales<F>& scales, int buffer) {
    const float unit = weight_unit();
#pragma unroll
    for (int i = 0; i < F::kWeights; ++i) {
      const std::uint32_t to = ptx::smem_address(s.weights[buffer][i].at(0));
      const float f0 = i < F::kKeyScales ? scales.of[0][i] * unit : unit;
      const float f1 = i < F::kKeyScales ? scales.of[1][i] * unit : unit;
      if (F::is_bf16_weight(i, Work::kBf16)) {
        store_weight<true>(x, f0, f1, to);
      } else {
        store_weight<false>(x, f0, f1, to);
      }
    }
  }
  template <bool kBf16>
  __device__ void store_weight(const float (&x)[kSums], float f0, float f1, std::uint32_t to) const {
    const int head = lane / 16 * 8 + lane % 8,
              word = 2 * warp + lane / 8 % 2;  // what this lane gives the address of
#pragma unroll
    for (int j = 0; j < kHeads / 8; j += 2) {
      const float* y = &x[4 * j];
      stmatrix_x4_transposed(ptx::swizzled_word(to, 8 * j + head, word), pack2<kBf16>(y[0] * f0, y[1] * f0),
                             pack2<kBf16>(y[2] * f1, y[3] * f1), pack2<kBf16>(y[4] * f0, y[5] * f0),
                             pack2<kBf16>(y[6] * f1, y[7] * f1));
    }
  }

  // ---- the end of an item

  // The sums of all keys, the lse or the statistics of a split, and what O is multiplied with. An item whose keys all have
  // scores of -inf has a reference, kNoReference; one without keys has -inf.
  template <class Item, int kMaxima>
  __device__ void finish(const Item& item, float (&sum)[kOwnHeads], float (&highest)[kMaxima], bool seen,
                         int items) {
    const int row = static_cast<int>(threadIdx.x) % kGroupThreads;
    float of_row = 0.0f;
    if constexpr (Work::kMaxima) {
#pragma unroll
      for (int i = 0; i < kMaxima; ++i) {
        if constexpr (kKeptHeads == kOwnHeads) {
          for (int step = 4; step < 32; step *= 2)
            highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xFFFFFFFFu, highest[i], step));
        }
        const int own = first_kept() + i;
        if (kKeptHeads < kOwnHeads || lane < 4)
          s.exchange[warp][own / 2 * 8 + lane % 4 * 2 + own % 2] = highest[i];
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
    seen = any_of_group(seen);
    ptx::mbarrier_wait(&s.end_empty, (items & 1) ^ 1);
    if (row < kHeads) {
      const float reference = seen ? s.reference[row] : -INFINITY;
      float total = s.exchange[0][row];
      for (int w = 1; w < kWarpsOfGroup; ++w) total += s.exchange[w][row];
      const float unit = 1.0f / weight_unit();
      if (item.is_split) {
        work.store_stats(item, row, reference, total);
        s.factor[row] = work.partial_factor() * unit;
      } else {
        s.factor[row] = work.finish_row(item, row, reference, total, of_row) * unit;
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
    if (row < kHeads) {
      if (item.is_split) {
        work.store_stats(item, row, -INFINITY, 0.0f);
      } else {
        work.finish_row(item, row, -INFINITY, 0.0f, -INFINITY);
      }
    }
    __syncwarp();
  }
};

}  // namespace flash_mla::sm90::raw_rows
