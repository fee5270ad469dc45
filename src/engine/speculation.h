#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/drafter.h"
#include "engine/step_pipeline.h"
#include "engine/step_time.h"

namespace flash_mla::engine {

/// Decides which sequences get drafts in a step, and how many.
class Speculation {
 public:
  /// `drafter`: null for n-grams. `by_module`: drafts come of the model's module, with `auto` where the drafter has
  /// none or the worse ones. Throws InvalidArgument for options out of range.
  Speculation(const EngineOptions& options, std::unique_ptr<Drafter> drafter, std::int64_t max_length,
              bool by_module);

  bool on() const { return options_.speculative != EngineOptions::Speculative::kOff; }

  /// Gives those of `running` that are past their prompt drafts for the step that is planned next, or if they
  /// come of the module (ModuleDrafts), room for as many.
  void propose(std::span<Sequence* const> running);

  /// Whether the module is to go over the tokens of the last step before the one that propose() was for. With `auto` only
  /// where it may pay.
  bool with_module() const { return with_module_; }

  /// Whether sequences of `step` are to get drafts in the next one, which then has to wait for its tokens. With `auto`
  /// not where drafts have brought less than steps ahead do; now and then they are tried again.
  bool wants_drafts_after(const LaunchedStep& step);

  /// What has come of a step's drafts. `seconds`: that it took.
  void learn(const LaunchedStep& step, double seconds);

 private:
  int room(const Continuation& c) const;
  bool may_pay(DraftSource source, double chance, int sequences) const;
  void decide_on_module(std::span<Sequence* const> running);
  void draft(Continuation& c);
  double acceptance(const Continuation& c, DraftSource source) const;
  void keep_what_pays(const std::vector<Continuation*>& drafted, int sequences);

  const EngineOptions& options_;
  std::int64_t max_length_;
  std::unique_ptr<Drafter> drafter_;
  bool by_module_;
  // Of every continuation's drafts; of steps that only decode and have no drafts of another source: by source.
  std::array<Acceptance, kDraftSources> all_;
  std::array<StepTime, kDraftSources> step_time_;
  bool with_module_ = false;
  double gain_ = 1;  // tokens that drafts bring to a sequence and step that waits for them, of late
  int not_waited_ = 0;
};

}  // namespace flash_mla::engine
