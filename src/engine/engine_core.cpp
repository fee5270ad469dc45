#include "engine/engine_core.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "engine/step_batch.h"
#include "engine/stop_matcher.h"
#include "flash_mla/error.h"
#include "flash_mla/schedule.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace flash_mla::engine {
namespace {

constexpr std::uint64_t kMostContinuations = 1024;  // validate() allows as many
constexpr std::size_t kTimelineSteps = 4096;

std::vector<double> latency_bounds() {
  return {0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100};
}

int num_sampling_threads(const EngineOptions& options) {
#ifdef _OPENMP
  return options.num_threads > 0 ? options.num_threads : omp_get_max_threads();
#else
  static_cast<void>(options);
  return 1;
#endif
}

int sampling_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Whether the model can choose tokens on its own.
bool leaves_choice_to_model(const SamplingParams& p) {
  return p.repetition_penalty == 1 && p.frequency_penalty == 0 && p.presence_penalty == 0 && p.logprobs < 0;
}

// Before the cache, which by default takes most of what is left.
std::unique_ptr<model::Model> with_room_for_steps(std::unique_ptr<model::Model> model,
                                                  const EngineOptions& options) {
  check(SchedulerOptions{options.max_batch_size, options.max_tokens_per_step});
  model->reserve(options.max_tokens_per_step, options.max_batch_size);
  return model;
}

std::size_t cache_bytes(const model::Model& model, const EngineOptions& options) {
  constexpr std::size_t kHostBytes = std::size_t{2} << 30;
  if (options.memory_bytes > 0) return options.memory_bytes;
  const std::size_t free = model.free_memory();
  // Batch-invariant prompts leave partial results of each token and 1024 keys: 17 GB for 2048 tokens that see
  // 256 K of them with 16 heads.
  return free > 0 ? free / 10 * (options.batch_invariant ? 7 : 9) : kHostBytes;
}

int page_count(const model::Model& model, const EngineOptions& options) {
  if (options.num_pages < 0) {
    throw InvalidArgument(
        fmt::format("num_pages is {}, expected 0 (from memory_bytes) or more", options.num_pages));
  }
  if (options.num_pages > 0) return options.num_pages;
  const std::int64_t useful =
      options.max_batch_size * ((model.max_position() + kPageTokens - 1) / kPageTokens);
  const std::size_t bytes = cache_bytes(model, options);
  const auto fitting = static_cast<std::int64_t>(bytes / std::max<std::size_t>(1, model.bytes_per_page()));
  if (fitting < 1) {
    throw InvalidArgument(fmt::format("memory_bytes is {}, expected at least the {} bytes of one page", bytes,
                                      model.bytes_per_page()));
  }
  const std::int64_t most = options.memory_bytes > 0 ? fitting : std::min(useful, fitting);
  return static_cast<int>(std::clamp<std::int64_t>(most, 1, std::int64_t{1} << 30));
}

}  // namespace

struct EngineCore::Generation : Sequence {
  Generation(Job& owner, int choice, std::unique_ptr<TextDecoder> text);

  Job* job;
  int index;
  TokenHistory history;
  std::unique_ptr<TextDecoder> decoder;  // null: no text
  StopMatcher stop;
  std::int64_t num_generated = 0;
  std::size_t token_index = 0;  // of its token among those that the last step launched with it chooses
  bool finished = false;
  Clock::time_point first_token{}, last_token{};
};

struct EngineCore::Job {
  RequestId id = 0;
  std::vector<std::int32_t> prompt;
  SamplingParams sampling;
  EventHandler on_event;
  std::uint64_t seed = 0;
  Clock::time_point submitted{};
  bool started = false;  // part of it has been in a step
  bool forked = false;   // all n continuations exist
  int open = 1;          // continuations that have not ended
  int num_flying = 0;    // of its continuations in launched steps
  std::vector<std::unique_ptr<Generation>> generations;
};

EngineCore::Generation::Generation(Job& owner, int choice, std::unique_ptr<TextDecoder> text)
    : job(&owner),
      index(choice),
      history(owner.sampling, owner.prompt),
      decoder(std::move(text)),
      stop(owner.sampling.stop, owner.sampling.include_stop) {
  order = owner.id * kMostContinuations + static_cast<std::uint64_t>(choice);
}

