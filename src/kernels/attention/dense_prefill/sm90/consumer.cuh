#pragma once

// A consumer warpgroup: 64 query rows, with S, P and O in registers.
//
// The two warpgroups take turns at the tensor cores. In its turn a warpgroup issues S(i + 1) = Q K(i + 1)^T
// and O += P(i) V(i); outside of it, it computes the softmax of S(i + 1) while its own P V and then the other
// warpgroup's products run:
//
//   WG0  QK1 PV0 |  softmax1       | QK2 PV1 |  softmax2      |
//   WG1          |  QK1 PV0 |  softmax1      | QK2 PV1 | ...
//
// At an item's end the next item's first Q K^T is issued behind the last P V and runs while O is stored.
//
// Softmax is relative to a reference that moves only when a row's maximum exceeds it by more than 2^8, so
// that O is seldom rescaled; P stays within range of fp16 and bf16, and the division at the end makes the
// result independent of the reference.

#include <cmath>
#include <cstdint>

#include "kernels/attention/dense_prefill/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace flash_mla::sm90::prefill {

inline constexpr float kMaxGrowth = 8.0f;  // base 2

enum NamedBarrier : int { kTurn = 1, kFill = 3 };  // of warpgroup 0 and 1

/// What is kept of an item to see whether a tile needs a mask: the keys that its first row sees, or the tiles that all of the
/// warpgroup's rows see as a whole.
template <bool kGrouped>
struct Sight {
  int limit;
};
template <>
struct Sight<true> {
  int begin, end;
};

/// C: LatentHeads or GroupedHeads.
template <class C, bool kBf16>
class Consumer {
  using T = ptx::Element<kBf16>;
  using Params = typename C::Params;
  using Item = prefill::Item<C::kGrouped>;
  static constexpr int kTileKeys = C::kTileKeys, kHeadDim = C::kHeadDim, kHeadDimV = C::kHeadDimV;
  static constexpr int kStages = C::kStages, kRegisterSteps = C::kRegisterSteps;
  static constexpr int kSteps = kTileKeys / 16;                        // of P V
  static constexpr int kScores = kTileKeys / 2, kOut = kHeadDimV / 2;  // of a thread

 public:
  __device__ Consumer(const Params& params, Smem<C, T>& smem)
      : p_(params),
        s_(smem),
        wg_(static_cast<int>(threadIdx.x) / 128),
        lane_(static_cast<int>(threadIdx.x) % 32),
        row_(static_cast<int>(threadIdx.x) / 32 * 16 + lane_ / 4) {}

  __device__ void run() {
    float x[kScores];
    if (wg_ == 1) pass_turn();  // WG0 begins
    if (begin_next(x)) {
      while (attend(x)) {
      }
    }
    if (wg_ == 0) wait_turn();
  }

 private:
  __device__ void wait_turn() { ptx::named_barrier_sync<kConsumerThreads>(kTurn + wg_); }
  __device__ void pass_turn() { ptx::named_barrier_arrive<kConsumerThreads>(kTurn + 1 - wg_); }

  /// One arrival per warp, when all of its lanes are here.
  __device__ void release(std::uint64_t& barrier) {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(&barrier);
  }

  // Begins with the next item that has keys, if there is one; those before it are finished on the way.
  __device__ bool begin_next(float (&x)[kScores]) {
    for (;;) {
      ptx::mbarrier_wait(&s_.item_full[items_.slot], items_.parity);
      const Item& item = s_.items[items_.slot];
      if (item.head < 0) return false;
      if (item.num_tiles > 0) break;
      store_nothing(item);
      release(s_.item_empty[items_.slot]);
      items_.advance();
    }
    begin(x);
    ptx::wgmma_wait<0>();
    return true;
  }

  // Issues Q K^T of an item's first tile.
  __device__ void begin(float (&x)[kScores]) {
    ptx::mbarrier_wait(&s_.q_full, q_parity_);
    q_parity_ ^= 1;
    ptx::mbarrier_wait(&s_.k_full[k_.slot], k_.parity);
    load_q();
    wait_turn();
    issue_qk(x);
    pass_turn();
  }

