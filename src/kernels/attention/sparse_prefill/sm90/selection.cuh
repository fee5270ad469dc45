#pragma once

// Which rows of the cache the tiles' keys are, for a producer warp: the three ways of SparsePrefillArgs
// (kernels/attention/sparse_prefill/selection.h does it for host tensors).

#include <cstdint>

#include "kernels/attention/raw_rows/sm90/bring.cuh"
#include "kernels/attention/sparse_prefill/sm90/smem.cuh"
#include "kv/format.h"

namespace flash_mla::sm90::sparse_prefill {

/// Of a warp's 16 keys of a tile, a lane looks after those 4 i + lane / 8, i from 0 to 3: where their rows begin, and
/// a bit i for each that is one. Of those that are none, the row of some token.
struct Rows {
  const std::byte* at[kWarpKeys / 4];
  std::uint32_t valid;

  __device__ bool is_valid(int i) const { return (valid >> i & 1) != 0; }
};

/// The tiles of a CTA's items, in order. Looks one tile ahead: entries are asked for a tile before they are needed.
class Cursor {
 public:
  __device__ Cursor(const SparsePrefillParams& params, unsigned warp, unsigned lane)
      : p_(params),
        key_(static_cast<int>(warp * kWarpKeys + lane)),
        lane_(lane),
        index_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {
    next_item();
  }
  __device__ bool holds() const { return index_ < p_.items; }
  __device__ int index() const { return index_; }
  __device__ int tile() const { return tile_; }
  /// Of its item.
  __device__ bool is_last() const { return left_ <= kTileKeys; }

  __device__ void advance() {
    ++tile_;
    left_ -= kTileKeys;
    at_ += kTileKeys;
    if (left_ > 0) {
      read();
    } else {
      next_item();
    }
  }

  /// This lane's key, of the first 16 lanes; none in the others.
  template <class F>
  __device__ raw_rows::Key<F> own_key() const {
    raw_rows::Key<F> key{};
    if (entry_ >= limit_) return key;
    const std::uint32_t n = begin_ + entry_;
    std::uint32_t row = n * p_.token_units;
    if (!p_.is_flat) {
      std::uint32_t page = divide(n, p_.by_page_size);
      const std::uint32_t offset = n - page * p_.page_size;
      if (p_.block_table != nullptr) page = static_cast<std::uint32_t>(__ldg(table_ + page));
      row = page * p_.page_units + offset * p_.token_units;
      if constexpr (F::kTable) {
        const std::uint32_t at = page * p_.page_units * 2 +
                                 p_.page_size * (kv::Fp8V4::kRowBytes / kv::Fp8V4::kScaleBytes) + offset;
        key.scales = __ldg(reinterpret_cast<const uint2*>(p_.cache) + at);
      }
    }
    key.row = p_.cache + row * std::uint64_t{16};
    return key;
  }

  // The rows of this lane's keys. Without branches but those that all take alike.
  __device__ void locate(Rows& rows) const {
    rows.valid = 0;
#pragma unroll
    for (int i = 0; i < kWarpKeys / 4; ++i) {
      const std::uint32_t entry = __shfl_sync(0xFFFFFFFFu, entry_, 4U * static_cast<unsigned>(i) + lane_ / 8);
      const bool valid = entry < limit_;  // a negative one is large here
      const std::uint32_t n = valid ? begin_ + entry : 0;
      rows.valid |= valid ? 1U << i : 0;
      std::uint32_t row = n * p_.token_units;
      if (!p_.is_flat) {
        std::uint32_t page = divide(n, p_.by_page_size);
        const std::uint32_t offset = n - page * p_.page_size;
        if (p_.block_table != nullptr) page = valid ? static_cast<std::uint32_t>(__ldg(table_ + page)) : 0;
        row = page * p_.page_units + offset * p_.token_units;
      }
      rows.at[i] = p_.cache + row * std::uint64_t{16};
    }
  }

 private:
  __device__ void next_item() {
    do {
      index_ += static_cast<int>(gridDim.x);
      if (!holds()) return;
      left_ = list_length(p_, item_at(p_, index_).token);
    } while (left_ == 0);
    tile_ = 0;
    const int token = item_at(p_, index_).token;
    at_ = p_.indices + token * p_.indices_stride + key_;
    find_request(token);
    read();
  }

  // The warp's entries of the tile, one to a lane: four to a lane would not stay in registers, and to put one on the stack
  // is to wait for it.
  __device__ void read() {
    entry_ = lane_ < kWarpKeys && key_ < left_ ? static_cast<std::uint32_t>(__ldg(at_)) : 0xFFFFFFFFu;
  }

  // The tokens that an entry of the query token's list may name: entry e, below limit_, names slot begin_ + e, or position
  // e of the pages in table_.
  __device__ void find_request(int token) {
    begin_ = 0;
    limit_ = p_.slots;
    if (p_.cu_seqlens_q == nullptr) return;
    // The last request that begins at or before the token: 32 are looked at, then those between two of them.
    int low = 0, high = p_.batch;
    while (high - low > 1) {
      const int step = (high - low + 31) / 32, probe = low + static_cast<int>(lane_) * step;
      const bool before = probe < high && (lane_ == 0 || __ldg(p_.cu_seqlens_q + probe) <= token);
      const int count = __popc(__ballot_sync(0xFFFFFFFFu, before));
      low += (count - 1) * step;
      high = min(low + step, high);
    }
    int length = 0;
    if (p_.cu_seqlens_k != nullptr) {
      const int begin = __ldg(p_.cu_seqlens_k + low);
      begin_ = static_cast<std::uint32_t>(begin);
      length = __ldg(p_.cu_seqlens_k + low + 1) - begin;
    } else {
      table_ = p_.block_table + low * p_.block_table_stride;
      length = __ldg(p_.cache_seqlens + low);
    }
    limit_ = static_cast<std::uint32_t>(max(length, 0));
  }

  const SparsePrefillParams& p_;
  const int key_;  // whose entry this lane reads, of a tile's
  const unsigned lane_;
  int index_, tile_ = 0, left_ = 0;  // left_: entries from the tile on
  std::uint32_t begin_ = 0, limit_ = 0;
  const std::int32_t* table_ = nullptr;
  const std::int32_t* at_ = nullptr;
  std::uint32_t entry_;
};

}  // namespace flash_mla::sm90::sparse_prefill
