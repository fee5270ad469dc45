#pragma once

// The inner kernel of the CPU backend: a block of query rows against a tile of keys, with a running softmax.
//
// A row is one query head of one query token; up to kMaxRows rows that share a latent head form a block. All
// work on a block is laid out so that a vector holds rows (scores, softmax) or latent columns (output), and a
// reduction never runs across lanes:
//
//   scores  S[t][row] = sum_d K[t][d] * Q[d][row]       K broadcast, Q a vector of rows
//   softmax down the columns of S
//   output  O[row][c] = alpha[row] * O[row][c] + sum_t P[t][row] * V[t][c]    P broadcast, V a vector of c
//
// One TileKernel exists per instruction set and arithmetic; `select_tile_kernel` picks one.

#include <cstddef>
#include <cstdint>

#include "flash_mla/tensor.h"

namespace flash_mla::cpu {

inline constexpr int kMaxRows = 128;

/// What stays the same for a block of rows.
struct TileProblem {
  DType dtype = DType::kBFloat16;  ///< of q, k_cache and out
  int rows = 0;
  int rows_padded = 0;  ///< multiple of TileKernel::row_lanes
  int d_qk = 0;
  int d_v = 0;
  float scale_log2 = 0;  ///< softmax_scale * log2(e): the softmax works in base 2
  int key_bytes = 0;     ///< of a row of the cache, to prefetch, where it is not d_qk elements of `dtype`
};

/// Memory of one thread, 64-byte aligned. Sizes are TileKernel's business.
struct TileScratch {
  std::byte* q = nullptr;         ///< the block's queries, packed
  std::byte* kv = nullptr;        ///< the tile's keys or values, unpacked or interleaved
  float* scores = nullptr;        ///< S, (tile_tokens, rows_padded)
  std::byte* p = nullptr;         ///< P, in the arithmetic's element type; may be `scores` itself
  float* out = nullptr;           ///< O in panels of TileKernel::panel columns: (panels, rows_padded, panel)
  float* row_max = nullptr;       ///< (rows_padded), base 2
  float* row_sum = nullptr;       ///< (rows_padded)
  float* alpha = nullptr;         ///< (rows_padded), factor on O for the current tile
  std::int32_t* limit = nullptr;  ///< (rows_padded), first token of the tile that a row does not see
  const void** keys = nullptr;    ///< (tile_tokens), rows of the cache
  const void** next_keys = nullptr;  ///< (tile_tokens), rows of the next tile, to prefetch
  int next_count = 0;
  /// (tile_tokens), rows of V; null: V is the first columns of the keys. next_keys then lists both, twice tile_tokens.
  const void** values = nullptr;
  /// Not null: changes S, which is as the product left it, before the softmax. In base 2 then, and TileProblem::scale_log2
  /// is 1. Rows past TileProblem::rows are without meaning.
  void (*adjust)(const void* context, const TileProblem&, const TileScratch&, int count) = nullptr;
  const void* adjust_context = nullptr;
};

/// Brings the next tile's keys towards the core, one cache line per call, while the current tile is computed:
/// with few heads a tile is computed faster than memory answers.
class Prefetcher {
 public:
  Prefetcher(const TileProblem& problem, const TileScratch& scratch)
      : keys_(scratch.next_keys),
        end_(scratch.next_keys + scratch.next_count),
        row_bytes_(problem.key_bytes > 0 ? problem.key_bytes
                                         : problem.d_qk * static_cast<int>(dtype_size(problem.dtype))),
        twice_(scratch.values != nullptr) {}

  __attribute__((always_inline)) void next() {
    line();
    if (twice_) line();
  }

 private:
  __attribute__((always_inline)) void line() {
    if (keys_ == end_) return;
    __builtin_prefetch(static_cast<const char*>(*keys_) + offset_, 0, 2);
    offset_ += 64;
    if (offset_ >= row_bytes_) {
      offset_ = 0;
      ++keys_;
    }
  }

  const void** keys_;
  const void** end_;
  int offset_ = 0;
  int row_bytes_;
  bool twice_;  // two rows a key
};

struct TileKernel {
  int tile_tokens;    ///< keys per tile
  int row_lanes;      ///< rows in one vector
  int panel;          ///< latent columns in one panel of O
  int element_bytes;  ///< of the packed q, kv and p: 4 (float) or 2 (bf16 pairs)

  /// Packs `rows` query rows of dtype and fills the padding with zeros.
  void (*pack_q)(const TileProblem&, const void* const* rows, const TileScratch&);

  /// One tile: keys[0..count), count >= 1. `first`: O, row_max and row_sum hold nothing yet. `masked`: some
  /// row sees fewer than `count` tokens (scratch.limit).
  void (*attend)(const TileProblem&, const TileScratch&, int count, bool first, bool masked);

  /// Writes O[row] * factor, d_v elements of `dtype`, to dst.
  void (*store_row)(const TileProblem&, const TileScratch&, int row, float factor, DType dtype, void* dst);
};

/// The bf16 dot-product kernel: products of bf16 pairs, fp32 accumulation, P rounded to bf16. Needs an
/// AVX512_BF16 machine and an even d_qk.
const TileKernel& avx512_bf16_tile_kernel();

/// The same on the matrix unit. Needs AMX_BF16 too, leave to use it (has_avx512_amx), and a d_qk divisible by 32.
const TileKernel& avx512_amx_tile_kernel();

/// The fp32 kernel for one of Highway's targets (HWY_AVX2, ...).
const TileKernel& highway_tile_kernel(std::int64_t target);

/// Highway's targets that this build contains and this machine has, as a bit mask.
std::int64_t highway_targets();

}  // namespace flash_mla::cpu