  // Works on the item in slot items_, whose first scores are in x, and begins with the next one, if there is
  // one.
  __device__ bool attend(float (&x)[kScores]) {
    const int slot = items_.slot;
    const Item& item = s_.items[slot];
    const int num_tiles = item.num_tiles;
    const int first = first_tile(item);
    const Sight<C::kGrouped> sight = sight_of(item);
    float o[kOut];
    std::uint32_t weights[kSteps][4];
    float sum[2] = {}, alpha[2];
    reference_[0] = reference_[1] = -INFINITY;
    int tile = first + num_tiles - 1;
    release_k(tile == first);
    move_reference(x, item, sight, tile, sum, alpha);
    exponentiate(x, sum);
    pack(x, weights);
    clear_unseen(item, tile);
    if (tile > first) ptx::mbarrier_wait(&s_.k_full[k_.slot], k_.parity);
    while (--tile >= first) {
      ptx::mbarrier_wait(&s_.v_full[v_.slot], v_.parity);
      wait_turn();
      issue_qk(x);
      issue_pv(o, weights, tile + 2 < first + num_tiles);
      pass_turn();
      ptx::wgmma_wait<1>();
      release_k(tile == first);
      move_reference(x, item, sight, tile, sum, alpha);
      exponentiate(x, sum);
      // Here rather than at the top, and with a parity that the sums (which are never negative) seem to have
      // a say in: else ptxas puts the exponentials behind the wait for P V instead of under it.
      const std::uint32_t flip = sum[0] + sum[1] < 0.0f ? 1 : 0;
      if (tile > first) ptx::mbarrier_wait(&s_.k_full[k_.slot], k_.parity ^ flip);
      ptx::wgmma_wait<0>();
      release_v();
      rescale(o, alpha);
      pack(x, weights);
      if constexpr (C::kGrouped) {
        if (tile == first) clear_before(item, tile);
      }
    }
    ptx::mbarrier_wait(&s_.v_full[v_.slot], v_.parity);
    issue_pv(o, weights, num_tiles > 1);
    items_.advance();
    ptx::mbarrier_wait(&s_.item_full[items_.slot], items_.parity);
    if (!has_queries()) {
      // There is no next item, or it has no keys, or its Q is still on the way.
      ptx::wgmma_wait<0>();
      release_v();
      store(o, item, sum);
      release(s_.item_empty[slot]);
      return begin_next(x);
    }
    // The next item's first product runs while this one is stored.
    begin(x);
    ptx::wgmma_wait<1>();
    release_v();
    store(o, item, sum);
    release(s_.item_empty[slot]);
    ptx::wgmma_wait<0>();
    return true;
  }

  // Has the item in slot items_ any keys, and has its Q arrived? Warps may differ in what they see.
  __device__ bool has_queries() {
    return s_.items[items_.slot].num_tiles > 0 &&
           __any_sync(0xFFFFFFFFu, ptx::mbarrier_test_wait(&s_.q_full, q_parity_));
  }

  // The part of Q that is kept in registers.
  __device__ void load_q() {
    const int r = static_cast<int>(threadIdx.x) / 32 * 16 + lane_ % 16;  // row whose address this lane gives
#pragma unroll
    for (int i = 0; i < kRegisterSteps; ++i) {
      ldmatrix_x4(q_[i], ptx::swizzled_word(ptx::smem_address(s_.q.at(i / 4)), r, i % 4 * 2 + lane_ / 16));
    }
  }

