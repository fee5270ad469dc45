#include "engine/engine_core.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <iterator>
#include <latch>
#include <utility>

#include "base/page_size.h"
#include "engine/balance.h"
#include "engine/cache_size.h"
#include "flash_mla/error.h"

namespace flash_mla::engine {
namespace {

void check_options(const EngineOptions& options) {
  check(SchedulerOptions{options.max_batch_size, options.max_tokens_per_step});
  if (options.max_waiting < 0) {
    throw InvalidArgument(
        fmt::format("max_waiting is {}, expected 0 (no bound) or more", options.max_waiting));
  }
  if (options.dp < 1) throw InvalidArgument(fmt::format("dp is {}, expected 1 or more", options.dp));
  if (options.num_threads < 0) {
    throw InvalidArgument(fmt::format("num_threads is {}, expected 0 (all) or more", options.num_threads));
  }
}

// Those that a request names besides its prompt. (A stop token that never comes does no harm.)
void check_tokens(const SamplingParams& p, int vocab_size) {
  const auto check_one = [&](const char* field, std::int32_t token) {
    if (token >= vocab_size) {
      throw InvalidArgument(fmt::format("{} names token {}, expected 0 to {}", field, token, vocab_size - 1));
    }
  };
  for (const LogitBias& b : p.logit_bias) check_one("logit_bias", b.token);
  for (const std::int32_t token : p.allowed_token_ids) check_one("allowed_token_ids", token);
  for (const std::vector<std::int32_t>& run : p.bad_token_ids) {
    for (const std::int32_t token : run) check_one("bad_token_ids", token);
  }
}

std::vector<std::unique_ptr<model::Model>> one(std::unique_ptr<model::Model> model) {
  std::vector<std::unique_ptr<model::Model>> out;
  out.push_back(std::move(model));
  return out;
}

}  // namespace

EngineCore::EngineCore(std::unique_ptr<model::Model> model, const TextDecoderFactory& make_decoder,
                       const std::vector<std::int32_t>& eos_token_ids, const EngineOptions& options,
                       std::unique_ptr<Drafter> drafter, const std::string& weights)
    : EngineCore(one(std::move(model)), make_decoder, eos_token_ids, options, std::move(drafter), weights) {}

EngineCore::EngineCore(std::vector<std::unique_ptr<model::Model>> models,
                       const TextDecoderFactory& make_decoder, const std::vector<std::int32_t>& eos_token_ids,
                       const EngineOptions& options, const std::string& weights)
    : EngineCore(std::move(models), make_decoder, eos_token_ids, options, nullptr, weights) {}

EngineCore::EngineCore(std::vector<std::unique_ptr<model::Model>> models,
                       const TextDecoderFactory& make_decoder, const std::vector<std::int32_t>& eos_token_ids,
                       const EngineOptions& options, std::unique_ptr<Drafter> drafter,
                       const std::string& weights)
    : has_text_(static_cast<bool>(make_decoder)),
      options_(options),
      inbox_(options.max_waiting, statistics_) {
  check_options(options);
  options_.dp = static_cast<int>(models.size());
  for (std::unique_ptr<model::Model>& model : models) {
    const int rank = static_cast<int>(ranks_.size());
    const EngineRank* const first = ranks_.empty() ? nullptr : ranks_[0].get();
    ranks_.push_back(std::make_unique<EngineRank>(rank, first, std::move(model), make_decoder, eos_token_ids,
                                                  options_, std::move(drafter), weights, inbox_,
                                                  statistics_));
    if (rank > 0) threads_.push_back(std::make_unique<TaskThread>(fmt::format("rank {}", rank)));
  }
  options_.num_pages = ranks_[0]->num_pages();
}

EngineCore::~EngineCore() {
  for (const auto& rank : ranks_) rank->end_transfers();
}

EngineStats EngineCore::stats() const {
  EngineStats out = statistics_.snapshot();
  ranks_[0]->add_to(out);
  out.experts = count_experts();
  return out;
}

std::vector<CacheEvent> EngineCore::take_cache_events() {
  std::vector<CacheEvent> out;
  for (const auto& rank : ranks_) std::ranges::move(rank->take_cache_events(), std::back_inserter(out));
  return out;
}

// Every rank counts what its own tokens choose, and what it has run.
std::vector<ExpertCounts> EngineCore::count_experts() const {
  std::vector<ExpertCounts> out = ranks_[0]->model().expert_counts();
  for (std::size_t rank = 1; rank < ranks_.size(); ++rank) {
    const std::vector<ExpertCounts> more = ranks_[rank]->model().expert_counts();
    for (std::size_t i = 0; i < out.size(); ++i) {
      for (std::size_t e = 0; e < out[i].counts.size(); ++e) out[i].counts[e] += more.at(i).counts.at(e);
      const std::vector<std::int64_t>& of = more.at(i).rank_counts;
      out[i].rank_counts.insert(out[i].rank_counts.end(), of.begin(), of.end());
    }
  }
  return out;
}

std::vector<ExpertCounts> EngineCore::expert_counts() const {
  std::vector<ExpertCounts> out = count_experts();
  if (out.empty()) {
    throw Unsupported(fmt::format("expert_counts: {}", ranks_[0]->model().why_no_expert_counts()));
  }
  return out;
}

std::int32_t EngineCore::vocab_size() const { return ranks_[0]->model().vocab_size(); }
std::int64_t EngineCore::max_length() const { return ranks_[0]->max_length(); }

void EngineCore::check(const Request& request) const {
  const model::Model& model = ranks_[0]->model();
  const std::vector<std::int32_t>& prompt = request.prompt_token_ids;
  validate(request.sampling);
  if (prompt.empty()) throw InvalidArgument("prompt has no tokens, expected at least 1");
  const auto length = static_cast<std::int64_t>(prompt.size());
  if (length >= model.max_position()) {
    throw InvalidArgument(
        fmt::format("prompt has {} tokens, expected at most {}: the model's {} positions less "
                    "one to generate",
                    length, model.max_position() - 1, model.max_position()));
  }
  if (length >= longest_sequence(model, options_)) {
    throw InvalidArgument(fmt::format("prompt has {} tokens, expected at most {}: max_model_len is {}",
                                      length, options_.max_model_len - 1, options_.max_model_len));
  }
  if (length >= max_length()) {
    throw InvalidArgument(
        fmt::format("prompt has {} tokens, expected at most {}: the cache has {} pages of {} "
                    "tokens (num_pages, memory_bytes)",
                    length, max_length() - 1, options_.num_pages, kPageSize));
  }
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    if (prompt[i] < 0 || prompt[i] >= model.vocab_size()) {
      throw InvalidArgument(
          fmt::format("prompt_token_ids[{}] is {}, expected 0 to {}", i, prompt[i], model.vocab_size() - 1));
    }
  }
  check_tokens(request.sampling, model.vocab_size());
  if (request.bootstrap) ranks_[0]->check(*request.bootstrap);
  const std::optional<int>& rank = request.data_parallel_rank;
  if (rank && (*rank < 0 || *rank >= std::ssize(ranks_)))
    throw InvalidArgument(
        fmt::format("data_parallel_rank is {}, expected 0 to {}", *rank, ranks_.size() - 1));
  if (!has_text_ && !request.sampling.format.is_free()) {
    throw Unsupported("the format of a text: this engine has no tokenizer");
  }
  if (!has_text_ && !request.sampling.stop.empty()) {
    throw Unsupported("stop: this engine has no tokenizer; use stop_token_ids");
  }
}

