#pragma once

// The public operations on scores of tokens (include/flash_mla/sampling.h) as backends take them: arguments have been checked.

#include "base/integers.h"
#include "flash_mla/sampling.h"

namespace flash_mla {

/// Element i of a vector of float32 or float64.
inline double number_at(const TensorView& t, std::int64_t i) {
  return t.dtype == DType::kFloat64 ? t.ptr<const double>()[i * t.stride(0)]
                                    : static_cast<double>(t.ptr<const float>()[i * t.stride(0)]);
}

/// What one row's tokens have to pass.
struct RowLimits {
  double temperature, top_p, min_p;
  std::int64_t top_k;
};
inline RowLimits limits_of(const SamplingRows& rows, const SamplingOptions& o, std::int64_t row) {
  return {rows.temperature.defined() ? number_at(rows.temperature, row) : o.temperature,
          rows.top_p.defined() ? number_at(rows.top_p, row) : o.top_p,
          rows.min_p.defined() ? number_at(rows.min_p, row) : o.min_p,
          rows.top_k.defined() ? integer_at(rows.top_k, row) : o.top_k};
}

/// Where the randomness of draw i comes from.
struct KeyOfDraw {
  std::uint64_t seed, position;
  std::uint32_t index;
};
inline KeyOfDraw key_of(const DrawKeys& keys, const SamplingOptions& o, std::int64_t i) {
  return {keys.seeds.defined() ? static_cast<std::uint64_t>(integer_at(keys.seeds, i)) : o.seed,
          keys.positions.defined() ? static_cast<std::uint64_t>(integer_at(keys.positions, i)) : o.position,
          static_cast<std::uint32_t>(keys.indices.defined() ? integer_at(keys.indices, i) : i)};
}

/// What a token's second random number is for: the draw that takes a refused draft's place.
inline constexpr std::uint32_t kReplacesDraft = 1;

namespace cpu {
void sample_tokens(const SampleArgs& args, const SamplingOptions& options, int num_threads);
void filter_tokens(const TensorView& scores, const SamplingRows& rows, const TensorView& out,
                   const SamplingOptions& options, int num_threads);
void token_probabilities(const TensorView& logits, const SamplingRows& rows, const TensorView& out,
                         const SamplingOptions& options, int num_threads);
void speculative_sampling(const SpeculativeArgs& args, const SamplingOptions& options, int num_threads);
}  // namespace cpu

namespace sm90 {
/// Queued on options.stream. Throw Unsupported where the device is none that this backend runs on.
void sample_tokens(const SampleArgs& args, const SamplingOptions& options);
void filter_tokens(const TensorView& scores, const SamplingRows& rows, const TensorView& out,
                   const SamplingOptions& options);
void token_probabilities(const TensorView& logits, const SamplingRows& rows, const TensorView& out,
                         const SamplingOptions& options);
void speculative_sampling(const SpeculativeArgs& args, const SamplingOptions& options);
}  // namespace sm90

}  // namespace flash_mla