  // S = Q K^T of the tile in slot k_.
  __device__ void issue_qk(float (&x)[kScores]) {
    const auto q = s_.q.k_major(wg_ * 64);
    const auto k = s_.k[k_.slot].k_major();
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      if (i < kRegisterSteps) {
        ptx::wgmma(x, q_[i], k.step(i), i > 0);
      } else {
        ptx::wgmma(x, q.step(i), k.step(i), i > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // O (+)= P V of the tile in slot v_.
  __device__ void issue_pv(float (&o)[kOut], const std::uint32_t (&weights)[kSteps][4], bool accumulate) {
    const auto v = s_.v[v_.slot].mn_major();
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      ptx::wgmma(o, weights[i], v.step(i), i > 0 || accumulate);
    }
    ptx::wgmma_commit();
  }

  __device__ void release_k(bool of_first_tile) {
    release(s_.k_empty[k_.slot]);
    k_.advance();
    if (of_first_tile) release(s_.q_empty);
  }
  __device__ void release_v() {
    release(s_.v_empty[v_.slot]);
    v_.advance();
  }

  __device__ static int first_tile(const Item& item) {
    if constexpr (C::kGrouped) return item.first_tile;
    return 0;
  }
  __device__ Sight<C::kGrouped> sight_of(const Item& item) const {
    if constexpr (C::kGrouped) {
      const int first_row = wg_ * 64, last_row = first_row + 63;
      return {(max(item.first_begin + query_of(last_row), 0) + kTileKeys - 1) / kTileKeys,
              max(min(item.first_limit + query_of(first_row), item.num_keys), 0) / kTileKeys};
    } else {
      return {item.first_limit};
    }
  }

  // Values behind what the item's rows see: P is zero there, but 0 * NaN is not.
  __device__ void clear_unseen(const Item& item, int tile) {
    if constexpr (C::kGrouped) {
      const int end = last_limit(p_, item) - tile * kTileKeys;
      if (end < kTileKeys) clear_values(end, kTileKeys);
      if (tile == item.first_tile) clear_before(item, tile);
    } else {
      if ((tile + 1) * kTileKeys > item.num_keys) clear_values(item.num_keys - tile * kTileKeys, kTileKeys);
    }
  }
  // And before: of a window.
  __device__ void clear_before(const Item& item, int tile) {
    if constexpr (C::kGrouped) {
      const int begin = item.first_begin - tile * kTileKeys;
      if (begin > 0) clear_values(0, begin);
    }
  }

  // Rows [begin, end) of the values in slot v_ become zero. Both warpgroups write the same zeros and each waits for
  // its own alone.
  __device__ void clear_values(int begin, int end) {
    ptx::mbarrier_wait(&s_.v_full[v_.slot], v_.parity);
    const int words = (end - begin) * 8;  // 16-byte words of a chunk
    for (int i = static_cast<int>(threadIdx.x) % 128; i < words; i += 128) {
#pragma unroll
      for (int c = 0; c < kHeadDimV / 64; ++c)
        reinterpret_cast<uint4*>(s_.v[v_.slot].at(c, begin))[i] = uint4{0, 0, 0, 0};
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_sync<128>(kFill + wg_);
  }

  // The reference follows the scores of a tile; alpha is what O and earlier sums have to be multiplied with.
  __device__ void move_reference(float (&x)[kScores], const Item& item, const Sight<C::kGrouped>& sight,
                                 int tile, float (&sum)[2], float (&alpha)[2]) {
    if constexpr (C::kGrouped) {
      cap(x);
      if (tile < sight.begin || tile >= sight.end) mask(x, item, tile * kTileKeys);
    } else {
      mask(x, sight.limit - tile * kTileKeys);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float highest = row_max(x, h) * p_.scale_log2, before = reference_[h];
      const bool moves = highest > before + kMaxGrowth;
      reference_[h] = moves ? highest : before;
      // Nothing has been seen before the first key: O and the sum are 0 then.
      alpha[h] = moves && before != -INFINITY ? exp2_fast(before - highest) : 1.0f;
      sum[h] *= alpha[h];
    }
  }

  // S becomes 2^(scale S - reference).
  __device__ void exponentiate(float (&x)[kScores], float (&sum)[2]) const {
    const float base[2] = {reference_[0] == -INFINITY ? 0.0f : reference_[0],
                           reference_[1] == -INFINITY ? 0.0f : reference_[1]};
    float part[2][2] = {};
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int h = i % 4 / 2;
      x[i] = exp2_fast(fmaf(x[i], p_.scale_log2, -base[h]));
      part[h][i % 2] += x[i];
    }
    sum[0] += part[0][0] + part[0][1];
    sum[1] += part[1][0] + part[1][1];
  }

  // Scores that a row does not see become -inf; the item's first row sees `limit` keys of the tile.
  __device__ void mask(float (&x)[kScores], int limit) const {
    if (limit + (p_.causal ? wg_ * 64 : 0) >= kTileKeys) return;
    const int l0 = limit + (p_.causal ? row_ : 0), l1 = l0 + (p_.causal ? 8 : 0);
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int column = i / 4 * 8 + lane_ % 4 * 2 + i % 2;
      if (column >= (i % 4 < 2 ? l0 : l1)) x[i] = -INFINITY;
    }
  }

  // The same with windows, of the tile that begins at key `start`.
  __device__ void mask(float (&x)[kScores], const Item& item, int start) const {
    const int q0 = query_of(row_), q1 = query_of(row_ + 8), end = item.num_keys - start;
    const int b0 = item.first_begin + q0 - start, l0 = min(item.first_limit + q0 - start, end);
    const int b1 = item.first_begin + q1 - start, l1 = min(item.first_limit + q1 - start, end);
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int column = i / 4 * 8 + lane_ % 4 * 2 + i % 2;
      if (column < (i % 4 < 2 ? b0 : b1) || column >= (i % 4 < 2 ? l0 : l1)) x[i] = -INFINITY;
    }
  }

