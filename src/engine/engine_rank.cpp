#include "engine/engine_rank.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <functional>
#include <utility>

#include "base/page_size.h"
#include "base/parallel.h"
#include "engine/cache_size.h"
#include "flash_mla/error.h"

namespace flash_mla::engine {
namespace {

// Of all sequences: each needs a row of logits, and in a large batch they do not pay.
int max_drafts_per_step(const EngineOptions& options) {
  return options.speculative == EngineOptions::Speculative::kOff ? 0 : 128;
}

// Whether drafts come of the model's module.
bool uses_module(const model::Model& model, const EngineOptions& options) {
  using Speculative = EngineOptions::Speculative;
  if (options.speculative == Speculative::kMtp && !model.has_draft_module()) {
    throw InvalidArgument(
        "speculative is mtp, expected off, ngram or auto: the checkpoint has no module for multi-token prediction "
        "(eh_proj.weight of the layer behind the last)");
  }
  return model.has_draft_module() &&
         (options.speculative == Speculative::kMtp || options.speculative == Speculative::kAuto);
}

// Room for steps is made before the cache, which by default takes most of what is left.
std::unique_ptr<model::Model> with_room_for_steps(std::unique_ptr<model::Model> model,
                                                  const EngineOptions& options) {
  model->reserve(options.max_tokens_per_step,
                 options.max_batch_size + kMaxScoredTokens + max_drafts_per_step(options));
  return model;
}

// The form of chunks that vLLM shares, if that is wanted.
kv::SharedForm shared_form(const model::Model& model, const EngineOptions& options) {
  if (options.kv_shared.empty()) return {};
  if (options.batch_invariant) {
    throw InvalidArgument(
        "kv_shared is set with batch_invariant: what others have computed has other bits; expected one of them");
  }
  if (options.quantize != EngineOptions::Quantize::kNone)
    throw InvalidArgument(
        "kv_shared is set with quantize: those are another model's pages; expected one of them");
  const int layers = model.num_plain_layers();
  if (layers == 0) {
    throw Unsupported(
        "kv_shared: the pages of this model are not vLLM's; they are for 512 + 64 elements in bfloat16, rotary pairs "
        "interleaved, without an indexer and without a module for drafts");
  }
  return {options.kv_shared, layers};
}

// Null without tiers.
std::unique_ptr<TierTransfers> make_tiers(model::Model& model, kv::PagePool& pool,
                                          const EngineOptions& options, const std::string& weights,
                                          std::shared_ptr<TierSet> shared, std::function<void()> on_news) {
  if (options.kv_tiers.empty()) return nullptr;
  if (options.kv_tier_wait_seconds < 0) {
    throw InvalidArgument(
        fmt::format("kv_tier_wait_seconds is {}, expected 0 or more", options.kv_tier_wait_seconds));
  }
  // Bits of a page depend on the batch it was computed in, but not in batch-invariant mode: such pages are apart.
  // So are those that may have come from other engines.
  std::string salt = fmt::format("flash_mla 1, weights {}, quantize {}, pages {}{}{}", weights,
                                 static_cast<int>(options.quantize), model.page_format(),
                                 options.batch_invariant ? ", batch-invariant" : "",
                                 options.kv_shared.empty() ? "" : ", shared as " + options.kv_shared);
  return std::make_unique<TierTransfers>(
      model, pool,
      TierTransfers::Options{options.kv_tiers, std::move(salt), shared_form(model, options),
                             options.kv_tier_wait_seconds, std::move(on_news)},
      std::move(shared));
}

// Null without a role.
std::shared_ptr<PeerHub> make_hub(const model::Model& model, const EngineOptions& options,
                                  const std::string& weights, std::function<void()> on_news) {
  const TransferOptions& transfer = options.transfer;
  if (transfer.role == TransferRole::kNone) return nullptr;
  check_transfer(transfer);
  transfer::Identity identity{fmt::format("{}, quantize {}", weights, static_cast<int>(options.quantize)),
                              model.page_format(), kPageSize, options.batch_invariant,
                              model.layer_page_bytes()};
  return std::make_shared<PeerHub>(transfer, std::move(identity), std::move(on_news));
}

// Null without a hub.
std::unique_ptr<PeerLoader> make_peers(model::Model& model, kv::PagePool& pool, const EngineOptions& options,
                                       const std::shared_ptr<PeerHub>& hub, std::function<void()> on_news) {
  if (!hub) return nullptr;
  PeerSetup setup{model, pool, options.transfer, hub, std::move(on_news)};
  return options.transfer.role == TransferRole::kPrefill ? make_prefill_side(std::move(setup))
                                                         : make_decode_side(std::move(setup));
}

// What keeps a sequence from growing further than min(model, option, cache).
LengthLimit limit_of(std::int64_t max_length, const model::Model& model, const EngineOptions& options) {
  if (max_length < longest_sequence(model, options)) return LengthLimit::kCache;
  return max_length < model.max_position() ? LengthLimit::kOption : LengthLimit::kModel;
}

// A rank's share of the threads.
EngineOptions of_rank(EngineOptions options) {
  if (options.dp > 1) {
    const int threads = options.num_threads > 0 ? options.num_threads : default_threads();
    options.num_threads = std::max(threads / options.dp, 1);
  }
  return options;
}

}  // namespace

EngineRank::EngineRank(int rank, const EngineRank* first, std::unique_ptr<model::Model> model,
                       TextDecoderFactory make_decoder, std::vector<std::int32_t> eos_token_ids,
                       const EngineOptions& options, std::unique_ptr<Drafter> drafter,
                       const std::string& weights, Inbox& inbox, Statistics& statistics)
    : rank_(rank),
      model_(with_room_for_steps(std::move(model), options)),
      options_(of_rank(options)),
      cache_log_(options.cache_events ? std::make_unique<kv::CacheLog>(rank) : nullptr),
      pool_(num_cache_pages(*model_, options), options.prefix_cache, nullptr, cache_log_.get()),
      tiers_(make_tiers(*model_, pool_, options, weights,
                        first != nullptr && first->tiers_ ? first->tiers_->tiers() : nullptr,
                        [&inbox] { inbox.wake(); })),
      hub_(first != nullptr ? first->hub_ : make_hub(*model_, options, weights, [&inbox] { inbox.wake(); })),
      peers_(make_peers(*model_, pool_, options, hub_, [&inbox] { inbox.wake(); })),
      both_(peers_ && tiers_ ? std::make_unique<RoomsAndTiers>(*peers_, *tiers_, pool_) : nullptr),
      loader_(both_    ? static_cast<PrefixLoader*>(both_.get())
              : peers_ ? static_cast<PrefixLoader*>(peers_.get())
                       : tiers_.get()),
      scheduler_({options.max_batch_size, options.max_tokens_per_step, kMaxScoredTokens,
                  max_drafts_per_step(options)},
                 pool_, loader_),
      max_length_(std::min(longest_sequence(*model_, options), std::int64_t{pool_.num_pages()} * kPageSize)),
      inbox_(inbox),
      statistics_(statistics),
      requests_(scheduler_, inbox_, statistics_, std::move(make_decoder), std::move(eos_token_ids),
                max_length_, limit_of(max_length_, *model_, options)),
      module_drafts_(uses_module(*model_, options) ? std::make_unique<ModuleDrafts>(*model_) : nullptr),
      pipeline_(*model_, scheduler_, pool_, requests_, statistics_, options_, max_length_,
                module_drafts_.get()),
      chooser_(options_.num_threads),
      speculation_(options_, std::move(drafter), max_length_, module_drafts_ != nullptr) {
  allocate_cache(*model_, pool_.num_pages());
  statistics_.add_rank(options.max_batch_size, pool_.num_pages(), model_->bytes_per_page(),
                       model_->weight_bytes(), model_->rank_stats());
}

// Their threads read what goes before them.
EngineRank::~EngineRank() { end_transfers(); }

void EngineRank::end_transfers() {
  tiers_.reset();
  peers_.reset();
  hub_.reset();
}

void EngineRank::add_to(EngineStats& stats) const {
  if (loader_) loader_->add_to(stats);
}

void EngineRank::check(const BootstrapRoom& room) const {
  if (!peers_)
    throw InvalidArgument(
        fmt::format("bootstrap_room is {}, expected none: the server has no --role", room.room));
  if (room.room < 0)
    throw InvalidArgument(fmt::format("bootstrap_room is {}, expected 0 or more", room.room));
  peers_->check(room);
}

std::int64_t EngineRank::cached_prefix(const ActiveRequest& request) const {
  return request.sampling.prompt_logprobs >= 0 ? 0 : pool_.cached_prefix(request.prompt);
}

void EngineRank::begin(std::unique_ptr<ActiveRequest> request) {
  requests_.begin(std::move(request));
  statistics_.begun(rank_, load());
}

bool EngineRank::has_work() const {
  return ahead_ || !scheduler_.idle() || (loader_ && loader_->holds_pages());
}

bool EngineRank::step() {
  try {
    const bool did = run_step();
    model_->end_step();
    statistics_.set_ranks(rank_, model_->rank_stats());
    hand_over_events();
    return did;
  } catch (...) {
    model_->end_step();  // the other ranks go on
    hand_over_events();
    throw;
  }
}

bool EngineRank::run_step() {
  const Clock::time_point begin = Clock::now();
  waits_ = false;
  if (loader_) poll_loader();
  std::unique_ptr<LaunchedStep> step = std::move(ahead_);
  if (step) {
    step->record.begin = step->record.planned = statistics_.seconds(begin);
  } else if (!scheduler_.idle()) {
    speculation_.propose(scheduler_.running());
    StepPlan plan = scheduler_.plan();
    if (loader_ && plan.work.empty()) {
      note_load();
      return waits_ = true;
    }
    if (loader_) loader_->launching(plan);
    step = pipeline_.launch(std::move(plan), begin, speculation_.with_module());
    note_load();  // who asks after a first token finds its sequence running
  } else {
    note_load();
    waits_ = loader_ && loader_->holds_pages();
    return waits_;
  }
  try {
    for (const auto& [continuation, error] : chooser_.prepare(*step, model_->vocab_size())) {
      requests_.end(*continuation, FinishReason::kError, error, /*keep_pages=*/false);
    }
    pipeline_.choose(*step);
    launch_ahead(*step);
    finish(*step);
  } catch (const std::exception& e) {
    give_up(*step, e.what());
  }
  if (ahead_ && ahead_->all_ended()) drop_ahead();
  requests_.drop_ended();
  return true;
}

void EngineRank::poll_loader() {
  loader_->poll();
  for (const auto& [sequence, why] : loader_->refused()) requests_.refuse(*sequence, why);
}

// What the step leaves is taken and told while the next one runs already. If the host cannot prepare that one, it is
// planned when this one's results are there.
void EngineRank::launch_ahead(const LaunchedStep& step) {
  try {
    if (!speculation_.wants_drafts_after(step)) ahead_ = pipeline_.launch_ahead(step);
  } catch (const std::exception&) {
    ahead_.reset();
  }
}

void EngineRank::finish(LaunchedStep& step) {
  pipeline_.collect(step);
  StepRecord& record = step.record;
  record.computed = statistics_.seconds(Clock::now());
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    if (step.continuation(i).ended) continue;
    const ScheduledWork& w = step.plan.work[i];
    ++record.sequences;
    (w.decoding ? record.decode_tokens : record.prefill_tokens) += w.count;
  }
  if (record.sequences == 0) {  // everything of it has ended in the meantime
    note_load();
    return;
  }
  if (step.failure.empty()) {
    accept_tokens(step);
    if (module_drafts_) module_drafts_->note(step);
  } else {
    end_all(step, step.failure);
  }
  record.end = statistics_.seconds(Clock::now());
  const std::vector<model::RankSpan> spans = model_->rank_spans();
  for (std::size_t i = 0; i < spans.size(); ++i) {
    const int number = rank_ * static_cast<int>(spans.size()) + static_cast<int>(i);
    record.ranks.push_back({number, statistics_.seconds(spans[i].begin), statistics_.seconds(spans[i].end),
                            spans[i].exchange_seconds});
  }
  if (loader_) loader_->prefilled(record.prefill_tokens, record.end - record.begin);
  for (const DraftOutcome& outcome : step.drafts) record.decode_tokens += outcome.committed;
  speculation_.learn(step, record.end - record.begin);
  statistics_.drafted(step);
  note_load();
  statistics_.step_ended(rank_, record, step.utilisation, scheduler_.counters(), pool_.counters());
}

