#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stop_token>
#include <string>
#include <vector>

#include "base/task_thread.h"
#include "engine/engine_rank.h"
#include "engine/inbox.h"
#include "engine/statistics.h"
#include "flash_mla/engine.h"
#include "model/model.h"

// The words of this room:
//
//   request        what a client asks for: Request, and once the engine has it ActiveRequest, from submission
//                  to its last event
//   continuation   one of the n answers to a request: Continuation
//   sequence       what the scheduler sees of a continuation: its tokens and the pages of their latents
//   step           one run of the model over tokens of many sequences: planned (StepPlan), given to the model
//                  (LaunchedStep), collected, then recorded (StepRecord)
//   work           what one sequence does in a step: ScheduledWork
//   in flight      of a step: given to the model and not collected; of a request: part of such a step
//   to launch      to give a step to the model; ahead: before the results of the step before are there
//   draft          a token that may follow, which goes through the model with those before it; it is accepted if
//                  it is the one that is chosen there
//   choice         the next token of a continuation and where it comes from: TokenChoice
//   rank           a model with a cache and a scheduler of its own; all ranks take their steps together
//   inbox          where other threads leave requests and cancellations for the thread that steps
//   page           kPageSize tokens of the cache, in every layer (room kv); a block is the unit of the decode
//                  schedule, not of the cache

namespace flash_mla::engine {

/// Generation over tokens: everything of the engine that is not loading files. submit and cancel only leave
/// something in the inbox; all work, and every event, happens in step(), under one lock.
class EngineCore {
 public:
  /// `make_decoder` may be empty: events then carry tokens and no text, and stop strings are refused.
  /// Allocates the model's cache. `drafter`, if there is one, takes the place of n-grams. `weights`: what tells the model
  /// from others whose pages a tier may have. Throws InvalidArgument for options out of range.
  EngineCore(std::unique_ptr<model::Model> model, const TextDecoderFactory& make_decoder,
             const std::vector<std::int32_t>& eos_token_ids, const EngineOptions& options,
             std::unique_ptr<Drafter> drafter = nullptr, const std::string& weights = {});
  /// Of ranks that share a model's experts (model::load_models): a request runs on one of them. Options of the cache and
  /// of steps are each rank's.
  EngineCore(std::vector<std::unique_ptr<model::Model>> models, const TextDecoderFactory& make_decoder,
             const std::vector<std::int32_t>& eos_token_ids, const EngineOptions& options,
             const std::string& weights = {});
  ~EngineCore();

  /// Of `request`, here and in submit, prompt_token_ids and sampling count: text has been tokenized before.
  /// Throws InvalidArgument (or Unsupported) for a request that cannot run.
  void check(const Request& request) const;

  /// Takes a checked request. Throws Overloaded past options.max_waiting, if `bounded`.
  /// `grammar` is that of sampling.format, if that is not free.
  RequestId submit(Request request, EventHandler on_event, bool bounded = true,
                   std::shared_ptr<const grammar::Grammar> grammar = nullptr);
  void cancel(RequestId id) { inbox_.cancel(id); }
  void cancel(RequestId id, int continuation) { inbox_.cancel(id, continuation); }
  bool step();
  void cancel_all();

  /// Blocks until step() has something to do; false if `stop` was requested.
  bool wait_for_work(const std::stop_token& stop) { return inbox_.wait_for_work(stop); }

  EngineStats stats() const;
  EngineLoad load() const { return statistics_.load(); }
  std::vector<EngineLoad> rank_loads() const { return statistics_.rank_loads(); }
  std::vector<CacheEvent> take_cache_events();
  std::vector<ExpertCounts> expert_counts() const;
  std::vector<StepRecord> timeline() const { return statistics_.timeline(); }
  std::int32_t vocab_size() const;
  std::int64_t max_length() const;
  const EngineOptions& options() const { return options_; }

 private:
  EngineCore(std::vector<std::unique_ptr<model::Model>> models, const TextDecoderFactory& make_decoder,
             const std::vector<std::int32_t>& eos_token_ids, const EngineOptions& options,
             std::unique_ptr<Drafter> drafter, const std::string& weights);
  EventHandler one_at_a_time(EventHandler on_event);
  bool empty_inbox();
  void place(std::vector<std::unique_ptr<ActiveRequest>> requests);
  bool step_ranks();
  void wait_for_pages();
  void note_busy();
  std::vector<ExpertCounts> count_experts() const;

  bool has_text_;
  EngineOptions options_;
  Statistics statistics_;
  Inbox inbox_;
  std::mutex event_mutex_;  // of handlers, where several ranks tell them

  std::mutex step_mutex_;  // one step at a time; of what follows
  std::vector<std::unique_ptr<EngineRank>> ranks_;
  std::vector<std::unique_ptr<TaskThread>> threads_;  // of all ranks but the first
  bool told_broken_ = false;
};

}  // namespace flash_mla::engine
