#pragma once

// A block of query rows that share a key head against a run of keys, by a tile kernel.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_decode/cpu/tile.h"
#include "kernels/attention/gqa/cpu/gqa.h"

namespace flash_mla::cpu {

/// Rows first_row, first_row + 1, ... of a sequence and key head: row i is query i / group and head i % group of the group.
struct RowBlock {
  std::int64_t req, head;
  std::int64_t first_row;
  int rows;
};

/// What one thread works with: a tile kernel and its memory.
class GqaRows {
 public:
  /// Bytes of one thread's memory, a multiple of 64.
  static std::size_t bytes(const GqaCall& call);
  GqaRows(const GqaCall& call, std::byte* memory);

  /// Attends to keys [begin, end) of the block's sequence, as far as the block's queries see them. What store_row and
  /// log_sum then say is theirs alone.
  void attend(const RowBlock& block, std::int64_t begin, std::int64_t end);

  /// The log2 of the row's sum of 2^score; -inf where it saw no key or all its scores are -inf.
  float log_sum(int row) const;
  /// The row's output times `factor`; zeros where log_sum is -inf.
  void store_row(int row, float factor, DType dtype, void* to) const;

  const gqa::Problem& problem() const { return p_; }

 private:
  static void adjust(const void* context, const TileProblem& tile, const TileScratch& scratch, int count);
  void adjust_row(int row, float* scores, int stride, int count) const;
  int locate(std::int64_t key, std::int64_t end, const void** keys, const void** values) const;
  void set_limits(std::int64_t key, int count);
  gqa::Range visible(int row) const {
    return p_.visible((block_.first_row + row) / p_.group, p_.queries(block_.req), p_.keys(block_.req));
  }

  const gqa::Problem& p_;
  const TileKernel& kernel_;
  TileScratch scratch_;
  TileProblem tile_;
  const void** next_values_;
  const void** q_rows_;
  RowBlock block_{};
  std::int64_t key_ = 0;  // first of the tile
  bool empty_ = true;     // no tile yet
  bool adjusts_;
};

}  // namespace flash_mla::cpu
