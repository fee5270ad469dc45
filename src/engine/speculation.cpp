#include "engine/speculation.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "flash_mla/error.h"

namespace flash_mla::engine {
namespace {

using Speculative = EngineOptions::Speculative;

// Drafts that a continuation's record remembers, and those that the record of all counts for in it.
constexpr double kRemembered = 0.9, kRememberedOfAll = 0.99, kPrior = 3;
// What a draft must promise over what its row costs: neither is known exactly, and without drafts nothing is lost.
constexpr double kMargin = 1.25;
// Where drafts have not paid they are tried again after a while.
constexpr double kForgottenUntried = 0.97;
// What a step that is launched ahead saves, about, in tokens of a sequence; and how often it is found out again what
// drafts bring where they brought less.
constexpr double kWorthWaiting = 0.05, kRememberedGain = 0.8;
constexpr int kStepsBetweenTrials = 32;

Continuation& continuation(Sequence* s) { return static_cast<Continuation&>(*s); }

constexpr std::size_t index_of(DraftSource source) { return static_cast<std::size_t>(source); }
constexpr std::size_t kNgram = index_of(DraftSource::kNgram), kMtp = index_of(DraftSource::kMtp);

}  // namespace

Speculation::Speculation(const EngineOptions& options, std::unique_ptr<Drafter> drafter,
                         std::int64_t max_length, bool by_module)
    : options_(options),
      max_length_(max_length),
      drafter_(drafter ? std::move(drafter) : std::make_unique<NgramDrafter>()),
      by_module_(by_module) {
  if (options.draft_tokens < 1 || options.draft_tokens > kMaxDraftTokens) {
    throw InvalidArgument(
        fmt::format("draft_tokens is {}, expected 1 to {}", options.draft_tokens, kMaxDraftTokens));
  }
}

// Drafts that could all come true: the step gives one token more.
int Speculation::room(const Continuation& c) const {
  const std::int64_t left = std::min(c.request->sampling.max_tokens - c.num_generated,
                                     max_length_ - static_cast<std::int64_t>(c.tokens.size()));
  return static_cast<int>(std::min<std::int64_t>(options_.draft_tokens, left - 1));
}

void Speculation::propose(std::span<Sequence* const> running) {
  if (!on()) return;
  decide_on_module(running);
  std::vector<Continuation*> drafted;
  int sequences = 0;
  for (Sequence* s : running) {
    Continuation& c = continuation(s);
    c.drafts.clear();
    if (c.num_remaining() != 1) continue;
    ++sequences;
    // The first token comes with the prompt's others, or for several continuations at once.
    if (c.num_generated == 0 || room(c) < 1) continue;
    draft(c);
    if (!c.drafts.empty()) drafted.push_back(&c);
  }
  if (options_.speculative == Speculative::kAuto && !drafted.empty()) keep_what_pays(drafted, sequences);
}

// Whether a draft that is accepted with such a chance may be worth its row; true where nobody knows yet.
bool Speculation::may_pay(DraftSource source, double chance, int sequences) const {
  const StepTime& time = step_time_[index_of(source)];
  return chance * time.at(sequences) >= kMargin * sequences * time.slope();
}

void Speculation::decide_on_module(std::span<Sequence* const> running) {
  with_module_ = by_module_;
  if (!by_module_ || options_.speculative != Speculative::kAuto) return;
  double best = 0;
  int sequences = 0;
  for (Sequence* s : running) {
    const Continuation& c = continuation(s);
    if (c.num_remaining() != 1) continue;
    ++sequences;
    best = std::max(best, acceptance(c, DraftSource::kMtp));
  }
  with_module_ = sequences == 0 || may_pay(DraftSource::kMtp, best, sequences);
  if (!with_module_) all_[kMtp].forget(kForgottenUntried);
}

// With `auto` what the text has said before comes first, for it costs nothing, unless the module guesses better.
void Speculation::draft(Continuation& c) {
  const bool by_ngrams =
      !with_module_ || (options_.speculative == Speculative::kAuto &&
                        acceptance(c, DraftSource::kNgram) >= acceptance(c, DraftSource::kMtp));
  c.draft_source = DraftSource::kNgram;
  if (by_ngrams) c.drafts = drafter_->draft(c, room(c));
  if (!c.drafts.empty() || !with_module_) return;
  c.draft_source = DraftSource::kMtp;
  c.drafts.assign(static_cast<std::size_t>(room(c)), 0);
}

double Speculation::acceptance(const Continuation& c, DraftSource source) const {
  const Acceptance& all = all_[index_of(source)];
  const Acceptance& own = c.acceptance[index_of(source)];
  const double general = (all.accepted + 0.4 * kPrior) / (all.decided + kPrior);
  return (own.accepted + general * kPrior) / (own.decided + kPrior);
}

// A draft is worth its row if the tokens that it can be expected to bring take less time than those before: the
// largest expectations first, as long as tokens per second grow.
void Speculation::keep_what_pays(const std::vector<Continuation*>& drafted, int sequences) {
  struct Candidate {
    double chance;
    Continuation* c;
    std::size_t count;  // of its drafts, with this one
  };
  std::vector<Candidate> candidates;
  for (Continuation* c : drafted) {
    const double each = acceptance(*c, c->draft_source);
    double chance = 1;
    for (std::size_t i = 1; i <= c->drafts.size(); ++i) candidates.push_back({chance *= each, c, i});
  }
  std::ranges::stable_sort(candidates,
                           [](const Candidate& a, const Candidate& b) { return a.chance > b.chance; });
  double tokens = sequences, seconds = step_time_[kNgram].at(sequences);
  for (Continuation* c : drafted) c->num_kept_drafts = 0;
  for (const Candidate& candidate : candidates) {
    // A draft of the module's is an application of it besides. And none without those before it.
    const double slope = step_time_[index_of(candidate.c->draft_source)].slope();
    if (candidate.chance * seconds < kMargin * tokens * slope) continue;
    if (candidate.c->num_kept_drafts + 1 != candidate.count) continue;
    tokens += candidate.chance;
    seconds += slope;
    candidate.c->num_kept_drafts = candidate.count;
  }
  std::array<bool, kDraftSources> thought_of{}, tried{};
  for (Continuation* c : drafted) {
    const std::size_t source = index_of(c->draft_source);
    c->drafts.resize(c->num_kept_drafts);
    thought_of[source] = true;
    tried[source] = tried[source] || !c->drafts.empty();
    if (c->drafts.empty()) c->acceptance[source].forget(kForgottenUntried);
  }
  for (const std::size_t source : {kNgram, kMtp}) {
    if (thought_of[source] && !tried[source]) all_[source].forget(kForgottenUntried);
  }
}

bool Speculation::wants_drafts_after(const LaunchedStep& step) {
  if (!on()) return false;
  if (options_.speculative != Speculative::kAuto) return true;
  // The best that a draft could do there.
  std::array<double, kDraftSources> best{};
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    const Continuation& c = step.continuation(i);
    if (c.ended || room(c) < 1) continue;
    for (const DraftSource source : {DraftSource::kNgram, DraftSource::kMtp}) {
      best[index_of(source)] = std::max(best[index_of(source)], acceptance(c, source));
    }
  }
  const auto sequences = static_cast<int>(step.plan.work.size());
  const bool may_pay = this->may_pay(DraftSource::kNgram, best[kNgram], sequences) ||
                       (by_module_ && this->may_pay(DraftSource::kMtp, best[kMtp], sequences));
  if (may_pay && (gain_ >= kWorthWaiting || ++not_waited_ % kStepsBetweenTrials == 0)) return true;
  if (!may_pay && by_module_) all_[kMtp].forget(kForgottenUntried);
  return false;
}