  // tanh of what the scores are times softmax_scale / c: tanh(y) = 1 - 2 / (e^(2 y) + 1).
  __device__ void cap(float (&x)[kScores]) const {
    if (p_.cap_scale == 0.0f) return;
#pragma unroll
    for (int i = 0; i < kScores; ++i) x[i] = 1.0f - __fdividef(2.0f, exp2_fast(x[i] * p_.cap_scale) + 1.0f);
  }

  __device__ static void rescale(float (&o)[kOut], const float (&alpha)[2]) {
    if (!__any_sync(0xFFFFFFFFu, alpha[0] != 1.0f || alpha[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < kOut; ++i) o[i] *= alpha[i % 4 / 2];
  }

  __device__ static void pack(const float (&x)[kScores], std::uint32_t (&weights)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) weights[i / 4][i % 4] = pack2<kBf16>(x[2 * i], x[2 * i + 1]);
  }

  // O and log-sum-exp of the rows that there are.
  __device__ void store(const float (&o)[kOut], const Item& item, const float (&sum)[2]) {
    if constexpr (C::kSplits) {
      store_partial(o, item, sum);
    } else {
      store_whole(o, item, sum);
    }
  }
  __device__ void store_whole(const float (&o)[kOut], const Item& item, const float (&sum)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[h] + __shfl_xor_sync(0xFFFFFFFFu, sum[h], 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      const int row = row_ + 8 * h;
      const bool sees = row_sees(item, row);
      const float inverse = 1.0f / (total + sink(item, row, total, reference_[h]));
#pragma unroll
      for (int g = 0; g < kHeadDimV / 8; g += 4) {
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = (g + i) * 4 + 2 * h;
          words[i] = sees ? pack2<kBf16>(o[at] * inverse, o[at + 1] * inverse) : 0;
        }
        quad_transpose(words);
        if (row < item.rows) {
          *reinterpret_cast<uint4*>(out_at(item, row) + g * 8) =
              uint4{words[0], words[1], words[2], words[3]};
        }
      }
      // A row whose scores are all -inf has the sum 0 and no average.
      const float lse = total == 0.0f ? NAN : (reference_[h] + log2f(total)) * 0.6931471805599453f;
      store_lse(item, row, sees ? lse : INFINITY);
    }
  }

