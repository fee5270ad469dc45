#pragma once

#include <cstdint>
#include <span>

#include "engine/step_pipeline.h"

namespace flash_mla::engine {

/// Drafts of the model's module for multi-token prediction. The module reads the states that the last step has left of
/// its tokens, and has a cache of its own beside the model's; so before every step it goes over the tokens of the one
/// before, whether drafts are wanted or not.
class ModuleDrafts {
 public:
  explicit ModuleDrafts(model::Model& model) : model_(model) {}

  /// `step` has been collected and its tokens have been accepted.
  void note(const LaunchedStep& step);

  /// The module goes over the tokens of the step before, of those of `running` that were in it, and drafts for the
  /// works of `plan` that are to have drafts, as many as they have. Where it has none the work has none either.
  void draft(StepPlan& plan, std::span<Sequence* const> running, bool batch_invariant);

 private:
  model::Model& model_;
  std::int64_t step_ = 0;  // counts the steps that have begun
};

}  // namespace flash_mla::engine
