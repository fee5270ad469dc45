#pragma once

// The producer warps: gather the keys of a list, turn e4m3 into bf16 and put them into the key slots.
//
// Each of the eight brings 8 of a tile's 64 keys, in four batches and the rope part: a batch is two loads of 16 bytes
// per lane, for two keys and four chunks (256 e4m3 columns) each, and twice as many stores; lanes 0-3 of every eight
// take the even key, lanes 4-7 the odd one, whose swizzle differs in the lowest bit: the eight lanes of a store's phase
// hit all banks. The two batches of a half are on their way together, across tiles and requests, and none is asked for
// before the last half is stored: ptxas gives all these loads one scoreboard, so that waiting for one is waiting for
// the youngest.
//
// Nothing here fences: fence.proxy.async waits for a thread's loads on their way too. The consumers fence when they
// have waited for a half slot. A tile's rows are fetched into L2 half a tile ahead, a list when it begins. Scales are
// applied in fp32.

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/sparse_decode/sm90/smem.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::sparse {

/// 16 bytes at `from`, or zeros. Without a branch, so that loads on their way stay in order.
__device__ __forceinline__ uint4 load_row(const std::byte* from, bool wanted) {
  uint4 x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(from), "r"(static_cast<int>(wanted)));
  return x;
}
__device__ __forceinline__ std::uint32_t load_word(const std::byte* from, bool wanted) {
  std::uint32_t x;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.nc.u32 %0, [%1];\n}"
               : "=r"(x)
               : "l"(from), "r"(static_cast<int>(wanted)));
  return x;
}
__device__ __forceinline__ std::uint32_t load_byte(const std::byte* from, bool wanted) {
  std::uint32_t x;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.nc.u8 %0, [%1];\n}"
               : "=r"(x)
               : "l"(from), "r"(static_cast<int>(wanted)));
  return x;
}
__device__ __forceinline__ void store_shared(std::uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

/// Two e4m3, times scale, as two bf16.
__device__ __forceinline__ std::uint32_t widen2(std::uint16_t x, float scale) {
  std::uint32_t h;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(x));
  const float2 f = __half22float2(reinterpret_cast<const __half2&>(h));
  return pack2<true>(f.x * scale, f.y * scale);
}
__device__ __forceinline__ uint4 widen8(std::uint32_t low, std::uint32_t high, float scale) {
  return {
      widen2(static_cast<std::uint16_t>(low), scale), widen2(static_cast<std::uint16_t>(low >> 16), scale),
      widen2(static_cast<std::uint16_t>(high), scale), widen2(static_cast<std::uint16_t>(high >> 16), scale)};
}

template <KvFormat kFormat>
struct Producer {
  const SparseDecodeParams& p;
  Smem& s;
  const CUtensorMap* q_map;
  const PartRange& part;
  const int warp, own_lane;
  const int token;

  using Format = FormatOf<kFormat>;
  static constexpr bool kV32 = kFormat == KvFormat::kFp8V32;
  static constexpr std::uint32_t kNone = 0xFFFFFFFFu;

  // This lane, in a form the compiler knows nothing about: it would work out all that depends on it once and keep that
  // in registers that the loads need, and a spill of these warps waits for memory.
  __device__ int opaque_lane() const {
    int x = own_lane;
    asm volatile("" : "+r"(x));
    return x;
  }

  // ---- which tile comes next

  // What a tile is: 8 * request + 4 * list + 2 * (first of its item) + slot, -1 behind the last.
  using TileCode = int;

  // The tiles that follow, of a list those in a row.
  struct Cursor {
    const std::int32_t* at;  // this lane's index in the next tile
    int left;                // entries of the list from there on
    int tiles;               // of the run
    int end_tile;            // of the item
    TileCode code;           // of the next tile
  };

