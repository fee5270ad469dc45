#pragma once

// The indexer's scores of a tile of keys, in the instruction set that was chosen. A tile lies with its keys as
// lanes: no sum ever crosses lanes, and a key that is not there, or NaN, touches no other.

#include <cstddef>
#include <cstdint>

namespace flash_mla::cpu {

inline constexpr int kTileKeys = 64;
inline constexpr int kMaxIndexHeads = 128;
inline constexpr int kMaxIndexDim = 128;

/// How the elements of keys and queries lie in memory.
enum class IndexElement : std::uint8_t { kE4m3, kBFloat16, kFloat32 };

struct IndexTileKernel {
  /// Bytes of a tile of keys, and of the queries of one token, as the kernel lays them out; multiples of 64.
  std::size_t (*tile_bytes)(int dim);
  std::size_t (*query_bytes)(int heads, int dim);
  /// keys[0..n) into a tile; the other keys of it are those of keys[0].
  void (*pack_keys)(const std::byte* const* keys, int n, IndexElement element, int dim, void* tile);
  void (*pack_query)(const std::byte* query, IndexElement element, int heads, int dim, void* packed);
  /// scores[t] = sum_h weights[h] * max(query[h] · key[t], 0) for the kTileKeys keys of a tile.
  void (*score)(const void* tile, const void* query, const float* weights, int heads, int dim, float* scores);
};

/// dim is a multiple of 16, up to kMaxIndexDim. Products of bf16 pairs where the processor has them and the
/// elements fit; fp32 otherwise.
const IndexTileKernel& index_tile_kernel(IndexElement element);

const IndexTileKernel& avx512_bf16_index_tile_kernel();
const IndexTileKernel& highway_index_tile_kernel();

}  // namespace flash_mla::cpu