void Speculation::learn(const LaunchedStep& step, double seconds) {
  if (!on()) return;
  bool decodes = true;
  std::array<bool, kDraftSources> drafted{};
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    decodes = decodes && step.plan.work[i].decoding;
    const std::size_t source = index_of(step.continuation(i).draft_source);
    drafted[source] = drafted[source] || step.plan.work[i].num_drafts() > 0;
    const DraftOutcome& outcome = step.drafts[i];
    if (outcome.decided == 0) continue;
    step.continuation(i).acceptance[source].add(outcome.accepted, outcome.decided, kRemembered);
    all_[source].add(outcome.accepted, outcome.decided, kRememberedOfAll);
  }
  if (!decodes) return;
  if (!step.ahead && !step.plan.work.empty()) {
    int accepted = 0;
    for (const DraftOutcome& outcome : step.drafts) accepted += outcome.accepted;
    const double gain = accepted / static_cast<double>(step.plan.work.size());
    gain_ = kRememberedGain * gain_ + (1 - kRememberedGain) * gain;
  }
  // What a step takes without any draft is where both begin.
  if (!drafted[kMtp]) step_time_[kNgram].add(step.plan.num_tokens, seconds);
  if (drafted[kMtp] || !drafted[kNgram]) step_time_[kMtp].add(step.plan.num_tokens, seconds);
}

}  // namespace flash_mla::engine