// One choice of a token, from one row of logits, or made by the model. Rows are shared where a prompt has
// several continuations.
struct EngineCore::Choice {
  Generation* generation = nullptr;
  std::span<float> logits;  // empty: the model chose `token`
  std::int32_t token = -1;
  bool shared = false;
  Sampled sampled;
  std::string error;
};

// A step that the model has been given.
struct EngineCore::Flight {
  StepPlan plan;
  std::vector<StepBatch::Result> results;  // of each work
  std::size_t num_logit_rows = 0, num_tokens = 0;
  bool launched = false;
  std::string failure;
  StepRecord record;
  double utilisation = 0;

  Generation& generation(std::size_t work) const {
    return static_cast<Generation&>(*plan.work[work].sequence);
  }
  bool all_finished() const {
    return std::ranges::all_of(
        plan.work, [](const ScheduledWork& w) { return static_cast<Generation*>(w.sequence)->finished; });
  }
};

EngineCore::EngineCore(std::unique_ptr<model::Model> model, TextDecoderFactory make_decoder,
                       std::vector<std::int32_t> eos_token_ids, const EngineOptions& options)
    : model_(with_room_for_steps(std::move(model), options)),
      make_decoder_(std::move(make_decoder)),
      eos_token_ids_(std::move(eos_token_ids)),
      options_(options),
      blocks_(page_count(*model_, options), options.prefix_cache),
      scheduler_({options.max_batch_size, options.max_tokens_per_step}, blocks_),
      max_length_(std::min(model_->max_position(), std::int64_t{blocks_.num_pages()} * kPageTokens)) {
  static_assert(kPageTokens == model::kPageSize);
  if (options.max_waiting < 0) {
    throw InvalidArgument(
        fmt::format("max_waiting is {}, expected 0 (no bound) or more", options.max_waiting));
  }
  if (options.num_threads < 0) {
    throw InvalidArgument(fmt::format("num_threads is {}, expected 0 (all) or more", options.num_threads));
  }
  options_.num_pages = blocks_.num_pages();
  model_->allocate_cache(blocks_.num_pages());
  samplers_.resize(static_cast<std::size_t>(num_sampling_threads(options)));
  std::random_device entropy;
  seeds_.seed((std::uint64_t{entropy()} << 32) | entropy());
  stats_.max_batch_size = options.max_batch_size;
  stats_.pages_total = blocks_.num_pages();
  stats_.bytes_per_page = model_->bytes_per_page();
  for (Histogram* h : {&stats_.ttft_seconds, &stats_.tpot_seconds, &stats_.e2e_seconds}) {
    h->bounds = latency_bounds();
    h->counts.resize(h->bounds.size() + 1);
  }
}

EngineCore::~EngineCore() = default;

std::unique_ptr<TextDecoder> EngineCore::new_decoder() const {
  return make_decoder_ ? make_decoder_() : nullptr;
}

void EngineCore::check(const Submission& s) const {
  validate(s.sampling);
  if (s.prompt.empty()) throw InvalidArgument("prompt has no tokens, expected at least 1");
  const auto length = static_cast<std::int64_t>(s.prompt.size());
  if (length >= model_->max_position()) {
    throw InvalidArgument(
        fmt::format("prompt has {} tokens, expected at most {}: the model's {} positions less "
                    "one to generate",
                    length, model_->max_position() - 1, model_->max_position()));
  }
  if (length >= max_length_) {
    throw InvalidArgument(
        fmt::format("prompt has {} tokens, expected at most {}: the cache has {} pages of {} "
                    "tokens (num_pages, memory_bytes)",
                    length, max_length_ - 1, blocks_.num_pages(), kPageTokens));
  }
  for (std::size_t i = 0; i < s.prompt.size(); ++i) {
    if (s.prompt[i] < 0 || s.prompt[i] >= model_->vocab_size()) {
      throw InvalidArgument(fmt::format("prompt_token_ids[{}] is {}, expected 0 to {}", i, s.prompt[i],
                                        model_->vocab_size() - 1));
    }
  }
  if (!make_decoder_ && !s.sampling.stop.empty()) {
    throw Unsupported("stop: this engine has no tokenizer; use stop_token_ids");
  }
}

