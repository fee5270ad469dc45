#pragma once

#include <cstdint>
#include <span>

#include "engine/step_pipeline.h"

namespace flash_mla::engine {

/// Drafts of the model's module for multi-token prediction. The module reads the states that the last step has left of
/// its tokens, and has a cache of its own beside the model's; so before a step it goes over the tokens of the one before,
/// of all sequences, whether drafts are wanted or not. Those of a step that it was not asked behind are missing in its
/// cache for good: drafts get worse, no text does.
class ModuleDrafts {
 public:
  explicit ModuleDrafts(model::Model& model) : model_(model) {}

  /// `step` has been collected and its tokens have been accepted.
  void note(const LaunchedStep& step);

  /// The module goes over the tokens of the step before, of those of `running` that were in it, and drafts for the
  /// works of `plan`, which is to be step `number`, that are to have drafts, as many as they have. Where it has none the
  /// work has none either.
  void draft(StepPlan& plan, std::int64_t number, std::span<Sequence* const> running, bool batch_invariant);

 private:
  model::Model& model_;
};

}  // namespace flash_mla::engine
