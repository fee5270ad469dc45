#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/matrix.h"
#include "model/device/cpu/context.h"

namespace flash_mla::model {

/// Of ranks with tokens of their own: brings tokens to the ranks that run their experts, and results back. All ranks make
/// the same calls, with or without tokens.
class CpuExpertExchange {
 public:
  explicit CpuExpertExchange(CpuContext& context) : context_(context) {}

  /// Every row of h goes once to each rank that runs one of its choices. `experts` and `ranks` (rows of h,
  /// num_experts_per_tok): of each choice, the expert and the rank that runs it. Returns the rows that have come, until the
  /// next exchange.
  Matrix dispatch(const Matrix& h, std::span<const std::int32_t> experts, std::span<const int> ranks);
  /// (rows that have come, num_experts_per_tok): the experts that this rank is to run for them, -1 where another does.
  std::span<const std::int32_t> experts() const { return received_experts_; }

  /// `results` (float32) has at places[choice] what has come of a choice of the rows that have come. Returns what has come
  /// of this rank's own, and in `places`, where.
  Matrix combine(const Matrix& results, std::vector<std::int64_t>& places);

 private:
  std::vector<std::int64_t> counts_from_others(std::span<const std::int64_t> to);

  CpuContext& context_;
  std::vector<int> ranks_;                               ///< of each own choice
  std::vector<std::int64_t> sent_rows_, received_rows_;  ///< by rank
  std::vector<std::int32_t> sent_experts_, received_experts_;
};

}  // namespace flash_mla::model