// Ranks tell their handlers from threads of their own.
EventHandler EngineCore::one_at_a_time(EventHandler on_event) {
  if (!on_event) return on_event;
  return [this, on_event = std::move(on_event)](const GenerationEvent& event) {
    const std::lock_guard lock(event_mutex_);
    on_event(event);
  };
}

RequestId EngineCore::submit(Request request, EventHandler on_event, bool bounded,
                             std::shared_ptr<const grammar::Grammar> grammar) {
  auto active = std::make_unique<ActiveRequest>();
  active->prompt = std::move(request.prompt_token_ids);
  active->sampling = std::move(request.sampling);
  active->room = std::move(request.bootstrap);
  active->rank = request.data_parallel_rank;
  if (active->room && options_.transfer.role == TransferRole::kPrefill) {
    // What follows is the decode server's.
    active->sampling.max_tokens = std::min(active->sampling.max_tokens, 1);
    active->sampling.min_tokens = std::min(active->sampling.min_tokens, active->sampling.max_tokens);
  }
  if (active->sampling.best_of > active->sampling.n) {
    throw InvalidArgument(
        fmt::format("best_of is {}, expected at most n, {}: which is best is known at the end",
                    active->sampling.best_of, active->sampling.n));
  }
  active->grammar = std::move(grammar);
  active->on_event = ranks_.size() > 1 ? one_at_a_time(std::move(on_event)) : std::move(on_event);
  return inbox_.submit(std::move(active), bounded);
}

