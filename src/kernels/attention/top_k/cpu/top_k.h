#pragma once

#include <cstdint>

#include "flash_mla/top_k.h"

namespace flash_mla::cpu {

/// flash_mla::top_k on checked arguments.
void top_k(const TopKArgs& args, int num_threads);

/// Rows of scores that are some of a call's: row 0 of `scores` is row `first` of `num_rows`.
struct ScoreRows {
  const float* scores = nullptr;
  std::int64_t stride = 0;
  const std::int32_t* lengths = nullptr;
  std::int64_t first = 0, num_rows = 0;
};

/// top_k of n of a call's rows, into theirs of `indices`.
void top_k_rows(const ScoreRows& rows, std::int64_t n, const TopKOutput& output, const TensorView& indices,
                int num_threads);

/// What the output of select_row has room for beyond k.
inline constexpr std::int64_t kSelectSlack = 64;

/// The positions of the k largest of n scores, n > k, ascending, written to `positions`, which has room for
/// k + kSelectSlack.
void select_row(const float* scores, std::int64_t n, std::int64_t k, std::int32_t* positions);

/// One row of top_k: of `n` scores, into k entries of `out`. The engine calls it too.
FLASH_MLA_API void top_k_row(const float* scores, std::int64_t n, std::int64_t k, std::int32_t* out);

}  // namespace flash_mla::cpu