  // The run of an item's tiles from `tile` on.
  __device__ void begin_run(Cursor& c, int req, int tile, int end_tile, int first_and_slot) const {
    const int lane = opaque_lane();
    const int base_tiles = tiles_of(list_length(p.keys[0], req));
    const bool second = tile >= base_tiles;
    const ListedKeys& k = p.keys[second];
    const int in_list = second ? tile - base_tiles : tile;
    const int position = in_list * kTileTokens + warp * kWarpKeys + lane;
    c.at = k.indices + req * k.indices_stride_b + token * k.indices_stride_s + position;
    // The list, up to 64 lines of it, into L2: a tile's indices are waited for before its rows can be asked for.
    if (lane < kWarpKeys && (warp * kWarpKeys + lane) * 32 < k.topk - in_list * kTileTokens) {
      ptx::prefetch_l2(c.at - position + in_list * kTileTokens + (warp * kWarpKeys + lane) * 32);
    }
    c.left = lane < kWarpKeys ? list_length(k, req) - position : 0;
    c.tiles = (second ? end_tile : min(end_tile, base_tiles)) - tile;
    c.end_tile = end_tile;
    c.code = req * 8 + (second ? 4 : 0) + first_and_slot;
  }
  __device__ void begin_item(Cursor& c, Item item) const {
    const auto walk = walk_of(p, part);
    while (walk.holds(item) && item.begin_block >= item.end_block) item = walk.next(item);
    if (walk.holds(item)) {
      begin_run(c, item.req, item.begin_block, item.end_block, 2);
    } else {
      c.code = -1;
    }
  }
  // The next tile's code and this lane's index there, -1 if there is none.
  __device__ TileCode take(Cursor& c, int& index) const {
    const TileCode code = c.code;
    index = -1;
    if (code < 0) return code;
    if (c.left > 0) index = __ldg(c.at);
    c.at += kTileTokens;
    c.left -= kTileTokens;
    c.code = (code & ~2) ^ 1;
    if (--c.tiles == 0) {
      const int req = code >> 3, base_tiles = tiles_of(list_length(p.keys[0], req));
      if ((code & 4) == 0 && c.end_tile > base_tiles) {
        begin_run(c, req, base_tiles, c.end_tile, c.code & 1);
      } else {
        const auto walk = walk_of(p, part);
        begin_item(c, walk.next({req, walk.tables.length(req), 0, c.end_tile, false, 0}));
      }
    }
    return code;
  }

  // ---- where its keys lie

  // Of this lane's key (lanes 0 to 7): its row, in units of 16 bytes, and V4's scales, in units of 8; kNone if there is
  // none.
  struct Rows {
    std::uint32_t row, scales;
  };
  __device__ Rows rows_of(TileCode code, int index) const {
    if (index < 0) return {kNone, 0};
    const ListedKeys& k = p.keys[code >> 2 & 1];
    const auto n = static_cast<std::uint32_t>(index);
    const std::uint32_t page = k.page_magic == 0 ? n : __umulhi(n, k.page_magic) >> k.page_shift;
    const std::uint32_t offset = n - page * k.page_size;
    return {page * k.page_units + offset * k.token_units,
            kV32 ? 0
                 : page * k.page_units * 2 + k.page_size * (kv::Fp8V4::kRowBytes / kv::Fp8V4::kScaleBytes) +
                       offset};
  }
  // Where this lane reads: its 16 bytes of chunks 0 to 3 of a row, and its scale there.
  struct Base {
    const std::byte *data, *scale;
  };
  __device__ Base base_of(TileCode code) const {
    const int lane = opaque_lane();
    const std::byte* cache = p.keys[code >> 2 & 1].cache;
    return {cache + (lane >> 3) * 64 + (lane & 3) * 16,
            cache + (kV32 ? kv::Fp8V32::kScaleOffset + (lane >> 4) * 4 : lane >> 3)};
  }
  // Brings the rows into L2: six lines each, two per quarter of a warp's lanes.
  __device__ void prefetch(const Rows& rows, TileCode code) const {
    const int lane = opaque_lane();
    const std::uint32_t row = __shfl_sync(0xFFFFFFFFu, rows.row, lane >> 2);
    if (row == kNone) return;
    const std::byte* from = p.keys[code >> 2 & 1].cache + row * std::uint64_t{16} + (lane & 3) * 128;
    ptx::prefetch_l2(from);
    if ((lane & 3) < 2) ptx::prefetch_l2(from + 512 - (kV32 ? 0 : 64));
  }

  // ---- loads and stores