RequestId EngineCore::submit(Submission submission, bool bounded) {
  RequestId id = 0;
  {
    const std::lock_guard lock(notes_mutex_);
    if (bounded && options_.max_waiting > 0 && num_waiting_requests_ >= options_.max_waiting) {
      throw Overloaded(fmt::format("{} requests wait already, expected fewer than max_waiting, {}",
                                   num_waiting_requests_, options_.max_waiting));
    }
    id = next_id_++;
    ++num_waiting_requests_;
    ++stats_.requests_submitted;
    stats_.prompt_tokens += static_cast<std::int64_t>(submission.prompt.size());
    submitted_.push_back({id, std::move(submission), Clock::now()});
  }
  notes_changed_.notify_all();
  return id;
}

void EngineCore::cancel(RequestId id) {
  {
    const std::lock_guard lock(notes_mutex_);
    cancelled_.push_back(id);
  }
  notes_changed_.notify_all();
}

bool EngineCore::wait_for_work(const std::stop_token& stop) {
  std::unique_lock lock(notes_mutex_);
  return notes_changed_.wait(lock, stop, [&] {
    return busy_ || !submitted_.empty() || !cancelled_.empty();
  }) && !stop.stop_requested();
}

bool EngineCore::take_notes() {
  std::vector<Note> submitted;
  std::vector<RequestId> cancelled;
  {
    const std::lock_guard lock(notes_mutex_);
    submitted.swap(submitted_);
    cancelled.swap(cancelled_);
    // Until this step's end says where they went.
    stats_.waiting += static_cast<int>(submitted.size());
  }
  for (Note& note : submitted) start(note.id, std::move(note.submission), note.time);
  for (const RequestId id : cancelled) {
    const auto it = jobs_.find(id);
    if (it == jobs_.end()) continue;  // it has ended
    for (const auto& g : it->second->generations) {
      if (!g->finished) end(*g, FinishReason::kCancelled, {}, {});
    }
    note_started(*it->second);
  }
  drop_finished_jobs();
  return !submitted.empty() || !cancelled.empty();
}

void EngineCore::start(RequestId id, Submission submission, Clock::time_point submitted) {
  auto job = std::make_unique<Job>();
  job->id = id;
  job->prompt = std::move(submission.prompt);
  job->sampling = std::move(submission.sampling);
  job->on_event = std::move(submission.on_event);
  job->seed = job->sampling.seed ? *job->sampling.seed : seeds_();
  job->submitted = submitted;
  job->open = job->sampling.n;
  job->generations.push_back(std::make_unique<Generation>(*job, 0, new_decoder()));
  job->generations[0]->tokens = job->prompt;
  scheduler_.add(*job->generations[0]);
  jobs_.emplace(id, std::move(job));
}

bool EngineCore::step() {
  const std::lock_guard one_step(step_mutex_);
  const Clock::time_point begin = Clock::now();
  const bool notes = take_notes();
  std::unique_ptr<Flight> flight = std::move(flight_);
  if (flight) {
    flight->record.begin = flight->record.planned = seconds(begin);
  } else if (!scheduler_.idle()) {
    flight = launch(scheduler_.plan(), begin);
  } else {
    const std::lock_guard lock(notes_mutex_);
    note_state();
    return notes;
  }
  // What the step leaves is chosen and told while the next one runs already. If the host cannot prepare that
  // one, it is planned when this one's results are there.
  try {
    flight_ = launch_ahead(*flight);
  } catch (const std::exception&) {
    flight_.reset();
  }
  try {
    finish(*flight);
  } catch (const std::exception& e) {
    give_up(*flight, e.what());
  }
  if (flight_ && flight_->all_finished()) drop_ahead();
  drop_finished_jobs();
  return true;
}

