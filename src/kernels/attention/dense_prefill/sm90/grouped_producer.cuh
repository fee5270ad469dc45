#pragma once

// The producer warp for keys and values of their own: as producer.cuh, but keys lie behind each other, a sequence's length
// apart, or in pages. A tile is one copy, or one for each page and 64 columns, dealt out to the lanes.

#include <cuda.h>

#include <climits>
#include <cstdint>

#include "kernels/attention/dense_prefill/sm90/smem.cuh"
#include "kernels/attention/dense_prefill/sm90/work.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::prefill {

/// k and v as (64 columns, tokens, chunks of columns, heads, pages), q as (64 columns, heads of a block, tokens, chunks, blocks
/// of heads).
struct GroupedMaps {
  const CUtensorMap *q, *k, *v;
};

template <class C, class T>
class GroupedProducer {
  using Item = prefill::Item<true>;
  static constexpr int kTileKeys = C::kTileKeys;
  /// Tiles of an item that are still to be loaded when the next item is taken: as in producer.cuh.
  static constexpr int kTakeAhead = 2;

 public:
  __device__ GroupedProducer(const GroupedParams& params, Smem<C, T>& smem, const GroupedMaps& maps)
      : p_(params), s_(smem), maps_(maps), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    WorkList<C> list(p_);
    int index = static_cast<int>(blockIdx.x);
    for (;;) {
      const Item item = list.at(index);
      ptx::mbarrier_wait(&s_.item_empty[items_.slot], items_.parity ^ 1);
      if (lane_ == 0) {
        s_.items[items_.slot] = item;
        ptx::mbarrier_arrive(&s_.item_full[items_.slot]);
      }
      items_.advance();
      if (item.head < 0) break;
      if (item.num_tiles > 0) {
        load(item);
      } else {
        take();
      }
      index = __shfl_sync(0xFFFFFFFFu, next_, 0);
    }
  }

 private:
  __device__ void take() {
    if (lane_ == 0 && p_.taken != nullptr) next_ = static_cast<int>(gridDim.x) + atomicAdd(p_.taken, 1);
  }

  __device__ void load(const Item& item) {
    const int key_head = item.head / (p_.problem.group >> p_.pack_log2);
    if (lane_ == 0) ptx::tma_prefetch_5d(maps_.q, 0, 0, item.query, 0, item.head);
    ptx::mbarrier_wait(&s_.q_empty, q_parity_ ^ 1);
    q_parity_ ^= 1;
    if (lane_ == 0) {
      ptx::mbarrier_arrive_expect_tx(&s_.q_full, sizeof(s_.q));
      ptx::tma_load_5d(&s_.q, maps_.q, &s_.q_full, 0, 0, item.query, 0, item.head);
    }
    const int last = item.first_tile + item.num_tiles - 1;
#pragma unroll 1
    for (int i = 0; i <= item.num_tiles; ++i) {
      if (i == max(item.num_tiles - kTakeAhead, 0)) take();
      if (i < item.num_tiles) {
        load_tile(item, last - i, key_head, s_.k[k_.slot], maps_.k, s_.k_full[k_.slot], s_.k_empty[k_.slot],
                  k_);
      }
      if (i > 0) {
        load_tile(item, last - i + 1, key_head, s_.v[v_.slot], maps_.v, s_.v_full[v_.slot],
                  s_.v_empty[v_.slot], v_);
      }
    }
  }

  template <class Tile, class R>
  __device__ void load_tile(const Item& item, int tile, int head, Tile& to, const CUtensorMap* map,
                            std::uint64_t& full, std::uint64_t& empty, R& ring) {
    const flash_mla::gqa::Problem& problem = p_.problem;
    const int key = tile * kTileKeys;
    __syncwarp();  // no lane is so late that it would take the phase after the next for the one it waits for
    ptx::mbarrier_wait(&empty, ring.parity ^ 1);
    ring.advance();
    if (p_.copy_keys == kTileKeys) {
      if (lane_ == 0) {
        ptx::mbarrier_arrive_expect_tx(&full, sizeof(to));
        const Place at = place(item.seq, key);
        ptx::tma_load_5d(&to, map, &full, 0, at.token, 0, head, at.page);
      }
      return;
    }
    // Pages behind the sequence's last are none: what stays in their place is masked, and cleared among the values.
    const int pages = min(kTileKeys, item.num_keys - key + p_.copy_keys - 1) / p_.copy_keys;
    const int copies = pages * Tile::kChunks;
    if (lane_ == 0) {
      ptx::mbarrier_arrive_expect_tx(&full, static_cast<std::uint32_t>(copies * p_.copy_keys * 128));
    }
    __syncwarp();
    const std::int32_t* const of_tile = problem.pages(item.seq) + key / p_.copy_keys;
#pragma unroll 1
    for (int i = lane_; i < copies; i += 32) {
      const int page = i / Tile::kChunks, chunk = i % Tile::kChunks;
      ptx::tma_load_5d(to.at(chunk, page * p_.copy_keys), map, &full, 0, 0, chunk, head, of_tile[page]);
    }
  }

  struct Place {
    int token, page;
  };
  // Of a tile that lies in one piece.
  __device__ Place place(int seq, int key) const {
    const flash_mla::gqa::Problem& problem = p_.problem;
    if (problem.table != nullptr) {
      const int page = key / problem.page_size;
      return {key - page * problem.page_size, problem.pages(seq)[page]};
    }
    if (problem.cu_k != nullptr) return {problem.cu_k[seq] + key, 0};
    return {key, seq};
  }

  const GroupedParams& p_;
  Smem<C, T>& s_;
  const GroupedMaps maps_;
  const int lane_;
  Ring<2> items_;
  Ring<C::kStages> k_, v_;
  std::uint32_t q_parity_ = 0;
  int next_ = INT_MAX;  // of lane 0
};

}  // namespace flash_mla::sm90::prefill
