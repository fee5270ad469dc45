#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/requests.h"
#include "engine/step_batch.h"

namespace flash_mla::engine {

/// What came of the drafts of one work.
struct DraftOutcome {
  int accepted = 0;   ///< that are the tokens which were chosen there
  int decided = 0;    ///< accepted, or the first that is not
  int committed = 0;  ///< accepted, with the text going on behind
  int tokens = 0;     ///< that the step gave the sequence
};

/// A step that the model has been given.
struct LaunchedStep {
  StepPlan plan;
  std::int64_t number = 0;                 // of all that have been launched
  bool ahead = false;                      // of the results of the step before
  std::vector<StepBatch::Result> results;  // of each work
  std::vector<DraftOutcome> drafts;        // of each work
  std::vector<std::int32_t> first_rows;    // of each work, its first token's place in the batch
  std::size_t num_logit_rows = 0, num_tokens = 0;
  bool launched = false;
  bool collected = false;
  bool masked = false;  // the model waits for StepPipeline::choose
  std::string failure;  // what went wrong with the model
  StepRecord record;
  double utilisation = 0;

  Continuation& continuation(std::size_t work) const {
    return static_cast<Continuation&>(*plan.work[work].sequence);
  }
  bool all_ended() const;
};

class ModuleDrafts;

/// Gives steps to the model and collects their results; where the model can, the next step is given before
/// the results of the one that runs are there.
class StepPipeline {
 public:
  /// `module_drafts`: null where the model's module for multi-token prediction does not draft.
  StepPipeline(model::Model& model, Scheduler& scheduler, const kv::PagePool& pool, Requests& requests,
               const Statistics& statistics, const EngineOptions& options, std::int64_t max_length,
               ModuleDrafts* module_drafts = nullptr);

  /// Gives the model a planned step. An error of the model's is the step's failure. `with_module`: the model's module, if
  /// it drafts, goes over the tokens of the step before first; that one has been collected then.
  std::unique_ptr<LaunchedStep> launch(StepPlan plan, Clock::time_point begin, bool with_module);

  /// The step after `step`, launched before its results are there: if nothing but one more token of each of
  /// its sequences can follow, and the model chooses those tokens. A sequence whose token turns out to be its
  /// last has a place in that step in vain: what comes of it is dropped, and what it wrote to its pages is
  /// written before anything that a later owner of them writes. Null: it must wait for the results, as it always must
  /// where `step` has drafts.
  std::unique_ptr<LaunchedStep> launch_ahead(const LaunchedStep& step);

  /// Tells the model which tokens the formats of a masked step's texts allow: TokenChooser::prepare has computed it. An
  /// error of the model's is the step's failure.
  void choose(LaunchedStep& step);

  /// Waits for the step's results; then nothing of it is in flight any more. Without effect the second time.
  void collect(LaunchedStep& step);

  /// Results of the step that was collected last: logits (rows, vocab_size) and tokens that the model chose.
  std::span<float> logits() { return logits_; }
  std::span<const std::int32_t> tokens() const { return tokens_; }

 private:
  std::size_t num_logits(const LaunchedStep& step) const;
  double utilisation(const StepPlan& plan) const;

  model::Model& model_;
  Scheduler& scheduler_;
  const kv::PagePool& pool_;
  Requests& requests_;
  const Statistics& statistics_;
  const EngineOptions& options_;
  std::int64_t max_length_;
  ModuleDrafts* module_drafts_;  // or null
  std::int64_t num_launched_ = 0;
  std::vector<float> logits_;
  std::vector<std::int32_t> tokens_;
};

}  // namespace flash_mla::engine