void EngineRank::accept_tokens(LaunchedStep& step) {
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    Continuation& c = step.continuation(i);
    if (c.ended) continue;
    scheduler_.commit(step.plan.work[i]);
    if (loader_) loader_->store(c);
  }
  for (const auto& [continuation, error] : chooser_.score(step, pipeline_, model_->vocab_size())) {
    requests_.end(*continuation, FinishReason::kError, error, /*keep_pages=*/false);
  }
  std::vector<TokenChoice> choices = chooser_.choose(step, pipeline_, model_->vocab_size(), requests_);
  // What is chosen behind a draft depends on the tokens before: penalties, formats, where the text ends.
  for (int draft = 1; !choices.empty(); ++draft) {
    accept(step, choices);
    choices = chooser_.choose_behind(draft, step, pipeline_, model_->vocab_size());
  }
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    Continuation& c = step.continuation(i);
    // Where the module had fewer drafts than there is room for, the room goes back too.
    const ScheduledWork& work = step.plan.work[i];
    const bool room = work.num_drafts() > 0 || (module_drafts_ && work.decoding);
    // A step ahead has a place in what would go.
    if (room && !ahead_ && !c.ended) scheduler_.drop_drafts(c);
    if (step.plan.work[i].samples && !c.ended && c.request->sampling.max_tokens == 0)
      requests_.end_at_prompt(c);
  }
}

