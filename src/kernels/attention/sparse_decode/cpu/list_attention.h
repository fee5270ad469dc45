#pragma once

// A block of query rows against a list of tokens, wherever in their pools they lie: the tile kernels of dense
// decode, over keys that are gathered, and dequantised where the cache is FP8, tile by tile. One object per
// thread.
//
// Rows of a cache in q's dtype are read where they lie. All others become rows of the tile kernel's own
// arithmetic in the scratch memory: bf16 pairs with AVX512_BF16, else fp32.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <utility>

#include "kernels/attention/dense_decode/cpu/tile.h"
#include "kv/format.h"

namespace flash_mla::cpu {

/// What stays the same for all rows and lists of a call.
struct ListProblem {
  DType dtype = DType::kBFloat16;  ///< of q and out
  int d_qk = 0;
  int d_v = 512;
  int block_rows = 1;    ///< most query rows of a block, up to kMaxRows
  bool any_fp8 = false;  ///< among the caches
  float softmax_scale = 1.0f;
};

/// A token that a list selects.
struct SelectedKey {
  kv::Token token;
  const kv::Pool* pool = nullptr;
};

class ListAttention {
 public:
  static std::size_t scratch_bytes(const ListProblem& problem);

  ListAttention(const ListProblem& problem, std::byte* scratch);

  /// Begins a block: `rows` query rows of d_qk elements.
  void begin(const void* const* q_rows, int rows);

  /// Attends to everything that `source` has to give: source.take(SelectedKey*, n) writes up to n keys and
  /// returns how many, 0 at the end. Returns the number of keys.
  template <class Source>
  std::int64_t attend(Source& source) {
    std::int64_t keys = 0;
    int next_count = source.take(next_, kernel_.tile_tokens);
    while (next_count > 0) {
      const int count = next_count;
      std::swap(current_, next_);
      // One tile ahead, so that its rows are on their way while this one is computed.
      next_count = source.take(next_, kernel_.tile_tokens);
      attend_tile(count, next_count, keys == 0);
      keys += count;
    }
    return keys;
  }

  /// Statistics of a row after attend(), in base 2: largest scaled score, and sum of the weights relative to
  /// it.
  float row_max(int row) const { return tile_scratch_.row_max[row]; }
  float row_sum(int row) const { return tile_scratch_.row_sum[row]; }

  /// Writes O[row] * factor to d_v elements of `dtype`.
  void store(int row, float factor, DType dtype, void* out) const {
    kernel_.store_row(tile_, tile_scratch_, row, factor, dtype, out);
  }

 private:
  void attend_tile(int count, int next_count, bool first);

  const ListProblem& problem_;
  const TileKernel& kernel_;
  TileProblem tile_;
  TileScratch tile_scratch_;
  SelectedKey* current_;
  SelectedKey* next_;
  std::byte* rows_;  // dequantised keys of a tile
  float* wide_q_;    // queries in fp32, where the tile kernel takes those
  const void** wide_rows_;
};

/// Whether the tile kernel works on float32 copies of queries and keys.
bool works_in_fp32(const ListProblem& problem);

}  // namespace flash_mla::cpu
