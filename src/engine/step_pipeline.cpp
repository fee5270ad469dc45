#include "engine/step_pipeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <utility>

#include "engine/module_drafts.h"
#include "engine/utilisation.h"

namespace flash_mla::engine {
namespace {

// Whether the model can choose tokens on its own.
bool leaves_choice_to_model(const SamplingParams& p) {
  return p.repetition_penalty == 1 && p.frequency_penalty == 0 && p.presence_penalty == 0 && p.logprobs < 0;
}

// The continuation's request has yet to fork: several tokens come of its prompt's last row.
bool forks_here(const Continuation& c) { return c.request->sampling.n > 1 && !c.request->forked; }

// `takes_masks`: the model chooses among the tokens of a format.
Wanted wanted(const ScheduledWork& w, bool takes_masks, std::vector<Draw>& draws, bool& masked) {
  const auto& c = static_cast<const Continuation&>(*w.sequence);
  const SamplingParams& sampling = c.request->sampling;
  if (sampling.max_tokens == 0) return Wanted::kNothing;
  if (!leaves_choice_to_model(sampling)) return Wanted::kLogits;
  // A token that is still on its way counts as generated.
  const std::int64_t on_its_way = w.begin - (static_cast<std::int64_t>(c.tokens.size()) - w.count);
  // What rules need of this token they need of no later one, unless of all.
  if (c.request->rules.needed(c.num_generated + on_its_way)) return Wanted::kLogits;
  // What may follow a draft is known when the draft is.
  if (c.format && (!takes_masks || w.num_drafts() > 0)) return Wanted::kLogits;
  if (sampling.temperature > 0 && forks_here(c)) return Wanted::kLogits;
  if (c.format) masked = true;
  if (sampling.temperature == 0) return Wanted::kLikeliest;
  for (int i = 0; i <= w.num_drafts(); ++i) {
    draws.push_back(draw_of(sampling, {c.request->seed, static_cast<std::uint32_t>(c.index),
                                       static_cast<std::uint64_t>(c.num_generated + on_its_way + i)}));
  }
  return Wanted::kDrawn;
}

ScoredTokens scored(const ScheduledWork& w) {
  if (!w.sequence->score_from) return {};
  const ActiveRequest& request = *static_cast<const Continuation&>(*w.sequence).request;
  const auto known = static_cast<std::int64_t>(request.prompt_logprobs.size());
  const std::int64_t begin = std::max(w.begin, known - 1);
  const std::int64_t end = std::min(w.begin + w.count, static_cast<std::int64_t>(request.prompt.size()) - 1);
  if (begin >= end) return {};
  return {static_cast<int>(begin - w.begin), static_cast<int>(end - begin)};
}

std::size_t token_index(const Sequence& s) { return static_cast<const Continuation&>(s).token_index; }

}  // namespace

bool LaunchedStep::all_ended() const {
  return std::ranges::all_of(
      plan.work, [](const ScheduledWork& w) { return static_cast<Continuation*>(w.sequence)->ended; });
}

StepPipeline::StepPipeline(model::Model& model, Scheduler& scheduler, const kv::PagePool& pool,
                           Requests& requests, const Statistics& statistics, const EngineOptions& options,
                           std::int64_t max_length, ModuleDrafts* module_drafts)
    : model_(model),
      scheduler_(scheduler),
      pool_(pool),
      requests_(requests),
      statistics_(statistics),
      options_(options),
      max_length_(max_length),
      module_drafts_(module_drafts) {}

std::unique_ptr<LaunchedStep> StepPipeline::launch(StepPlan plan, Clock::time_point begin, bool with_module) {
  auto step = std::make_unique<LaunchedStep>();
  step->plan = std::move(plan);
  step->number = ++num_launched_;
  step->drafts.resize(step->plan.work.size());
  step->utilisation = utilisation(step->plan);
  StepRecord& record = step->record;
  record.begin = statistics_.seconds(begin);
  record.preempted = static_cast<int>(step->plan.preempted.size());
  record.waiting = scheduler_.num_waiting();
  record.pages_used = pool_.num_used();
  for (std::size_t i = 0; i < step->plan.work.size(); ++i) {
    ActiveRequest& request = *step->continuation(i).request;
    requests_.started(request);
    ++request.num_in_flight;
  }
  record.planned = statistics_.seconds(Clock::now());
  try {
    for (const kv::PageCopy& copy : step->plan.copies) model_.copy_page(copy.source, copy.target);
    if (module_drafts_ != nullptr && with_module) {
      module_drafts_->draft(step->plan, step->number, scheduler_.running(), options_.batch_invariant);
    }
    const bool takes_masks = model_.draws_take_masks();
    const WantedOf wanted_of = [&](const ScheduledWork& w, std::vector<Draw>& draws, bool& masked) {
      return wanted(w, takes_masks, draws, masked);
    };
    StepBatch batch = make_batch(step->plan, wanted_of, scored, token_index);
    step->masked = batch.masked;
    step->results = std::move(batch.results);
    step->first_rows = batch.query_starts;
    step->num_logit_rows = batch.logit_rows.size();
    step->num_tokens = batch.num_tokens;
    // collect() cannot fail for want of memory.
    logits_.reserve(num_logits(*step));
    tokens_.reserve(step->num_tokens);
    model_.launch(batch.view(options_.batch_invariant));
    step->launched = true;
  } catch (const std::exception& e) {
    step->failure = fmt::format("the model failed: {}", e.what());
  }
  return step;
}

std::unique_ptr<LaunchedStep> StepPipeline::launch_ahead(const LaunchedStep& step) {
  if (!options_.overlap_steps || !model_.launches_ahead() || !step.failure.empty()) return nullptr;
  if (step.num_logit_rows > 0) return nullptr;  // of a prompt that is scored: to be collected first
  if (step.masked) return nullptr;              // what a format allows depends on the token before
  std::vector<Sequence*> continuing;
  int unfinished = 0;
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    Continuation& c = step.continuation(i);
    if (c.ended) continue;  // cancelled on its way
    ++unfinished;
    if (!step.results[i].is_token() || forks_here(c) || step.plan.work[i].num_drafts() > 0) return nullptr;
    c.token_index = step.results[i].index;
    const bool goes_on = c.num_generated + 1 < c.request->sampling.max_tokens &&
                         static_cast<std::int64_t>(c.tokens.size()) + 1 < max_length_;
    if (goes_on) continuing.push_back(&c);
  }
  if (continuing.empty() || unfinished != scheduler_.num_running()) return nullptr;
  std::optional<StepPlan> plan = scheduler_.plan_ahead(continuing);
  if (!plan) return nullptr;
  std::unique_ptr<LaunchedStep> next = launch(std::move(*plan), Clock::now(), /*with_module=*/false);
  next->ahead = true;
  return next;
}