  // Batch 0 or 1 of either half.
  struct Batch {
    uint4 data[2];
    std::uint32_t scale[2];
  };
  template <int kHalf, int kBatch>
  __device__ void load(const Base& base, const Rows& rows, Batch& x) const {
    const int lane = opaque_lane();
    const bool in_latent = kV32 || kHalf == 0 || lane < 24;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int source = 4 * kBatch + 2 * i + (lane >> 2 & 1);
      const std::uint32_t row = __shfl_sync(0xFFFFFFFFu, rows.row, source);
      const bool wanted = row != kNone && in_latent;
      x.data[i] = load_row(base.data + row * std::uint64_t{16} + kHalf * 256, wanted);
      if constexpr (kV32) {
        x.scale[i] = load_word(base.scale + row * std::uint64_t{16} + kHalf * 8, wanted);
      } else {
        const std::uint32_t scales = __shfl_sync(0xFFFFFFFFu, rows.scales, source);
        x.scale[i] = load_byte(base.scale + scales * std::uint64_t{8} + kHalf * 4, wanted);
      }
    }
  }
  __device__ void load_rope(TileCode code, const Rows& rows, uint4 (&x)[2]) const {
    const int lane = opaque_lane();
    const std::byte* base = p.keys[code >> 2 & 1].cache + Format::kRopeOffset + (lane & 7) * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t row = __shfl_sync(0xFFFFFFFFu, rows.row, 4 * i + (lane >> 3));
      x[i] = load_row(base + row * std::uint64_t{16}, row != kNone);
    }
  }
  // In chunk 0 of a slot: this lane's key and unit of 16 bytes, but for what depends on the batch.
  __device__ std::uint32_t place() const {
    const int lane = opaque_lane();
    const int odd = lane >> 2 & 1;
    return (lane >> 3) * kChunkBytes + (warp * kWarpKeys + odd) * 128 + ((2 * (lane & 3)) ^ odd) * 16;
  }
  template <int kHalf, int kBatch>
  __device__ void store(std::uint32_t to, const Batch& x) const {
    if (!kV32 && kHalf == 1 && own_lane >= 24) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      constexpr int kFirst = 2 * kBatch;
      const float scale = __uint_as_float(kV32 ? x.scale[i] : x.scale[i] << 23);
      const std::uint32_t at = (to ^ ((kFirst + i) * 32)) + (kFirst + i) * 256 + kHalf * (4 * kChunkBytes);
      store_shared(at, widen8(x.data[i].x, x.data[i].y, scale));
      store_shared(at ^ 16, widen8(x.data[i].z, x.data[i].w, scale));
    }
  }
  __device__ void store_rope(std::uint32_t slot, const uint4 (&x)[2]) const {
    const int lane = opaque_lane();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = 4 * i + (lane >> 3);
      store_shared(slot + Format::kRopeChunk * kChunkBytes + (warp * kWarpKeys + key) * 128 +
                       (((lane & 7) ^ key) << 4),
                   x[i]);
    }
  }
  // This warp's keys lie in the half slot.
  __device__ void signal(std::uint64_t& full) const {
    __syncwarp();
    if (own_lane == 0) ptx::mbarrier_arrive(&full);
  }

  __device__ void load_q(int req) const {
    const int first_head = (static_cast<int>(blockIdx.x) - token * p.blocks.head_chunks) * kTileRows;
    constexpr int kQ = Format::kHeadDim / 64;
    ptx::mbarrier_arrive_expect_tx(&s.q_full, static_cast<std::uint32_t>(p.blocks.heads * kQ) * 128);
#pragma unroll 1
    for (int c = 0; c < kQ; ++c) ptx::tma_load_5d(s.q.at(c), q_map, &s.q_full, 0, first_head, token, c, req);
  }

  __device__ void run() const {
    Cursor cursor{};
    begin_item(cursor, walk_of(p, part).first());
    int index = 0;
    TileCode code = take(cursor, index);
    if (code < 0) return;
    Rows rows = rows_of(code, index);
    Base base = base_of(code);
    Batch x, y;
    uint4 rope[2];
    load<0, 0>(base, rows, x);
    load<0, 1>(base, rows, y);
    TileCode next_code = take(cursor, index);
    std::uint32_t q_free = 1, free = 3;  // parities to wait for, by slot
    while (code >= 0) {
      const int slot = code & 1;
      if ((code & 2) != 0 && warp == 0) {
        ptx::mbarrier_wait(&s.q_empty, q_free);
        q_free ^= 1;
        if (ptx::elect_one()) load_q(code >> 3);
      }
      const std::uint32_t to = ptx::smem_address(s.kv[slot].at(0)) + place();
      const std::uint32_t parity = free >> slot & 1;
      free ^= 1u << slot;
      const std::uint32_t valid = __ballot_sync(0xFFFFFFFFu, rows.row != kNone);
      ptx::mbarrier_wait(&s.kv_empty[slot][0], parity);
      if (own_lane == 0) s.valid[slot][warp] = static_cast<std::uint8_t>(valid);
      store<0, 0>(to, x);
      store<0, 1>(to, y);
      load<1, 0>(base, rows, x);
      load<1, 1>(base, rows, y);
      load_rope(code, rows, rope);
      signal(s.kv_full[slot][0]);
      if (((code ^ next_code) & 4) != 0) base = base_of(next_code);
      code = next_code;
      rows = rows_of(code, index);
      prefetch(rows, code);
      next_code = take(cursor, index);
      ptx::mbarrier_wait(&s.kv_empty[slot][1], parity);
      store<1, 0>(to, x);
      store<1, 1>(to, y);
      store_rope(ptx::smem_address(s.kv[slot].at(0)), rope);
      load<0, 0>(base, rows, x);
      load<0, 1>(base, rows, y);
      signal(s.kv_full[slot][1]);
    }
  }
};

}  // namespace flash_mla::sm90::sparse
