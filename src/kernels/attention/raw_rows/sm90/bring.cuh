#pragma once

// What a producer warp does with 16 keys of a tile: their rows into a slot of the ring, as they are; those of keys that
// are none become zeros.

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::raw_rows {

/// A key of lanes 0 to 15: where its row begins, or null; null in other lanes. Of formats with a table its scales.
template <class Format>
struct Key {
  const std::byte* row;
  typename Format::Scales scales;
};

/// One copy a row, by the copy engine.
template <class S>
__device__ void copy_rows(S& s, int slot, int lane, std::uint32_t valid, const std::byte* row) {
  using F = typename S::Format;
  const std::uint32_t to = ptx::smem_address(s.rows[slot]);
  for (std::uint32_t none = ~valid & ((1u << kGroupKeys) - 1); none != 0; none &= none - 1) {
    const std::uint32_t at = to + (__ffs(static_cast<int>(none)) - 1) * F::kStride;
    for (int i = lane; i < F::kBytes / 16; i += 32) ptx::store_shared_16(at + i * 16, uint4{0, 0, 0, 0});
    ptx::fence_async_proxy();  // the copy engine's are next to write there
  }
  __syncwarp();
  if (lane == 0) {
    ptx::mbarrier_arrive_expect_tx(&s.rows_full[slot], static_cast<std::uint32_t>(__popc(valid) * F::kBytes));
  }
  __syncwarp();
  if (row != nullptr) ptx::bulk_load(s.rows[slot] + lane * F::kStride, row, F::kBytes, &s.rows_full[slot]);
}

/// 2^n for n of -24 to 15, else 0 or NaN for 129, as fp16.
__device__ __forceinline__ std::uint16_t half_power(int n) {
  if (n < -24) return 0;
  if (n > 15) return 0x7FFF;
  return static_cast<std::uint16_t>(n >= -14 ? (n + 15) << 10 : 1 << (n + 24));
}

/// A key's e8m0 scales as the slot's table has them. A scale of 0xFF is NaN, and so is what is multiplied with it.
__device__ inline void store_scales(ScaleTable<V4Rows>& table, int key, uint2 scales) {
  const auto exponent = [&](int block) {
    return static_cast<int>((block < 4 ? scales.x >> (8 * block) : scales.y >> (8 * block - 32)) & 0xFF);
  };
  int largest = 7;  // so that the key's number is a normal one
#pragma unroll
  for (int b = 0; b < V4Rows::kScales; ++b) {
    if (exponent(b) != 0xFF) largest = max(largest, exponent(b));
  }
#pragma unroll
  for (int b = 0; b < V4Rows::kScales; ++b) {
    const int e = exponent(b);
    table.of[b][key] = half_power(e == 0xFF ? 129 : e - largest + 6);
  }
  table.of_key[key] = __uint_as_float(static_cast<std::uint32_t>(largest - 6) << 23);
}
template <class S>
__device__ void bring_rows(S& s, const RingPlace<S::kRing>& place, int lane,
                           const Key<typename S::Format>& key) {
  const std::uint32_t valid = __ballot_sync(0xFFFFFFFFu, key.row != nullptr);
  ptx::mbarrier_wait(&s.rows_empty[place.slot], place.phase ^ 1);
  if (lane == 0) s.valid[place.slot] = valid;
  if constexpr (S::Format::kTable) {
    if (lane < kGroupKeys) store_scales(s.scales(place.slot), lane, key.scales);
  }
  copy_rows(s, place.slot, lane, valid, key.row);
}

}  // namespace flash_mla::sm90::raw_rows