bool EngineCore::empty_inbox() {
  Inbox::Contents contents = inbox_.take();
  if (!contents.submitted.empty()) place(std::move(contents.submitted));
  for (const auto& rank : ranks_) {
    for (const auto& [id, continuation] : contents.cancelled) rank->cancel(id, continuation);
    rank->drop_ended();
  }
  return !contents.empty();
}

// Every request goes to the rank that is expected to come to its tokens first.
void EngineCore::place(std::vector<std::unique_ptr<ActiveRequest>> requests) {
  if (ranks_.size() == 1) {  // without a look at what its cache has, which the whole prompt is hashed for
    for (std::unique_ptr<ActiveRequest>& request : requests) ranks_[0]->begin(std::move(request));
    return;
  }
  std::vector<RankLoad> loads;
  loads.reserve(ranks_.size());
  for (const auto& rank : ranks_) loads.push_back(rank->backlog());
  for (std::unique_ptr<ActiveRequest>& request : requests) {
    std::vector<std::int64_t> cached;
    cached.reserve(ranks_.size());
    for (const auto& rank : ranks_) cached.push_back(rank->cached_prefix(*request));
    const auto length = static_cast<std::int64_t>(request->prompt.size());
    const std::size_t rank = take_rank(loads, cached, length, request->sampling.n, request->rank);
    ranks_[rank]->begin(std::move(request));
  }
}

bool EngineCore::step() {
  const std::lock_guard one_step(step_mutex_);
  const bool news = empty_inbox();
  const bool worked = step_ranks();
  wait_for_pages();
  statistics_.step_ended();
  note_busy();
  for (const auto& rank : ranks_) {
    if (told_broken_ || !options_.on_broken) break;
    if (const std::string why = rank->model().broken(); !why.empty()) {
      told_broken_ = true;
      options_.on_broken(why);
    }
  }
  return news || worked;
}

// One step of all ranks, each on a thread of its own, rank 0 on this one.
bool EngineCore::step_ranks() {
  if (ranks_.size() == 1) return ranks_[0]->step();
  if (std::ranges::none_of(ranks_, [](const auto& rank) { return rank->has_work(); })) {
    for (const auto& rank : ranks_) rank->note_load();
    return false;
  }
  std::vector<std::exception_ptr> errors(ranks_.size());
  const auto run = [&](std::size_t rank) {
    try {
      ranks_[rank]->step();
    } catch (...) {
      errors[rank] = std::current_exception();
    }
  };
  std::latch others(std::ssize(threads_));
  for (std::size_t rank = 1; rank < ranks_.size(); ++rank) {
    threads_[rank - 1]->post([&, rank] {
      run(rank);
      others.count_down();
    });
  }
  run(0);
  others.wait();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  return true;
}

// Where no rank has anything to compute before a tier, or a peer, has answered.
void EngineCore::wait_for_pages() {
  const auto waits = [](const auto& rank) { return rank->waits(); };
  const auto has_nothing = [](const auto& rank) { return rank->waits() || !rank->has_work(); };
  if (std::ranges::any_of(ranks_, waits) && std::ranges::all_of(ranks_, has_nothing))
    inbox_.wait_for_news(std::chrono::milliseconds(2));
}

void EngineCore::note_busy() {
  inbox_.set_busy(std::ranges::any_of(ranks_, [](const auto& rank) { return rank->is_busy(); }));
}

void EngineCore::cancel_all() {
  const std::lock_guard one_step(step_mutex_);
  empty_inbox();
  for (const auto& rank : ranks_) rank->cancel_all();
  note_busy();
}

}  // namespace flash_mla::engine