// Gives the model a planned step. An error of the model's is the flight's failure.
std::unique_ptr<EngineCore::Flight> EngineCore::launch(StepPlan plan, Clock::time_point begin) {
  auto flight = std::make_unique<Flight>();
  flight->plan = std::move(plan);
  flight->utilisation = decode_utilisation(flight->plan);
  StepRecord& record = flight->record;
  record.begin = seconds(begin);
  record.preempted = static_cast<int>(flight->plan.preempted.size());
  record.waiting = scheduler_.num_waiting();
  record.pages_used = blocks_.num_used();
  for (const ScheduledWork& w : flight->plan.work) {
    Job& job = *static_cast<Generation*>(w.sequence)->job;
    note_started(job);
    ++job.num_flying;
  }

  record.planned = seconds(Clock::now());
  const auto wanted = [](const ScheduledWork& w, model::Draw& draw) {
    const auto& g = static_cast<const Generation&>(*w.sequence);
    const SamplingParams& sampling = g.job->sampling;
    if (!leaves_choice_to_model(sampling)) return Wanted::kLogits;
    if (sampling.temperature == 0) return Wanted::kLikeliest;
    if (sampling.n > 1 && !g.job->forked) return Wanted::kLogits;  // several tokens come of this row
    // A token that is still on its way counts as generated.
    const std::int64_t on_its_way = w.begin - (static_cast<std::int64_t>(g.tokens.size()) - w.count);
    draw = draw_of(sampling, {g.job->seed, static_cast<std::uint32_t>(g.index),
                              static_cast<std::uint64_t>(g.num_generated + on_its_way)});
    return Wanted::kDrawn;
  };
  const auto token_index = [](const Sequence& s) { return static_cast<const Generation&>(s).token_index; };
  try {
    for (const PageCopy& copy : flight->plan.copies) model_->copy_page(copy.source, copy.target);
    StepBatch batch = make_batch(flight->plan, wanted, token_index);
    flight->results = std::move(batch.results);
    flight->num_logit_rows = batch.logit_rows.size();
    flight->num_tokens = batch.num_tokens;
    // land() cannot fail for want of memory.
    logits_.reserve(num_logits(*flight));
    tokens_.reserve(flight->num_tokens);
    model_->launch(batch.view(options_.batch_invariant));
    flight->launched = true;
  } catch (const std::exception& e) {
    flight->failure = fmt::format("the model failed: {}", e.what());
  }
  return flight;
}

// The step after `flight`, launched before its results are there: if nothing but one more token of each of
// its sequences can follow, and the model chooses those tokens. A sequence whose token turns out to be its
// last has a place in that step in vain: what comes of it is dropped, and what it wrote to its pages is
// written before anything that a later owner of them writes. Null: the step must wait for the results.
std::unique_ptr<EngineCore::Flight> EngineCore::launch_ahead(const Flight& flight) {
  if (!options_.overlap_steps || !model_->launches_ahead() || !flight.failure.empty()) return nullptr;
  std::vector<Sequence*> continuing;
  int unfinished = 0;
  for (std::size_t i = 0; i < flight.plan.work.size(); ++i) {
    Generation& g = flight.generation(i);
    if (g.finished) continue;  // cancelled on its way
    ++unfinished;
    if (!flight.results[i].is_token() || (g.job->sampling.n > 1 && !g.job->forked)) return nullptr;
    g.token_index = flight.results[i].index;
    const bool goes_on = g.num_generated + 1 < g.job->sampling.max_tokens &&
                         static_cast<std::int64_t>(g.tokens.size()) + 1 < max_length_;
    if (goes_on) continuing.push_back(&g);
  }
  if (continuing.empty() || unfinished != scheduler_.num_running()) return nullptr;
  std::optional<StepPlan> plan = scheduler_.plan_ahead(continuing);
  return plan ? launch(std::move(*plan), Clock::now()) : nullptr;
}

std::size_t EngineCore::num_logits(const Flight& flight) const {
  return flight.num_logit_rows * static_cast<std::size_t>(model_->vocab_size());
}

// The host has failed with a step's results: its requests end, whatever they have got of them, and the step
// behind it, made for what they would have been, counts for nothing.
void EngineCore::give_up(Flight& flight, const std::string& why) {
  drop_ahead();
  end_all(flight, fmt::format("the step failed: {}", why));
}

// The step ahead, if there is one, counts for nothing.
void EngineCore::drop_ahead() {
  if (!flight_) return;
  land(*flight_);
  flight_.reset();
}

