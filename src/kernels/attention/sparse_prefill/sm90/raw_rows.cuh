#pragma once

// Sparse prefill over rows as they lie in the cache: the consumers of raw_rows (their tiles, shared-memory map and
// registers: sparse_decode/sm90/rows_kernel.cuh), the items and lists of sparse prefill. CTAs are persistent; an item is a
// query token and up to 64 of its heads.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/raw_rows/sm90/bring.cuh"
#include "kernels/attention/raw_rows/sm90/scores.cuh"
#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/attention/raw_rows/sm90/values.cuh"
#include "kernels/attention/sparse_prefill/sm90/selection.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90::sparse_prefill {

template <bool kIsBf16>
struct RowsWork {
  static constexpr bool kBf16 = kIsBf16, kMaxima = true;

  const SparsePrefillParams& p;
  const QueryView& q;

  struct ItemTiles : Item {
    int index;
    int begin_block, end_block;
    bool is_split;
  };
  struct Walk {
    const SparsePrefillParams& p;

    __device__ ItemTiles first() const { return at(static_cast<int>(blockIdx.x)); }
    __device__ bool holds(const ItemTiles& item) const { return item.index < p.items; }
    __device__ ItemTiles next(const ItemTiles& item) const {
      return at(item.index + static_cast<int>(gridDim.x));
    }
    __device__ ItemTiles at(int index) const {
      ItemTiles item{item_at(p, index), index, 0, 0, false};
      if (index < p.items) item.end_block = tiles_of(list_length(p, item.token));
      return item;
    }
  };

  __device__ Walk walk() const { return {p}; }
  __device__ float scale_log2() const { return p.scale_log2 * p.cache_scale; }

  // Head of row r; false if it is padding.
  __device__ bool locate(const Item& item, int r, int& head) const {
    head = item.head_block * kTileRows + r;
    return head < p.h_q;
  }
  __device__ uint4 query(const Item& item, int row, int column) const {
    int head;
    if (!locate(item, row, head)) return {0, 0, 0, 0};
    return __ldg(
        reinterpret_cast<const uint4*>(q.data + item.token * q.stride_n + head * q.stride_h + column));
  }
  template <int kSums>
  __device__ void mask(float (&x)[kSums], const Item&, int, int, int, const bool (&known)[2]) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] = known[i % 4 / 2] ? x[i] : -INFINITY;
  }
  /// What a row's O has to be multiplied with. Stores its statistics, which know nothing of the sink.
  __device__ float finish_row(const Item& item, int row, float reference, float sum, float highest) const {
    constexpr float kLog2e = 1.44269504089f, kLn2 = 0.69314718056f;
    int head;
    const bool valid = locate(item, row, head), none = sum == 0.0f,
               unseen = reference == -INFINITY;  // else every score of the row is -inf
    if (valid && p.lse != nullptr) {
      p.lse[item.token * p.lse_stride_n + head * p.lse_stride_h] = unseen ? INFINITY
                                                                   : none
                                                                       ? NAN
                                                                       : (reference + log2_fast(sum)) * kLn2;
    }
    if (valid && p.max_logits != nullptr)
      p.max_logits[item.token * p.max_logits_stride_n + head * p.max_logits_stride_h] = highest * kLn2;
    if (none) return unseen ? 0.0f : NAN;
    if (valid && p.attn_sink != nullptr) sum += exp2f(p.attn_sink[head] * kLog2e - reference);
    return p.cache_scale / sum;
  }
  /// Null if the row is padding.
  __device__ std::uint16_t* out_row(const Item& item, int row) const {
    int head;
    if (!locate(item, row, head)) return nullptr;
    return static_cast<std::uint16_t*>(p.out) + item.token * p.out_stride_n + head * p.out_stride_h;
  }
  // Items are never split.
  __device__ void store_stats(const Item&, int, float, float) const {}
  __device__ static float partial_factor() { return 1.0f; }
  __device__ float4* partial(const Item&) const { return nullptr; }
  __device__ static int row_groups() { return 0; }
};

// Entries are asked for two tiles before they are needed, a key's scales one.
template <class S>
__device__ void bring_all(const SparsePrefillParams& p, S& s, int warp, int lane) {
  using F = typename S::Format;
  Cursor cursor(p, static_cast<unsigned>(warp), static_cast<unsigned>(lane));
  raw_rows::RingPlace<S::kRing> place(warp);
  const auto take = [&] {
    const raw_rows::Key<F> key = cursor.own_key<F>();
    cursor.advance();
    return key;
  };
  if (!cursor.holds()) return;
  raw_rows::Key<F> key = take();
  while (cursor.holds()) {
    const raw_rows::Key<F> next = take();
    raw_rows::bring_rows(s, place, lane, key);
    place.advance(raw_rows::kGroups);
    key = next;
  }
  raw_rows::bring_rows(s, place, lane, key);
}

template <class F, int kHeads, bool kBf16>
__global__ void __launch_bounds__(raw_rows::kThreads, 1)
    sparse_prefill_rows_kernel(const __grid_constant__ QueryView q,
                               const __grid_constant__ SparsePrefillParams p) {
  extern __shared__ std::byte dynamic_smem[];
  using S = raw_rows::Smem<F, kHeads>;
  using Work = RowsWork<kBf16>;
  auto& s = *reinterpret_cast<S*>((reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  using Registers = raw_rows::Registers<kHeads>;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) raw_rows::init_barriers(s);
  __syncthreads();
  const Work work{p, q};
  if (warp < 4) {
    ptx::set_max_registers_up<Registers::kScores>();
    raw_rows::Scores<kHeads, F, Work>(work, s).run();
  } else if (warp < 8) {
    ptx::set_max_registers_up<Registers::kValues>();
    raw_rows::Values<kHeads, F, Work, 0>(work, s).run();
  } else if (warp < 12) {
    ptx::set_max_registers_up<Registers::kValues>();
    raw_rows::Values<kHeads, F, Work, 1>(work, s).run();
  } else {
    ptx::set_max_registers_down<Registers::kProducers>();
    bring_all<S>(p, s, warp - 12, static_cast<int>(threadIdx.x) % 32);
  }
}

}  // namespace flash_mla::sm90::sparse_prefill
