#pragma once

// How a producer warp brings its 16 keys of a tile into a slot, by format of the cache: rows of 16-bit elements by
// asynchronous copies, e4m3 through registers, where it is widened.
//
// A part is half of V's columns (0 and 1; four chunks), or the rope chunk (2). `chunk` is the address of the warp's first
// key in the part's first chunk. arrive() counts the warp's threads in at the part's barrier, once what they have put there
// is there.

#include <cuda.h>

#include <cstdint>

#include "kernels/attention/sparse_prefill/sm90/selection.cuh"
#include "kernels/attention/sparse_prefill/sm90/smem.cuh"
#include "kernels/attention/sparse_prefill/sm90/widen.cuh"
#include "kernels/ptx/mma.cuh"
#include "kv/format.h"

namespace flash_mla::sm90::sparse_prefill {

/// kChunks times 128 bytes at `offset` of this lane's rows, each by eight lanes.
template <int kChunks>
__device__ __forceinline__ void copy_rows(const Rows& rows, std::uint32_t chunk, unsigned offset,
                                          unsigned lane) {
  const unsigned sub = lane / 8;
  const std::uint32_t to = chunk + sub * 128 + (lane ^ sub) % 8 * 16;
#pragma unroll
  for (int i = 0; i < kWarpKeys / 4; ++i) {
    const std::uint32_t bytes = rows.is_valid(i) ? 16 : 0;
    const std::byte* const from = rows.at[i] + offset;
    const std::uint32_t place = (i % 2 == 0 ? to : to ^ 64) + static_cast<std::uint32_t>(i * 512);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      ptx::cp_async_16(place + static_cast<std::uint32_t>(c) * kChunkBytes, from + c * 128, bytes);
  }
}

/// Rows of 16-bit elements.
template <bool kBf16, KvFormat kFormat, int kHeadDim>
struct Gather {
  static constexpr bool kScales = false;
  static constexpr int kRegisters = 40;  ///< of a producer's thread
  const SparsePrefillParams& p;
  const unsigned lane;