// Nobody knows what a failed step has left in the pages of those that took part; others go on.
void EngineCore::end_all(Flight& flight, const std::string& why) {
  for (std::size_t i = 0; i < flight.plan.work.size(); ++i) {
    Generation& g = flight.generation(i);
    if (!g.finished) end(g, FinishReason::kError, why, {}, /*keep_pages=*/false);
  }
}

// Waits for the model; then nothing of the flight is on its way any more.
void EngineCore::land(Flight& flight) {
  if (flight.launched) {
    logits_.resize(num_logits(flight));
    tokens_.resize(flight.num_tokens);
    try {
      model_->collect(logits_.data(), tokens_.data());
    } catch (const std::exception& e) {
      flight.failure = fmt::format("the model failed: {}", e.what());
    }
  }
  for (const ScheduledWork& w : flight.plan.work) --static_cast<Generation*>(w.sequence)->job->num_flying;
}

void EngineCore::finish(Flight& flight) {
  land(flight);
  StepRecord& record = flight.record;
  record.computed = seconds(Clock::now());
  for (std::size_t i = 0; i < flight.plan.work.size(); ++i) {
    if (flight.generation(i).finished) continue;
    const ScheduledWork& w = flight.plan.work[i];
    ++record.sequences;
    (w.decoding ? record.decode_tokens : record.prefill_tokens) += w.count;
  }
  if (record.sequences == 0) {  // everything of it has ended in the meantime
    const std::lock_guard lock(notes_mutex_);
    note_state();
    return;
  }
  if (flight.failure.empty()) {
    for (std::size_t i = 0; i < flight.plan.work.size(); ++i) {
      if (!flight.generation(i).finished) scheduler_.commit(flight.plan.work[i]);
    }
    std::vector<Choice> choices = plan_choices(flight);
    choose(choices);
    for (Choice& c : choices) {
      if (c.error.empty()) {
        accept(*c.generation, c.sampled);
      } else {
        end(*c.generation, FinishReason::kError, c.error, {}, /*keep_pages=*/false);
      }
    }
  } else {
    end_all(flight, flight.failure);
  }
  record.end = seconds(Clock::now());

  const std::lock_guard lock(notes_mutex_);
  note_state();
  record.step = stats_.steps++;
  stats_.step_seconds += record.end - record.begin;
  stats_.computed_tokens += record.decode_tokens + record.prefill_tokens;
  stats_.prefix_tokens_looked_up = scheduler_.counters().tokens_looked_up;
  stats_.prefix_tokens_hit = scheduler_.counters().tokens_hit;
  stats_.preemptions = scheduler_.counters().preemptions;
  stats_.pages_evicted = blocks_.counters().pages_evicted;
  stats_.pages_copied = blocks_.counters().pages_copied;
  if (flight.utilisation > 0) stats_.schedule_utilisation = flight.utilisation;
  timeline_.push_back(record);
  if (timeline_.size() > kTimelineSteps) timeline_.pop_front();
}

// With notes_mutex_ held.
void EngineCore::note_state() {
  busy_ = !scheduler_.idle();
  stats_.running = scheduler_.num_running();
  stats_.waiting = scheduler_.num_waiting();
  stats_.pages_used = blocks_.num_used();
  stats_.pages_cached = blocks_.num_cached();
}

std::vector<EngineCore::Choice> EngineCore::plan_choices(const Flight& flight) {
  const auto vocab_size = static_cast<std::size_t>(model_->vocab_size());
  std::vector<Choice> choices;
  for (std::size_t i = 0; i < flight.plan.work.size(); ++i) {
    Generation& g = flight.generation(i);
    const StepBatch::Result& result = flight.results[i];
    if (g.finished || result.wanted == Wanted::kNothing) continue;
    Job& job = *g.job;
    Choice choice;
    if (result.is_token()) {
      choice.token = tokens_[result.index];
    } else {
      choice.logits = std::span(logits_).subspan(result.index * vocab_size, vocab_size);
    }
    choice.generation = &g;
    if (job.forked || job.sampling.n == 1) {
      choices.push_back(choice);
      continue;
    }
    // The prompt is done: all continuations take their first token from here.
    fork_generations(job);
    choice.shared = true;
    for (const auto& each : job.generations) {
      choice.generation = each.get();
      choices.push_back(choice);
    }
  }
  return choices;
}

