#pragma once

// What the roles of the sparse decode kernel share: the shared-memory map and the work of a part.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/sparse_decode/sm90/params.h"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/tile.cuh"
#include "kv/format.h"
#include "schedule/walk.h"

namespace flash_mla::sm90::sparse {

inline constexpr int kChunkBytes = kTileTokens * 64 * 2;  ///< 64 keys x 64 columns
inline constexpr int kConsumerThreads = 256;
inline constexpr int kProducerWarps = 8;
inline constexpr int kThreads = kConsumerThreads + kProducerWarps * 32;
inline constexpr int kWarpKeys = kTileTokens / kProducerWarps;
inline constexpr float kMaxGrowth = 8.0f;  // base 2

/// How the kernel sees a format (include/flash_mla/kv_cache.h).
template <KvFormat kFormat>
struct FormatOf;
template <>
struct FormatOf<KvFormat::kFp8V32> : kv::Fp8V32 {
  static constexpr int kHeadDim = 576, kRopeChunk = 8;
};
template <>
struct FormatOf<KvFormat::kFp8V4> : kv::Fp8V4 {
  static constexpr int kHeadDim = 512, kRopeChunk = 7;  // inside V
};

struct alignas(1024) Smem {
  using Element = ptx::Element<true>;
  ptx::Tile<Element, kTileRows, kHeadDim> q;
  ptx::Tile<Element, kTileTokens, kHeadDim> kv[2];
  float exchange[2][kTileRows];                      // by warpgroup: the softmax reference it has moved to
  float row_sum[2][2][kTileRows];                    // by parity of the item
  alignas(8) std::uint8_t valid[2][kProducerWarps];  // by slot: a bit for each key that is one
  std::uint64_t q_full, q_empty;
  std::uint64_t kv_full[2][2];   // by slot and half: chunks 0-3, the rest
  std::uint64_t kv_empty[2][2];  // by slot and half: chunks 0-3 are WG0's columns, 4-7 WG1's

  /// A quarter of V's columns: what a product takes.
  __device__ auto& values(int slot, int quarter) {
    return kv[slot].template columns<kHeadDimV / 4>(quarter * kHeadDimV / 4);
  }
  /// P takes the last chunk, over the rope part where that is not part of V.
  __device__ auto& weights(int slot) { return kv[slot].template columns<kTileTokens>(kHeadDimV); }
};

enum NamedBarrier : int { kP0Ready = 1, kP1Ready, kOrder, kItemEnd, kP1HalfReady };

__device__ __forceinline__ int list_length(const ListedKeys& k, int req) {
  if (k.cache == nullptr) return 0;
  return k.topk_length == nullptr ? k.topk : max(min(k.topk_length[req], k.topk), 0);
}
__device__ __forceinline__ int tiles_of(int entries) { return (entries + kTileTokens - 1) / kTileTokens; }

using Item = PartItem<int>;

/// The requests and tiles of part `index`.
__device__ __forceinline__ PartRange part_of(const SparseDecodeParams& p, int index) {
  if (p.uniform.blocks > 0) return p.uniform.part(index, p.batch);
  const int4 row = reinterpret_cast<const int4*>(p.parts)[2 * static_cast<std::int64_t>(index)];
  return {row.x, row.y, row.z, row.w};
}

/// What the walk reads, of the part that this CTA works on. A request's tiles are those of both lists.
struct ListTables {
  const SparseDecodeParams& p;
  const PartRange& part;

  __device__ static constexpr int block_size() { return kTileTokens; }
  __device__ int fixed_split_blocks() const { return p.split_tiles; }
  __device__ int length(int req) const {
    return (tiles_of(list_length(p.keys[0], req)) + tiles_of(list_length(p.keys[1], req))) * kTileTokens;
  }
  __device__ int splits_before(int req) const {
    return p.uniform.blocks > 0 ? p.uniform.splits_before(req) : p.num_splits[req];
  }
  __device__ int begin_split() const {
    return p.uniform.blocks > 0 ? p.uniform.begin_split(part)
                                : p.parts[static_cast<std::int64_t>(blockIdx.z) * 8 + 4];
  }
  __device__ int slot(int req, int before, int split, bool fixed) const {
    return fixed ? before + split : before - req + (split == 0 ? p.num_parts : split - 1);
  }
};

/// The walk over a part's items.
__device__ __forceinline__ PartWalk<int, ListTables> walk_of(const SparseDecodeParams& p,
                                                             const PartRange& part) {
  return {part, {p, part}};
}

/// The query token of this CTA's rows.
__device__ __forceinline__ int token_of_block(const SparseDecodeParams& p) {
  return p.blocks.by_chunks(static_cast<int>(blockIdx.x));
}

}  // namespace flash_mla::sm90::sparse
