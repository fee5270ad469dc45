#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/requests.h"
#include "engine/step_pipeline.h"

namespace flash_mla::engine {

/// The next token of one continuation.
struct TokenChoice {
  Continuation* continuation = nullptr;
  std::size_t work = 0;     // its place in the step
  std::span<float> logits;  // empty: the model chose `token`
  std::int32_t token = -1;
  bool shared = false;  // the row belongs to other continuations of the same prompt as well
  Sampled sampled;
  std::string error;  // not empty: no token could be chosen
};

/// Chooses the tokens of a step: takes the model's choice, or samples from rows of logits, several at once.
class TokenChooser {
 public:
  /// `num_threads`: 0 for as many as OpenMP would use.
  explicit TokenChooser(int num_threads);

  /// One choice for each continuation of `step`, whose results `pipeline` has collected, that gets a token.
  /// Requests whose prompt is done are forked.
  std::vector<TokenChoice> choose(const LaunchedStep& step, StepPipeline& pipeline, int vocab_size,
                                  Requests& requests);
  /// The same for the token behind the `draft`-th draft, from 1 on: of continuations that have come so far.
  std::vector<TokenChoice> choose_behind(int draft, const LaunchedStep& step, StepPipeline& pipeline,
                                         int vocab_size);

  /// Computes which tokens formats and rules allow behind those of `step`: while a GPU runs it. Returns the
  /// continuations for which that takes too long, and why.
  std::vector<std::pair<Continuation*, std::string>> prepare(const LaunchedStep& step, int vocab_size);

  /// Adds to their requests the log-probabilities of the prompts' tokens that `step` has come to. Returns
  /// the continuations that have none to be had, and why.
  std::vector<std::pair<Continuation*, std::string>> score(const LaunchedStep& step, StepPipeline& pipeline,
                                                           int vocab_size);

 private:
  int num_threads(std::ptrdiff_t items, std::ptrdiff_t logits) const;
  void sample(std::vector<TokenChoice>& choices, StepPipeline& pipeline);
  std::vector<std::pair<Continuation*, std::string>> compute_masks(const std::vector<Continuation*>& wanting,
                                                                   int vocab_size) const;
  static void sample(TokenChoice& choice, Sampler& sampler);

  std::vector<Sampler> samplers_;  // one per thread
};

}  // namespace flash_mla::engine