void EngineCore::fork_generations(Job& job) {
  job.forked = true;
  const Generation& first = *job.generations[0];
  for (int i = 1; i < job.sampling.n; ++i) {
    Generation& g = *job.generations.emplace_back(std::make_unique<Generation>(job, i, new_decoder()));
    scheduler_.fork(first, g);
  }
}

void EngineCore::choose(std::vector<Choice>& choices) {
  const auto count = static_cast<std::ptrdiff_t>(choices.size());
  // Below some ten microseconds of work, waking threads costs more than they bring.
  constexpr std::ptrdiff_t kLogitsWorthThreads = 1 << 16;
  const bool threads = count > 1 && std::ssize(logits_) >= kLogitsWorthThreads;
  const int num_threads = threads ? static_cast<int>(std::min(std::ssize(samplers_), count)) : 1;
  static_cast<void>(num_threads);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
#endif
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    Choice& c = choices[static_cast<std::size_t>(i)];
    const Generation& g = *c.generation;
    if (c.logits.empty()) {
      c.sampled.token = c.token;
      if (c.token < 0) {
        c.error =
            "the model's logits hold NaN or infinity, or exclude every token; weights or cache may be "
            "damaged";
      }
      continue;
    }
    try {
      std::vector<float> own;
      if (c.shared) own.assign(c.logits.begin(), c.logits.end());
      const DrawKey key{g.job->seed, static_cast<std::uint32_t>(g.index),
                        static_cast<std::uint64_t>(g.num_generated)};
      c.sampled = samplers_[static_cast<std::size_t>(sampling_thread())].sample(
          g.job->sampling, g.history, key, c.shared ? std::span<float>(own) : c.logits);
    } catch (const std::exception& e) {
      c.error = e.what();
    }
  }
}

void EngineCore::accept(Generation& g, const Sampled& sampled) {
  const SamplingParams& sampling = g.job->sampling;
  g.tokens.push_back(sampled.token);
  g.history.add(sampled.token);
  ++g.num_generated;
  g.last_token = Clock::now();
  {
    const std::lock_guard lock(notes_mutex_);
    ++stats_.generated_tokens;
    if (g.num_generated == 1) {
      g.first_token = g.last_token;
      stats_.ttft_seconds.add(std::chrono::duration<double>(g.first_token - g.job->submitted).count());
    }
  }
  GenerationEvent event;
  event.token_ids = {sampled.token};
  if (sampling.logprobs >= 0) event.logprobs = {sampled.logprobs};

  const auto is = [&](const std::vector<std::int32_t>& ids) {
    return std::ranges::find(ids, sampled.token) != ids.end();
  };
  if ((!sampling.ignore_eos && is(eos_token_ids_)) || is(sampling.stop_token_ids)) {
    end(g, FinishReason::kStop, {}, std::move(event));
    return;
  }
  if (g.decoder) event.text = g.stop.push(g.decoder->push(sampled.token));
  if (g.stop.stopped()) {
    end(g, FinishReason::kStop, {}, std::move(event));
  } else if (g.num_generated == sampling.max_tokens ||
             static_cast<std::int64_t>(g.tokens.size()) >= max_length_) {
    end(g, FinishReason::kLength, {}, std::move(event));
  } else {
    event.index = g.index;
    event.usage = {static_cast<std::int64_t>(g.job->prompt.size()), g.cached_tokens, g.num_generated};
    send(*g.job, event);
  }
}