void EngineRank::accept(LaunchedStep& step, const std::vector<TokenChoice>& choices) {
  for (const TokenChoice& choice : choices) {
    Continuation& c = *choice.continuation;
    if (!choice.error.empty()) {
      requests_.end(c, FinishReason::kError, choice.error, /*keep_pages=*/false);
      continue;
    }
    const std::vector<std::int32_t>& drafts = step.plan.work[choice.work].drafts;
    DraftOutcome& outcome = step.drafts[choice.work];
    const auto behind = static_cast<std::size_t>(outcome.committed);
    const bool decided = behind < drafts.size();
    const bool accepted = decided && drafts[behind] == choice.sampled.token;
    requests_.accept(c, choice.sampled);
    ++outcome.tokens;
    outcome.decided += decided;
    outcome.accepted += accepted;
    if (accepted && !c.ended) {
      scheduler_.commit_draft(c);
      ++outcome.committed;
    }
  }
}

// The host has failed with a step's results: its requests end, whatever they have got of them, and the step
// behind it, made for what they would have been, counts for nothing.
void EngineRank::give_up(LaunchedStep& step, const std::string& why) {
  pipeline_.collect(step);  // if it has not been
  drop_ahead();
  end_all(step, fmt::format("the step failed: {}", why));
}

// Nobody knows what a failed step has left in the pages of those that took part; others go on.
void EngineRank::end_all(LaunchedStep& step, const std::string& why) {
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    Continuation& c = step.continuation(i);
    if (!c.ended) requests_.end(c, FinishReason::kError, why, /*keep_pages=*/false);
  }
}

// The step ahead, if there is one, counts for nothing.
void EngineRank::drop_ahead() {
  if (!ahead_) return;
  pipeline_.collect(*ahead_);
  ahead_.reset();
}

void EngineRank::note_load() { statistics_.set_load(rank_, load()); }

Statistics::Load EngineRank::load() const {
  return {scheduler_.num_running(), scheduler_.num_waiting(), pool_.num_used(), pool_.num_cached()};
}

void EngineRank::cancel_all() {
  requests_.cancel_all();
  requests_.drop_ended();
  if (ahead_) {
    drop_ahead();
    requests_.drop_ended();
  }
  note_load();
  hand_over_events();
}

void EngineRank::hand_over_events() {
  if (cache_log_) cache_log_->hand_over();
}

std::vector<CacheEvent> EngineRank::take_cache_events() {
  return cache_log_ ? cache_log_->take() : std::vector<CacheEvent>();
}

}  // namespace flash_mla::engine
