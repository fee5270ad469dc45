#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "checkpoint/config.h"
#include "comm/communicator.h"
#include "model/parallel/expert_placement.h"

namespace flash_mla::model {

/// Some of n things that lie one after another.
struct Range {
  std::int64_t first = 0, count = 0;
  std::int64_t end() const { return first + count; }
};

/// Which part of a model's weights a rank has (docs/ranks.md). Heads, rows and columns are those of the whole model.
struct Partition {
  int rank = 0, size = 1;  ///< of those that have the same tokens, and all but the routed experts in parts
  /// Sums are not shared: a product whose operand the ranks have in parts gathers it, and each has some of its outputs.
  /// Then every value is computed as one rank would, and has its bits.
  bool exact = false;
  std::shared_ptr<const ExpertPlacement> experts;  ///< null: all on every rank
  /// There are other ranks besides, with tokens of their own, that share the routed experts.
  bool own_tokens = false;
  /// Among all that share the routed experts; without own_tokens the same as rank and size.
  int expert_rank = 0, expert_ranks = 1;

  /// Nothing but the routed experts is in parts.
  bool alone() const { return size == 1; }

  /// This rank's share of n things, or another's. Shares are whole multiples of a block of FP8 or group of 4 bits (128)
  /// where that leaves something for all.
  Range share(std::int64_t n) const { return share(n, rank); }
  Range share(std::int64_t n, int of) const {
    constexpr std::int64_t kBlock = 128;
    const std::int64_t unit = n % kBlock == 0 && n / kBlock >= size ? kBlock : 1;
    const std::int64_t units = n / unit, first = units * of / size, end = units * (of + 1) / size;
    return {first * unit, (end - first) * unit};
  }
  std::int64_t largest_share(std::int64_t n) const {
    std::int64_t most = 0;
    for (int r = 0; r < size; ++r) most = std::max(most, share(n, r).count);
    return most;
  }
  /// Heads divide evenly.
  Range heads(const ModelConfig& whole) const {
    const std::int64_t count = whole.num_attention_heads / size;
    return {rank * count, count};
  }
  /// The model as the rank's device sees it: with its heads.
  ModelConfig local(ModelConfig whole) const {
    whole.num_attention_heads = static_cast<int>(heads(whole).count);
    return whole;
  }
};

/// A rank's doors to the others. They outlive its model.
struct RankLinks {
  comm::Communicator* ranks = nullptr;  ///< to those that have the same tokens; null: there are none
  comm::Communicator* expert_ranks =
      nullptr;  ///< of Partition::own_tokens: to all that share the routed experts
};

}  // namespace flash_mla::model