  // Before a slot is free. From here on, rows begin where this lane reads.
  __device__ void begin(Rows& rows) const {
#pragma unroll
    for (auto& at : rows.at) at += lane % 8 * 16;
  }
  template <int kHalf>
  __device__ void half(const Rows& rows, std::uint32_t chunk) const {
    copy_rows<4>(rows, chunk, kHalf * 512, lane);
  }
  // Between the halves.
  __device__ void next(const Rows&) const {}
  __device__ void rope(const Rows& rows, std::uint32_t chunk) const {
    copy_rows<1>(rows, chunk, kHeadDimV * 2, lane);
  }
  /// Threads' arrivals at the barrier of a part.
  static constexpr int arrivals(int) { return kProducerWarps * 32; }
  template <int kPart>
  __device__ void arrive(std::uint64_t* full) const {
    ptx::cp_async_arrive(full);
  }
};

/// e4m3 with scales. A half row is eight lanes' two loads of 16 bytes (a chunk's 64 bytes by four lanes) and four stores.
/// All loads of a half are on their way together, those of the first before the slot is free.
template <bool kBf16, KvFormat kFormat, int kHeadDim>
requires(kv::is_fp8(kFormat)) struct Gather<kBf16, kFormat, kHeadDim> {
  static constexpr bool kV32 = kFormat == KvFormat::kFp8V32, kV4 = kFormat == KvFormat::kFp8V4;
  static constexpr bool kScales = kV4;
  static constexpr int kRegisters = 88;
  const SparsePrefillParams& p;
  const unsigned lane;
  uint4 data[kWarpKeys / 4][2];
  std::uint32_t scale[kWarpKeys / 4][2];

  __device__ void begin(const Rows& rows) { load<0>(rows); }
  template <int kHalf>
  __device__ void half(const Rows& rows, std::uint32_t chunk) {
    if (kV4 && kHalf == 1) bring_rope<kv::Fp8V4::kRopeOffset>(rows, chunk + 3 * kChunkBytes);
#pragma unroll
    for (int i = 0; i < kWarpKeys / 4; ++i) store<kHalf>(chunk, i);
  }
  __device__ void next(const Rows& rows) { load<1>(rows); }
  __device__ void rope(const Rows& rows, std::uint32_t chunk) const {
    if constexpr (kV32) {
      bring_rope<kv::Fp8V32::kRopeOffset>(rows, chunk);
    } else {
      // Four of the eight lanes have something to do.
      const bool wanted = lane % 8 < 4;
#pragma unroll
      for (int i = 0; i < kWarpKeys / 4; ++i) {
        const uint4 x =
            load_16(rows.at[i] + kv::Fp8Tensor::kRopeOffset + lane % 4 * 16, wanted && rows.is_valid(i));
        if (wanted) put(chunk, i, lane % 4, x, p.cache_scale);
      }
    }
  }
  /// Whether a part comes through registers, and whether (some of it) by asynchronous copies: bfloat16 that stays so.
  static constexpr bool is_copied(int part) { return kBf16 && (part == 2 ? kV32 : kV4 && part == 1); }
  static constexpr bool is_stored(int part) { return part < 2 || !is_copied(part); }
  static constexpr int arrivals(int part) {
    return kProducerWarps * 32 * ((is_stored(part) ? 1 : 0) + (is_copied(part) ? 1 : 0));
  }
  template <int kPart>
  __device__ void arrive(std::uint64_t* full) const {
    if constexpr (is_copied(kPart)) ptx::cp_async_arrive(full);
    if constexpr (is_stored(kPart)) ptx::mbarrier_arrive(full);
  }

 private:
  // The rope part, 64 bfloat16 at kOffset of a row.
  template <int kOffset>
  __device__ void bring_rope(const Rows& rows, std::uint32_t chunk) const {
    const unsigned offset = kOffset + lane % 8 * 16;
    if constexpr (kBf16) {
      copy_rows<1>(rows, chunk, offset, lane);
    } else {
#pragma unroll
      for (int i = 0; i < kWarpKeys / 4; ++i) {
        const unsigned key = static_cast<unsigned>(4 * i) + lane / 8;
        const uint4 x = load_16(rows.at[i] + offset, rows.is_valid(i));
        store_16(chunk + key * 128 + (lane ^ key) % 8 * 16,
                 {to_half2(x.x), to_half2(x.y), to_half2(x.z), to_half2(x.w)});
      }
    }
  }

  // This lane's chunk of load j of a half: lanes 0-3 of every eight take chunk 2 j, lanes 4-7 the one behind it.
  __device__ unsigned chunk_of(int j) const { return 2 * static_cast<unsigned>(j) + lane / 4 % 2; }
  // Of V4, the last chunk is the rope part.
  template <int kHalf>
  __device__ bool in_latent(int j) const {
    return !(kV4 && kHalf == 1 && j == 1) || lane / 4 % 2 == 0;
  }

  template <int kHalf>
  __device__ void load(const Rows& rows) {
#pragma unroll
    for (int i = 0; i < kWarpKeys / 4; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool wanted = rows.is_valid(i) && in_latent<kHalf>(j);
        data[i][j] = load_16(rows.at[i] + kHalf * 256 + chunk_of(j) * 64 + lane % 4 * 16, wanted);
        if constexpr (kV32) {
          scale[i][j] = load_4(rows.at[i] + kv::Fp8V32::kScaleOffset + kHalf * 8 + j * 4, wanted);
        } else if constexpr (kV4) {
          scale[i][j] = load_1(
              p.cache + kHalf * 4 + chunk_of(j) + rows.scales[i] * std::uint64_t{kv::Fp8V4::kScaleBytes},
              wanted);
        }
      }
    }
  }
  template <int kHalf>
  __device__ void store(std::uint32_t chunk, int i) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const std::uint32_t x = scale[i][j];
      const float factor = kV32 ? __uint_as_float(x) : kV4 ? e8m0(x) : p.cache_scale;
      if (in_latent<kHalf>(j)) put(chunk + chunk_of(j) * kChunkBytes, i, lane % 4, data[i][j], factor);
    }
  }
  // 16 elements to units 2 unit and 2 unit + 1 of this lane's key i. (The eight lanes of a store's phase hit half of the
  // banks, twice: lanes 4-7 write the same units of another chunk, and so take theirs in the other order.)
  __device__ void put(std::uint32_t chunk, int i, unsigned unit, uint4 x, float factor) const {
    const unsigned key = static_cast<unsigned>(4 * i) + lane / 8;
    const std::uint32_t at = chunk + key * 128 + ((2 * unit) ^ (key % 8)) * 16;
    const uint4 low = widen8<kBf16>(x.x, x.y, factor), high = widen8<kBf16>(x.z, x.w, factor);
    const bool swapped = lane / 4 % 2 != 0;
    store_16(swapped ? at ^ 16 : at, swapped ? high : low);
    store_16(swapped ? at : at ^ 16, swapped ? low : high);
  }
};

}  // namespace flash_mla::sm90::sparse_prefill