  // The same of a part of the keys.
  __device__ void store_partial(const float (&o)[kOut], const Item& item, const float (&sum)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[h] + __shfl_xor_sync(0xFFFFFFFFu, sum[h], 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      const int row = row_ + 8 * h;
      if (row >= item.rows) continue;
      const std::int64_t at = partial_row(item, row);
      if (lane_ % 4 == 0) p_.partial_lse[at] = total == 0.0f ? -INFINITY : reference_[h] + log2f(total);
      if (total == 0.0f) continue;  // nobody reads it
      const float inverse = 1.0f / total;
      float* const to = p_.partial_out + at * kHeadDimV + lane_ % 4 * 2;
#pragma unroll
      for (int g = 0; g < kHeadDimV / 8; ++g) {
        *reinterpret_cast<float2*>(to + 8 * g) =
            make_float2(o[4 * g + 2 * h] * inverse, o[4 * g + 2 * h + 1] * inverse);
      }
    }
  }
  __device__ std::int64_t partial_row(const Item& item, int row) const {
    return (item.split * p_.total_q + item.query + query_of(row)) * p_.problem.h_q + head_of(item, row);
  }

  __device__ bool row_sees(const Item& item, int row) const {
    if constexpr (C::kGrouped) {
      const int query = query_of(row);
      return min(item.first_limit + query, item.num_keys) > max(item.first_begin + query, 0);
    } else {
      return item.first_limit + (p_.causal ? row : 0) > 0;
    }
  }
  // What the sink of the row's head adds to its sum.
  __device__ float sink(const Item& item, int row, float total, float reference) const {
    if constexpr (C::kGrouped) {
      if (p_.problem.sinks != nullptr && total != 0.0f)
        return exp2f(p_.problem.sinks[head_of(item, row)] * 1.4426950408889634f - reference);
    }
    return 0.0f;
  }

  // The same of an item in which no row sees a key.
  __device__ void store_nothing(const Item& item) {
    for (int row = row_; row < min(row_ + 16, item.rows); row += 8) {
      if constexpr (C::kSplits) {
        if (lane_ % 4 == 0) p_.partial_lse[partial_row(item, row)] = -INFINITY;
      } else {
        for (int g = 0; g < kHeadDimV / 8; g += 4)
          *reinterpret_cast<uint4*>(out_at(item, row) + g * 8) = uint4{0, 0, 0, 0};
        store_lse(item, row, INFINITY);
      }
    }
  }

  // The item's query and the head that a row is.
  __device__ int query_of(int row) const {
    if constexpr (C::kGrouped) return row >> p_.pack_log2;
    return row;
  }
  __device__ int head_of(const Item& item, int row) const {
    if constexpr (C::kGrouped) return (item.head << p_.pack_log2) + (row & ((1 << p_.pack_log2) - 1));
    return item.head;
  }

  // This lane's columns are 8 from here on, and every 32 further.
  __device__ std::uint16_t* out_at(const Item& item, int row) const {
    return static_cast<std::uint16_t*>(p_.out) +
           static_cast<std::int64_t>(item.query + query_of(row)) * p_.out_stride_token +
           head_of(item, row) * p_.out_stride_head + lane_ % 4 * 8;
  }
  __device__ void store_lse(const Item& item, int row, float lse) const {
    if (p_.lse == nullptr || lane_ % 4 != 0 || row >= item.rows) return;
    p_.lse[head_of(item, row) * p_.lse_stride_head +
           static_cast<std::int64_t>(item.query + query_of(row)) * p_.lse_stride_token] = lse;
  }

  const Params& p_;
  Smem<C, T>& s_;
  const int wg_, lane_;
  const int row_;  // this thread's rows of the item are row_ and row_ + 8
  Ring<2> items_;
  Ring<kStages> k_, v_;
  std::uint32_t q_parity_ = 0;
  std::uint32_t q_[kRegisterSteps > 0 ? kRegisterSteps : 1][4];
  float reference_[2];  // of the softmax, per row, base 2; -inf until a key has been seen
};

}  // namespace flash_mla::sm90::prefill
