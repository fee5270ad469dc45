#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/logit_rules.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/stop_matcher.h"
#include "flash_mla/engine.h"
#include "grammar/grammar.h"
#include "text/text_decoder.h"

namespace flash_mla::engine {

using text::TextDecoder;
using text::TextDecoderFactory;

using Clock = std::chrono::steady_clock;

struct ActiveRequest;

/// Where drafts come from.
enum class DraftSource { kNgram, kMtp };
inline constexpr std::size_t kDraftSources = 2;

/// How many drafts turned out to be the model's own tokens, the older the less.
struct Acceptance {
  double accepted = 0, decided = 0;
  void add(int accepted_now, int decided_now, double remembered) {
    forget(remembered);
    accepted += accepted_now;
    decided += decided_now;
  }
  void forget(double remembered) {
    accepted *= remembered;
    decided *= remembered;
  }
};

/// One of the n answers to a request: a sequence of the scheduler's, with what chooses its tokens and turns
/// them into text.
struct Continuation : Sequence {
  Continuation(ActiveRequest& owner, int index_, std::unique_ptr<TextDecoder> text);

  ActiveRequest* request;
  int index;  // among the request's
  TokenHistory history;
  std::unique_ptr<TextDecoder> decoder;  // null: no text
  StopMatcher stop;
  std::unique_ptr<grammar::Matcher> format;  // null: the text is free
  std::vector<std::uint32_t> allowed;  // tokens that may come next, a bit each; empty: not computed, or all
  std::int64_t num_generated = 0;
  std::span<const std::int32_t> generated() const;
  /// What `format` and the request's rules say of the next token. It stays until that is accepted.
  TokenRule token_rule(std::size_t vocab_size);
  DraftSource draft_source = DraftSource::kNgram;  // of its drafts
  /// Its tokens whose states the model has left in the last step that it was in, as far as its module has not gone over
  /// them: `count` from position `begin` on, in rows from `row` on.
  struct {
    std::int64_t step = 0, begin = 0;
    std::int32_t row = 0;
    int count = 0;
  } states;
  std::array<Acceptance, kDraftSources> acceptance;  // of its drafts, by source
  std::size_t num_kept_drafts = 0;                   // while it is decided how many pay
  std::size_t token_index = 0;  // of its token among those that the last step launched with it chooses
  bool ended = false;
  Clock::time_point first_token{}, last_token{};
};

/// A request from submission to its last event.
struct ActiveRequest {
  RequestId id = 0;
  std::vector<std::int32_t> prompt;
  SamplingParams sampling;
  LogitRules rules;
  std::shared_ptr<const grammar::Grammar> grammar;  // null: the text is free
  std::optional<BootstrapRoom> room;
  std::optional<int> rank;                     // that is to run it
  std::vector<TokenLogprobs> prompt_logprobs;  // as far as the prompt has been scored
  EventHandler on_event;
  std::uint64_t seed = 0;
  Clock::time_point submitted{};
  bool started = false;   // part of it has been in a step
  bool forked = false;    // all n continuations exist
  int open = 1;           // continuations that have not ended
  int num_in_flight = 0;  // of its continuations in steps that the model has been given
  std::vector<std::unique_ptr<Continuation>> continuations;
};

/// Continuations of one request are consecutive in Sequence::order; validate() allows no more than this.
inline constexpr std::uint64_t kMaxContinuations = 1024;

inline std::span<const std::int32_t> Continuation::generated() const {
  return std::span(tokens).last(static_cast<std::size_t>(num_generated));
}

inline TokenRule Continuation::token_rule(std::size_t vocab_size) {
  const bool excludes = request->rules.excludes(generated());
  if (allowed.empty() && (format || excludes)) {
    allowed.resize((vocab_size + 31) / 32, ~0U);
    if (format) format->allowed(allowed);
    if (excludes) request->rules.exclude(generated(), allowed);
  }
  return {allowed.empty() ? nullptr : allowed.data(), request->rules.biases()};
}

inline Continuation::Continuation(ActiveRequest& owner, int index_, std::unique_ptr<TextDecoder> text)
    : request(&owner),
      index(index_),
      history(owner.sampling, owner.prompt),
      decoder(std::move(text)),
      stop(owner.sampling.stop, owner.sampling.include_stop) {
  order = owner.id * kMaxContinuations + static_cast<std::uint64_t>(index);
}

}  // namespace flash_mla::engine
