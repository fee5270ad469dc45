#pragma once

// What a producer warp does with 16 keys of a tile: their rows into a slot of the ring, as they are; those of keys that
// are none become zeros.

#include <cstdint>

#include "kernels/attention/fp8_decode/sm90/smem.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::fp8_decode {

inline constexpr int kRowUnits = kRowStride / 16;

/// Arrivals of a warp at a slot's barrier.
template <bool kBulk>
inline constexpr int kRowArrivals = kBulk ? 1 : 32;

/// One copy a row, by the copy engine.
template <int kHeads>
__device__ void bring_by_bulk(Smem<kHeads>& s, int slot, int lane, std::uint32_t valid,
                              const std::byte* row) {
  const std::uint32_t to = ptx::smem_address(s.rows[slot]);
  for (std::uint32_t none = ~valid & ((1u << kGroupKeys) - 1); none != 0; none &= none - 1) {
    const std::uint32_t at = to + (__ffs(static_cast<int>(none)) - 1) * kRowStride;
    for (int i = lane; i < kRowUnits; i += 32) {
      ptx::store_shared_16(at + i * 16, uint4{0, 0, 0, 0});
    }
  }
  __syncwarp();
  if (lane == 0) {
    ptx::mbarrier_arrive_expect_tx(&s.rows_full[slot],
                                   static_cast<std::uint32_t>(__popc(valid) * kRowStride));
  }
  __syncwarp();
  if (row != nullptr) ptx::bulk_load(s.rows[slot] + lane * kRowStride, row, kRowStride, &s.rows_full[slot]);
}

/// Copies of 16 bytes, which leave no register waiting either.
template <int kHeads>
__device__ void bring_by_pieces(Smem<kHeads>& s, int slot, int lane, const std::byte* row) {
  std::uint32_t to = ptx::smem_address(s.rows[slot]) + lane * 16;
  int key = 0, unit = lane;  // of this lane's next piece
#pragma unroll 3
  for (int i = 0; i < (kGroupKeys * kRowUnits + 31) / 32; ++i) {
    if (unit >= kRowUnits) {
      unit -= kRowUnits;
      ++key;
    }
    const auto from = reinterpret_cast<const std::byte*>(
        __shfl_sync(0xFFFFFFFFu, reinterpret_cast<unsigned long long>(row), key % kGroupKeys));
    // Of a key that is none nothing is read.
    if (key < kGroupKeys) {
      ptx::copy_async_16_or_zeros(to, from + unit * 16, from != nullptr);
    }
    to += 512;
    unit += 32;
  }
  ptx::copy_async_arrive(&s.rows_full[slot]);
}

/// `row` of lanes 0 to 15: where the row of key `lane` begins, or null; null in other lanes.
template <int kHeads, bool kBulk>
__device__ void bring_rows(Smem<kHeads>& s, const RingPlace<kHeads>& place, int lane, const std::byte* row) {
  const std::uint32_t valid = __ballot_sync(0xFFFFFFFFu, row != nullptr);
  ptx::mbarrier_wait(&s.rows_empty[place.slot], place.phase ^ 1);
  if (lane == 0) s.valid[place.slot] = valid;
  if constexpr (kBulk) {
    bring_by_bulk(s, place.slot, lane, valid, row);
  } else {
    bring_by_pieces(s, place.slot, lane, row);
  }
}

}  // namespace flash_mla::sm90::fp8_decode
