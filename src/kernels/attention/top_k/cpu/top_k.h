#pragma once

#include <cstdint>

#include "flash_mla/top_k.h"

namespace flash_mla::cpu {

/// flash_mla::top_k on checked arguments.
void top_k(const TopKArgs& args, int num_threads);

/// What the output of select_row has room for beyond k.
inline constexpr std::int64_t kSelectSlack = 64;

/// The positions of the k largest of n scores, n > k, ascending, written to `positions`, which has room for
/// k + kSelectSlack.
void select_row(const float* scores, std::int64_t n, std::int64_t k, std::int32_t* positions);

/// One row of top_k: of `n` scores, into k entries of `out`.
void top_k_row(const float* scores, std::int64_t n, std::int64_t k, std::int32_t* out);

}  // namespace flash_mla::cpu
