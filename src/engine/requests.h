#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/inbox.h"
#include "engine/request.h"
#include "engine/statistics.h"

namespace flash_mla::engine {

/// The requests that the engine has taken in: begins and forks them, gives continuations their tokens, ends
/// them, and tells their handlers. Used by the thread that steps alone.
class Requests {
 public:
  /// `max_length`: tokens of prompt and continuation together; `limit` is what sets it.
  Requests(Scheduler& scheduler, Inbox& inbox, Statistics& statistics, TextDecoderFactory make_decoder,
           std::vector<std::int32_t> eos_token_ids, std::int64_t max_length, LengthLimit limit);

  void begin(std::unique_ptr<ActiveRequest> request);
  /// Without effect on a request that has ended. `continuation`: one of several that have begun, or all (-1).
  void cancel(RequestId id, int continuation = -1);
  void cancel_all();
  /// The request has been in a step, or has ended: it is no longer one that waits.
  void started(ActiveRequest& request);
  /// The prompt has been processed: makes the continuations besides the first.
  void fork(ActiveRequest& request);

  /// The continuation's next token.
  void accept(Continuation& c, const Sampled& sampled);
  /// Its end without another token. `keep_pages` as in Scheduler::finish.
  void end(Continuation& c, FinishReason reason, const std::string& error, bool keep_pages = true) {
    end(c, reason, error, {}, keep_pages);
  }
  /// The same of a sequence that has not run.
  void refuse(Sequence& sequence, const std::string& error) {
    auto& c = static_cast<Continuation&>(sequence);
    started(*c.request);
    end(c, FinishReason::kError, error);
  }
  /// Its end where no token was asked for.
  void end_at_prompt(Continuation& c);
  /// Forgets requests that have ended, except those in a step that the model has been given.
  void drop_ended();

 private:
  void end(Continuation& c, FinishReason reason, const std::string& error, GenerationEvent event,
           bool keep_pages);
  void send(ActiveRequest& request, GenerationEvent event);
  std::unique_ptr<grammar::Matcher> new_matcher(const ActiveRequest& request) const;
  bool is_end(const SamplingParams& sampling, std::int32_t token) const;
  std::unique_ptr<TextDecoder> new_decoder() const { return make_decoder_ ? make_decoder_() : nullptr; }

  Scheduler& scheduler_;
  Inbox& inbox_;
  Statistics& statistics_;
  TextDecoderFactory make_decoder_;
  std::vector<std::int32_t> eos_token_ids_;
  std::int64_t max_length_;
  LengthLimit limit_;
  std::mt19937_64 seeds_;  // of requests that bring none
  std::unordered_map<RequestId, std::unique_ptr<ActiveRequest>> requests_;
  std::vector<RequestId> ended_;  // but not forgotten yet
};

}  // namespace flash_mla::engine