void EngineCore::end(Generation& g, FinishReason reason, const std::string& error, GenerationEvent event,
                     bool keep_pages) {
  Job& job = *g.job;
  g.finished = true;
  scheduler_.finish(g, keep_pages);
  // A prompt that never came to fork ends for all its continuations.
  const bool whole_job = job.sampling.n > 1 && !job.forked;
  if (whole_job) {
    job.open = 0;
  } else {
    --job.open;
  }
  if (job.open == 0) finished_jobs_.push_back(job.id);

  if (g.decoder && !g.stop.stopped()) {
    event.text += g.stop.push(g.decoder->flush());
    event.text += g.stop.flush();
  }
  event.index = g.index;
  event.finish = reason;
  event.error = error;
  event.usage = {static_cast<std::int64_t>(job.prompt.size()), g.cached_tokens, g.num_generated};
  event.last = job.open == 0;
  {
    const std::lock_guard lock(notes_mutex_);
    const std::int64_t ended = whole_job ? job.sampling.n : 1;
    switch (reason) {
      case FinishReason::kStop:
        stats_.finished_stop += ended;
        break;
      case FinishReason::kLength:
        stats_.finished_length += ended;
        break;
      case FinishReason::kCancelled:
        stats_.cancelled += ended;
        break;
      default:
        stats_.failed += ended;
    }
    if (reason == FinishReason::kStop || reason == FinishReason::kLength) {
      stats_.e2e_seconds.add(std::chrono::duration<double>(g.last_token - job.submitted).count());
      if (g.num_generated > 1) {
        stats_.tpot_seconds.add(std::chrono::duration<double>(g.last_token - g.first_token).count() /
                                static_cast<double>(g.num_generated - 1));
      }
    }
  }
  if (whole_job) {
    for (int i = 0; i < job.sampling.n; ++i) {
      event.index = i;
      event.last = i + 1 == job.sampling.n;
      send(job, event);
    }
    return;
  }
  send(job, event);
}

void EngineCore::send(Job& job, const GenerationEvent& event) {
  if (!job.on_event) return;
  GenerationEvent out = event;
  out.request = job.id;
  try {
    job.on_event(out);
  } catch (...) {
    // A handler must not throw. Nobody listens any more: the request ends, its neighbours go on.
    job.on_event = nullptr;
    cancel(job.id);
  }
}

void EngineCore::drop_finished_jobs() {
  // Those in a step on its way are dropped when it has landed.
  std::erase_if(finished_jobs_, [this](RequestId id) {
    if (jobs_.at(id)->num_flying > 0) return false;
    jobs_.erase(id);
    return true;
  });
}

void EngineCore::note_started(Job& job) {
  if (job.started) return;
  job.started = true;
  const std::lock_guard lock(notes_mutex_);
  --num_waiting_requests_;
}

void EngineCore::cancel_all() {
  const std::lock_guard one_step(step_mutex_);
  take_notes();
  std::vector<RequestId> ids;
  for (const auto& [id, job] : jobs_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  for (const RequestId id : ids) cancel(id);
  take_notes();
  if (flight_) {
    drop_ahead();
    drop_finished_jobs();
  }
  const std::lock_guard lock(notes_mutex_);
  note_state();
}

double EngineCore::decode_utilisation(const StepPlan& plan) const {
  std::vector<std::int32_t> lengths;
  for (const ScheduledWork& w : plan.work) {
    if (w.decoding) lengths.push_back(static_cast<std::int32_t>(w.begin + w.count));
  }
  if (lengths.empty()) return 0;
  const DecodeSchedule schedule = DecodeSchedule::build(
      lengths, model_->schedule_options(static_cast<int>(lengths.size()), options_.batch_invariant));
  std::int64_t busiest = 0, all = 0;
  for (const DecodePart& part : schedule.parts()) {
    std::int64_t blocks = 0;
    for (std::int32_t r = part.begin_req; r <= part.end_req; ++r) {
      const std::int64_t length = lengths[static_cast<std::size_t>(r)];
      const std::int64_t from = r == part.begin_req ? part.begin_block : 0;
      const std::int64_t to = r == part.end_req ? part.end_block : (length + kPageTokens - 1) / kPageTokens;
      blocks += to - from;
    }
    busiest = std::max(busiest, blocks);
    all += blocks;
  }
  return busiest == 0
             ? 0
             : static_cast<double>(all) / static_cast<double>(busiest * std::ssize(schedule.parts()));
}

EngineStats EngineCore::stats() const {
  const std::lock_guard lock(notes_mutex_);
  EngineStats out = stats_;
  out.waiting += static_cast<int>(submitted_.size());
  out.seconds = seconds(Clock::now());
  return out;
}

std::vector<StepRecord> EngineCore::timeline() const {
  const std::lock_guard lock(notes_mutex_);
  return {timeline_.begin(), timeline_.end()};
}

}  // namespace flash_mla::engine