void StepPipeline::choose(LaunchedStep& step) {
  if (!step.launched || !step.masked) return;
  const auto vocab_size = static_cast<std::size_t>(model_.vocab_size());
  std::vector<const std::uint32_t*> masks(step.num_tokens, nullptr);
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    Continuation& c = step.continuation(i);
    if (!c.format || c.ended || !step.results[i].is_token()) continue;
    masks[step.results[i].index] = c.format_mask(vocab_size).data();
  }
  try {
    model_.choose(masks);
  } catch (const std::exception& e) {
    step.failure = fmt::format("the model failed: {}", e.what());
  }
}

void StepPipeline::collect(LaunchedStep& step) {
  if (std::exchange(step.collected, true)) return;
  if (step.launched) {
    logits_.resize(num_logits(step));
    tokens_.resize(step.num_tokens);
    try {
      model_.collect(logits_.data(), tokens_.data());
    } catch (const std::exception& e) {
      if (step.failure.empty()) step.failure = fmt::format("the model failed: {}", e.what());
    }
  }
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) --step.continuation(i).request->num_in_flight;
}

std::size_t StepPipeline::num_logits(const LaunchedStep& step) const {
  return step.num_logit_rows * static_cast<std::size_t>(model_.vocab_size());
}

double StepPipeline::utilisation(const StepPlan& plan) const {
  std::vector<std::int32_t> lengths;
  for (const ScheduledWork& w : plan.work) {
    if (!w.decoding) continue;
    for (int i = 0; i <= w.num_drafts(); ++i) {
      lengths.push_back(static_cast<std::int32_t>(w.begin + w.count + i));
    }
  }
  if (lengths.empty()) return 0;
  return schedule_utilisation(
      lengths, model_.schedule_options(static_cast<int>(lengths.size()), options_.batch_invariant));
}

}  // namespace flash_mla::engine
