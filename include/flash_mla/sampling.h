#pragma once

#include <cstdint>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// Which tokens stay in the running, for every row alike, and what everything here runs on: on a GPU the work is queued on `stream`,
/// may be captured, and gives the CPU's tokens. Nobody reads a GPU's numbers on the host: options of rows that are out of their range
/// there have no meaning, a row in which no token is possible, or whose largest score is NaN or +inf, has the token -1 (and nothing
/// stays of it), other scores that are NaN count as impossible.
///
/// A token's weight is a whole number, 2^44 for the likeliest token of a row and proportionally less for others (0 below
/// 2^-44 of it), so that sums depend on no order and a draw has the same bits on every machine. Of the tokens whose
/// weight is at least min_p of the likeliest's stay the top_k likeliest, and of these the fewest likeliest that together reach
/// top_p of their sum. Of equally likely tokens the one with the smaller id counts as likelier.
struct SamplingOptions {
  /// Scores are probabilities, finite and >= 0, which need not add up to 1. Otherwise they are logits; -inf excludes a token.
  bool probabilities = false;
  double temperature = 1.0;  ///< >= 0, logits are divided by it; 0: the likeliest token. 1 with probabilities
  std::int64_t top_k = 0;    ///< 0: all
  double top_p = 1.0;        ///< 0 to 1; 1: all, 0: the likeliest
  double min_p = 0.0;        ///< 0 to 1; 0: all
  /// top_p is of the sum before top_k cuts, and both have to let a token through.
  bool joint = false;
  std::uint64_t seed = 0, position = 0;  ///< of draws that no tensor has a number for
  int num_threads = 0;                   ///< CPU: threads to run on; 0 means as many as OpenMP would use
  void* stream = nullptr;                ///< CUDA: the cudaStream_t to launch on
  Backend backend = Backend::kAuto;
};

/// The options of single rows. n rows; each optional, and where it is given the one in SamplingOptions is not used.
struct SamplingRows {
  TensorView temperature{};  ///< (n) float32 | float64
  TensorView top_k{};        ///< (n) int32 | int64
  TensorView top_p{};        ///< (n) float32 | float64
  TensorView min_p{};        ///< (n) float32 | float64
};

/// Where randomness comes from: 53 bits that are a pure function (Philox 4x32-10) of seed, index and position, and so of nothing
/// else in a batch. The engine's draws are those of a request's seed, the number of the continuation and the token's position.
/// m draws, each optional.
struct DrawKeys {
  TensorView seeds{};      ///< (m) int64
  TensorView indices{};    ///< (m) int32 | int64; the number of the draw in its call where not given
  TensorView positions{};  ///< (m) int64
};

struct SampleArgs {
  TensorView
      scores;  ///< (n, vocab) float32 | float16 | bfloat16, last dimension contiguous, vocab up to 2^20 - 1
  TensorView
      rows{};  ///< optional, (m) int32 | int64: the row of scores of each draw; without it m = n, each its own
  SamplingRows options{};
  DrawKeys keys{};
  TensorView tokens;  ///< (m) int32 | int64; written
  TensorView
      valid{};  ///< optional, (m) uint8; written: 0 where a row has no token to draw, whose token is -1; else 1
};

/// Draws a token from each row. On the CPU a row in which no token is possible throws without args.valid. Everything is checked before
/// anything is written; NaN, +inf and negative probabilities throw. Throws InvalidArgument (argument, value, what was expected).
FLASH_MLA_API void sample_tokens(const SampleArgs& args, const SamplingOptions& options = {});

/// What sample_tokens draws from, without drawing. out (n, vocab), scores' dtype, may be scores: probabilities of the tokens
/// that stay, divided by their sum (added in float64), and 0 for the others; or their logits as they are (temperature decides
/// with top_p which stay), and -inf. Without top_p and min_p tokens stay that are too unlikely to be drawn. A row without a
/// token that is possible throws. Checked as sample_tokens does.
FLASH_MLA_API void filter_tokens(const TensorView& scores, const SamplingRows& rows, const TensorView& out,
                                 const SamplingOptions& options = {});

/// out = softmax(logits / temperature), row by row, sums in float64; at temperature 0 it is 1 for the likeliest token. logits:
/// (n, vocab) float32 | float16 | bfloat16; out: (n, vocab) float32 or logits' dtype. Only the temperatures of `rows` and
/// `options` are used.
FLASH_MLA_API void token_probabilities(const TensorView& logits, const SamplingRows& rows,
                                       const TensorView& out, const SamplingOptions& options = {});

/// b chains of n drafts each, drawn by a draft model, and what the target model says of them.
struct SpeculativeArgs {
  TensorView draft_probs;   ///< (b, n, vocab) float32 | float16 | bfloat16, last dimension contiguous
  TensorView draft_tokens;  ///< (b, n) int32 | int64
  TensorView target_probs;  ///< (b, n + 1, vocab), draft_probs' dtype, last dimension contiguous
  DrawKeys keys{};          ///< of b chains; a chain's i-th token has its position + i
  TensorView tokens;        ///< (b, n + 1) int32 | int64; written: accepted drafts, one token more, and -1
  TensorView accepted{};    ///< optional, (b) int32; written: drafts that would be accepted, each by itself
  TensorView
      emitted{};  ///< optional, (b) int32; written: drafts that were, those before the first that was not
};

/// Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): draft i is accepted with
/// probability min(1, q / p); the first that is not is replaced by a draw from max(q - p, 0), and behind n accepted ones comes
/// one from the last q. Tokens are so distributed as the target's. Of `options` seed, position and num_threads are used.
FLASH_MLA_API void speculative_sampling(const SpeculativeArgs& args, const SamplingOptions& options = {});

}  // namespace flash_mla
