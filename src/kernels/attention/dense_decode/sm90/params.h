#pragma once

#include <cstdint>

#include "schedule/uniform_plan.h"

namespace flash_mla::sm90 {

inline constexpr int kTileTokens = 64;  ///< keys per tile, and tokens per block of the schedule
inline constexpr int kTileRows = 64;    ///< query rows per CTA
inline constexpr int kHeadDim = 576;
inline constexpr int kHeadDimV = 512;

/// How the s_q x group query rows of one latent head are cut into CTAs. A row block is `tokens` query tokens
/// times `heads` heads, at most kTileRows rows, token-major.
struct RowBlocks {
  int tokens;        ///< query tokens in a block
  int heads;         ///< heads in a block
  int head_chunks;   ///< blocks along the heads of a token
  int token_blocks;  ///< blocks along the tokens
  constexpr int count() const { return head_chunks * token_blocks; }

  // Division by these as a product: a division is twenty instructions, and a small batch waits for every one
  // of them to be fetched. Right for every row and block where divides_exactly().
  static constexpr std::uint32_t inverse(int n) {
    return n > 0 ? ((1u << 16) + static_cast<std::uint32_t>(n) - 1) / static_cast<std::uint32_t>(n) : 0;
  }
  std::uint32_t heads_inverse = inverse(heads), chunks_inverse = inverse(head_chunks);
  constexpr int by_heads(int row) const {
    return static_cast<int>(static_cast<std::uint32_t>(row) * heads_inverse >> 16);
  }
  constexpr int by_chunks(int block) const {
    return static_cast<int>(static_cast<std::uint32_t>(block) * chunks_inverse >> 16);
  }
  /// n * inverse(d) / 2^16 rounds down to n / d as long as n times the excess of d * inverse(d) over 2^16 is
  /// below 2^16. Rows are below kTileRows, where it always is.
  constexpr bool divides_exactly() const {
    const std::int64_t excess = static_cast<std::int64_t>(head_chunks) * chunks_inverse - (1 << 16);
    const std::int64_t last = static_cast<std::int64_t>(head_chunks) * token_blocks - 1;
    return last * excess < (1 << 16) && last < (1 << 16);
  }
};

/// Query token and head (of the group) of row `row` of row block `block`.
struct RowPlace {
  int token, head;
};
constexpr RowPlace place_of(const RowBlocks& b, int block, int row) {
  const int token_block = b.by_chunks(block), token = b.by_heads(row);
  return {token_block * b.tokens + token,
          (block - token_block * b.head_chunks) * kTileRows + row - token * b.heads};
}

constexpr RowBlocks row_blocks(int s_q, int group) {
  if (group >= kTileRows) return {1, kTileRows, (group + kTileRows - 1) / kTileRows, s_q};
  const int fit = kTileRows / group;
  const int tokens = fit < s_q ? fit : s_q;
  return {tokens, group, 1, (s_q + tokens - 1) / tokens};
}

/// Groups of 16 rows, one per warp of a warpgroup, that a row block needs.
constexpr int row_groups(const RowBlocks& b) { return (b.tokens * b.heads + 15) / 16; }

/// Grid height of the combine kernel: groups of 16 rows of all row blocks, and two halves of the columns.
constexpr std::int64_t combine_row_groups(const RowBlocks& b, std::int64_t h_kv) {
  return 2 * h_kv * b.head_chunks * b.token_blocks * row_groups(b);
}

/// float4s of one warp's share of a partial result: 16 rows x 256 columns. Lane l holds, of column group i,
/// columns 8 i + 2 (l % 4) and the next one of rows l / 4 and l / 4 + 8.
inline constexpr int kFragment = 32 * 32;

/// What combining knows of sparse decode.
struct ListsOfCombine {
  const float* attn_sink = nullptr;  ///< (h_q), natural log; or null
  UniformPlan uniform{};  ///< instead of `parts` and `num_splits`, where all lists are of one length
};

/// What the combine kernel reaches with 32 bits, in units of 16 bytes.
inline constexpr std::int64_t kMaxPartialBytes = std::int64_t{1} << 36;

/// What the decode and combine kernels need beside the tensor maps. Strides count elements.
struct DecodeParams {
  RowBlocks blocks;
  float groups_inverse,
      count_inverse;  ///< 1 / row_groups(blocks), 1 / blocks.count(), for the combine kernel
  int batch, s_q, h_q, group;
  int page_size;
  int table_width;     ///< columns of block_table
  int q_box_chunks;    ///< 64-column chunks that one copy of Q brings: 1 or 3
  int out_box_chunks;  ///< the same of one copy to out: 1 or 4; 0 if rows are stored from registers
  int num_parts;
  int split_tiles;  ///< 0, or batch-invariant mode: every request is cut at multiples of this
  bool token_rows;  ///< rows of `parts` are as FlashMLA's until September 2025
  bool causal;
  float scale_log2;  ///< softmax_scale * log2(e)

  const std::int32_t* block_table;
  std::int64_t block_table_stride;
  const std::int32_t* cache_seqlens;
  const std::int32_t* parts;       ///< (num_parts, 8), rows as DecodePart or in tokens
  const std::int32_t* num_splits;  ///< (batch + 1)

  void* out;
  std::int64_t out_stride_b, out_stride_s, out_stride_h;
  float* lse;  ///< may be null
  std::int64_t lse_stride_b, lse_stride_h, lse_stride_s;

  /// Partial results of split requests. Let e = num_splits[r] - r, the splits beyond the first of all
  /// requests before r: split 0 of request r lies in slot num_parts + e, split i > 0 in slot e + i - 1. With
  /// split_tiles, split i lies in slot num_splits[r] + i.
  ///
  /// O lies there as the consumers' registers hold it, not normalised: (slots, h_kv * blocks, groups of 16
  /// rows, 2 warpgroups, 32 groups of 8 columns, 32 lanes, 4), see kFragment. The statistics are (slots, h_kv
  /// * blocks, groups, 16 rows, 2): the reference, -inf if the row saw no key, and the sum relative to it,
  /// base 2.
  float* partial_out;
  float* partial_stats;
};

}  // namespace flash_mla::sm90
