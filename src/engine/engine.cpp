#include "flash_mla/engine.h"

#include <fmt/format.h>
#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "checkpoint/config.h"
#include "engine/engine_core.h"
#include "engine/trace.h"
#include "flash_mla/error.h"
#include "grammar/grammar.h"
#include "kv/kv_tier.h"
#include "model/model.h"
#include "text/chat_template.h"
#include "text/fill_in_the_middle.h"
#include "text/open_end.h"
#include "text/tokenizer.h"
#include "text/tool_convention.h"

namespace flash_mla {
namespace {

class Decoder : public text::TextDecoder {
 public:
  explicit Decoder(const text::Tokenizer& tokenizer) : stream_(tokenizer) {}
  std::string push(std::int32_t token) override { return stream_.push(token); }
  std::string flush() override { return stream_.flush(); }

 private:
  text::StreamDecoder stream_;
};

model::ModelOptions model_options(const EngineOptions& o) {
  model::ModelOptions out;
  out.device = o.device;
  out.precision = o.precision;
  out.quantize = o.quantize;
  out.kv_cache = o.kv_cache;
  out.num_threads = o.num_threads;
  out.tp = o.tp;
  out.devices = o.devices;
  out.dp = o.dp;
  out.ep = o.ep;
  out.expert_placement = o.expert_placement;
  out.batch_invariant = o.batch_invariant;
  out.cache_pages = o.num_pages;
  out.cache_bytes = o.memory_bytes;
  using Speculative = EngineOptions::Speculative;
  out.draft_module = o.speculative == Speculative::kMtp || o.speculative == Speculative::kAuto;
  out.on_load = o.on_load;
  return out;
}

std::vector<std::unique_ptr<model::Model>> make_models(const std::filesystem::path& directory,
                                                       const EngineOptions& o) {
  return o.load_format == EngineOptions::LoadFormat::kDummy
             ? model::make_random_models(checkpoint::read_config(directory), model_options(o))
             : model::load_models(directory, model_options(o));
}

// What tells the model's pages from those of others, where anybody asks.
std::string weights_of(const std::filesystem::path& directory, const EngineOptions& o) {
  if (o.kv_tiers.empty() && o.transfer.role == TransferRole::kNone) return {};
  return o.load_format == EngineOptions::LoadFormat::kDummy ? "random " + model::config_digest(directory)
                                                            : model::weights_digest(directory);
}

// Completions that come in as events, from whichever thread steps.
class Collector {
 public:
  /// `requests` as they are submitted: n continuations of each, whatever best_of was.
  Collector(std::span<const Request> requests, const EventHandler& on_event)
      : on_event_(on_event), completions_(requests.size()), open_(requests.size()) {
    for (std::size_t i = 0; i < requests.size(); ++i) {
      completions_[i].choices.resize(static_cast<std::size_t>(requests[i].sampling.n));
    }
  }

  void take(std::size_t request, const GenerationEvent& e) {
    if (on_event_) on_event_(e);
    const std::lock_guard lock(mutex_);
    Completion& completion = completions_[request];
    Completion::Choice& choice = completion.choices[static_cast<std::size_t>(e.index)];
    choice.text += e.text;
    choice.token_ids.insert(choice.token_ids.end(), e.token_ids.begin(), e.token_ids.end());
    choice.logprobs.insert(choice.logprobs.end(), e.logprobs.begin(), e.logprobs.end());
    choice.finish = e.finish;
    choice.limit = e.limit;
    choice.error = e.error;
    if (!e.prompt_logprobs.empty()) completion.prompt_logprobs = e.prompt_logprobs;
    if (e.finish != FinishReason::kNone) {
      completion.usage.prompt_tokens = e.usage.prompt_tokens;
      completion.usage.cached_tokens = e.usage.cached_tokens;
      completion.usage.completion_tokens += e.usage.completion_tokens;
    }
    if (e.last && --open_ == 0) done_.notify_all();
  }

  bool done() const {
    const std::lock_guard lock(mutex_);
    return open_ == 0;
  }
  void wait_a_moment() {
    std::unique_lock lock(mutex_);
    done_.wait_for(lock, std::chrono::milliseconds(50), [&] { return open_ == 0; });
  }
  std::vector<Completion> result() {
    const std::lock_guard lock(mutex_);
    return std::move(completions_);
  }

 private:
  const EventHandler& on_event_;
  mutable std::mutex mutex_;
  std::condition_variable done_;
  std::vector<Completion> completions_;
  std::size_t open_;
};

double mean_logprob(const Completion::Choice& choice) {
  double sum = 0;
  for (const TokenLogprobs& l : choice.logprobs) sum += l.chosen.logprob;
  return choice.logprobs.empty() ? 0 : sum / static_cast<double>(choice.logprobs.size());
}

// best_of continuations that tell their log-probabilities, in place of n.
void generate_all(SamplingParams& p) {
  if (p.best_of <= p.n) return;
  p.n = p.best_of;
  p.logprobs = std::max(p.logprobs, 0);
}

// The n best of them, the best first; without the log-probabilities if nobody asked for them.
void keep_best(Completion& completion, const SamplingParams& p) {
  if (p.best_of <= p.n) return;
  std::ranges::stable_sort(completion.choices, std::greater(), mean_logprob);
  completion.choices.resize(static_cast<std::size_t>(p.n));
  if (p.logprobs >= 0) return;
  for (Completion::Choice& choice : completion.choices) choice.logprobs.clear();
}

}  // namespace

struct Engine::Impl {
  Impl(const std::filesystem::path& directory, const EngineOptions& options)
      : tokenizer(text::Tokenizer::open(directory)),
        eos_token_ids(checkpoint::read_config(directory).eos_token_ids),
        core(
            make_models(directory, options), [this] { return std::make_unique<Decoder>(tokenizer); },
            eos_token_ids, options, weights_of(directory, options)),
        formats(vocabulary()) {
    if (!options.chat_template.empty()) {
      chat_template.emplace(text::ChatTemplate::open(directory, options.chat_template));
    } else {
      try {
        chat_template.emplace(text::ChatTemplate::open(directory));
      } catch (const std::exception& e) {
        why_no_chat = e.what();  // matters only to requests with messages
      }
    }
    if (chat_template) tool_convention = text::find_tool_convention(*chat_template);
    if (options.tool_format) tool_convention.format = *options.tool_format;
    if (!options.generation_config) return;
    const checkpoint::SamplingDefaults defaults = checkpoint::read_sampling_defaults(directory);
    SamplingParams& p = default_sampling;
    p.temperature = defaults.temperature.value_or(p.temperature);
    p.top_p = defaults.top_p.value_or(p.top_p);
    p.top_k = defaults.top_k.value_or(p.top_k);
    p.min_p = defaults.min_p.value_or(p.min_p);
    p.repetition_penalty = defaults.repetition_penalty.value_or(p.repetition_penalty);
  }

  std::vector<std::int32_t> encode(std::string_view text, bool add_special_tokens, bool allow_special) const {
    if (allow_special) return tokenizer.encode(text, add_special_tokens);
    const text::TextPart part{std::string(text), /*control=*/false};
    return tokenizer.encode_parts(std::span(&part, 1), add_special_tokens);
  }

  std::vector<std::int32_t> prompt_tokens(Request& request) const {
    if (request.messages.empty() && (request.continue_final_message || !request.add_generation_prompt)) {
      throw InvalidArgument("continue_final_message, add_generation_prompt: expected messages");
    }
    const int given = !request.prompt.empty() + !request.prompt_token_ids.empty() +
                      !request.prompt_parts.empty() + !request.messages.empty();
    if (given == 0) throw InvalidArgument("prompt is empty, expected text, prompt_token_ids or messages");
    if (given > 1) {
      throw InvalidArgument(
          "prompt, prompt_token_ids, prompt_parts and messages: more than one is given, expected one");
    }
    if (!request.suffix.empty()) return fill_in_the_middle(request);
    if (!request.prompt.empty()) {
      return encode(request.prompt, /*add_special_tokens=*/true, request.allow_special);
    }
    if (!request.prompt_token_ids.empty()) return std::move(request.prompt_token_ids);
    if (!request.prompt_parts.empty()) return tokenizer.encode_parts(request.prompt_parts);
    return tokenizer.encode_parts(chat_prompt(request));
  }

  std::vector<TextPart> chat_prompt(const Request& request) const {
    if (!chat_template) {
      throw Unsupported(
          "messages: the model directory has no chat template that this library knows (chat_template.jinja, "
          "or "
          "chat_template in tokenizer_config.json); use prompt");
    }
    const nlohmann::ordered_json variables = chat_variables(request.chat_variables);
    if (!request.continue_final_message) {
      return text::chat_with_tools(*chat_template, tool_convention, request.messages, request.tools,
                                   variables, request.add_generation_prompt);
    }
    std::vector<ChatMessage> messages = request.messages;
    const text::OpenEnd end = text::mark_open_end(messages);
    return end.cut(text::chat_with_tools(*chat_template, tool_convention, messages, request.tools, variables,
                                         /*add_generation_prompt=*/false));
  }

  // A variable that the template does not look at would be ignored in silence.
  nlohmann::ordered_json chat_variables(const std::string& text) const {
    nlohmann::ordered_json out = text::parse_chat_variables(text);
    for (const auto& [name, value] : out.items()) {
      const bool asks_nothing = value.is_null() || value == false || (value.is_structured() && value.empty());
      if (!asks_nothing && !chat_template->reads(name)) {
        throw InvalidArgument(
            fmt::format("chat_template_kwargs.{}: the model's chat template reads no such variable", name));
      }
    }
    return out;
  }

  std::vector<std::int32_t> fill_in_the_middle(const Request& request) const {
    if (request.prompt.empty()) throw InvalidArgument("suffix: expected a text in prompt, before the gap");
    return tokenizer.encode_parts(text::fill_in_the_middle(tokenizer, request.prompt, request.suffix),
                                  /*add_special_tokens=*/true);
  }

  grammar::Vocabulary vocabulary() const {
    grammar::Vocabulary out{core.vocab_size(), {}, eos_token_ids};
    const int size = std::min(tokenizer.vocab_size(), out.size);
    for (text::TokenId id = 0; id < size; ++id) {
      out.bytes.emplace_back(tokenizer.is_special(id) ? std::string_view() : tokenizer.token_bytes(id));
    }
    return out;
  }

  /// Null for a text that is free.
  std::shared_ptr<const grammar::Grammar> grammar(const SamplingParams& p) {
    if (p.format.is_free()) return nullptr;
    return formats.compile(p.format);
  }

  // Words begin with a space in the middle of a text, and without one at the beginning of a line.
  void add_bad_word(const std::string& word, std::vector<std::vector<std::int32_t>>& runs) const {
    if (word.empty()) return;  // refused below
    runs.push_back(encode(word, /*add_special_tokens=*/false, /*allow_special=*/false));
    if (!word.starts_with(' ')) {
      runs.push_back(encode(' ' + word, /*add_special_tokens=*/false, /*allow_special=*/false));
    }
  }

  // The request as tokens, checked.
  Request tokenized(Request request) const {
    Request out;
    out.prompt_token_ids = prompt_tokens(request);
    out.sampling = std::move(request.sampling);
    out.bootstrap = std::move(request.bootstrap);
    out.data_parallel_rank = request.data_parallel_rank;
    for (const std::string& word : out.sampling.bad_words) add_bad_word(word, out.sampling.bad_token_ids);
    core.check(out);
    return out;
  }

  bool runs_itself() const {
    const std::lock_guard lock(thread_mutex);
    return thread.joinable();
  }

  text::Tokenizer tokenizer;
  std::optional<text::ChatTemplate> chat_template;
  text::ToolConvention tool_convention;
  std::string why_no_chat;
  SamplingParams default_sampling;
  std::vector<std::int32_t> eos_token_ids;
  engine::EngineCore core;
  grammar::Compiler formats;
  mutable std::mutex thread_mutex;
  std::jthread thread;
};

Engine::Engine(const std::filesystem::path& model_directory, const EngineOptions& options)
    : impl_((check_kv_tiers(options.kv_tiers, options.kv_shared), check_transfer(options.transfer),
             std::make_unique<Impl>(model_directory, options))) {}

Engine::~Engine() { stop(); }

void check_kv_tiers(std::span<const std::string> kv_tiers, const std::string& kv_shared) {
  kv::check_tiers(kv_tiers, !kv_shared.empty());
}

RequestId Engine::submit(Request request, EventHandler on_event) {
  Request tokens = impl_->tokenized(std::move(request));
  std::shared_ptr<const grammar::Grammar> grammar = impl_->grammar(tokens.sampling);
  return impl_->core.submit(std::move(tokens), std::move(on_event), /*bounded=*/true, std::move(grammar));
}

void Engine::cancel(RequestId id) { impl_->core.cancel(id); }
void Engine::cancel(RequestId id, int continuation) { impl_->core.cancel(id, continuation); }

bool Engine::step() { return impl_->core.step(); }

void Engine::start() {
  const std::lock_guard lock(impl_->thread_mutex);
  if (impl_->thread.joinable()) return;
  impl_->thread = std::jthread([core = &impl_->core](const std::stop_token& stop) {
    pthread_setname_np(pthread_self(), "engine");  // its OpenMP threads inherit the name
    while (core->wait_for_work(stop)) core->step();
  });
}

void Engine::stop() {
  std::jthread thread;
  {
    const std::lock_guard lock(impl_->thread_mutex);
    thread = std::move(impl_->thread);
  }
  if (thread.joinable()) {
    thread.request_stop();
    thread.join();
  }
  impl_->core.cancel_all();
}

std::vector<Completion> Engine::generate(std::span<const Request> requests, const EventHandler& on_event,
                                         const std::function<bool()>& keep_going) {
  // All are checked before any starts.
  std::vector<Request> tokenized;
  std::vector<std::shared_ptr<const grammar::Grammar>> grammars;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    try {
      tokenized.push_back(impl_->tokenized(requests[i]));
      generate_all(tokenized.back().sampling);
      grammars.push_back(impl_->grammar(tokenized.back().sampling));
    } catch (const InvalidArgument& e) {
      if (requests.size() == 1) throw;
      throw InvalidArgument(fmt::format("request {}: {}", i, e.what()));
    }
  }
  if (tokenized.empty()) return {};
  std::vector<RequestId> ids;
  const auto collector = std::make_shared<Collector>(tokenized, on_event);
  for (std::size_t i = 0; i < tokenized.size(); ++i) {
    const auto take = [collector, i](const GenerationEvent& e) { collector->take(i, e); };
    ids.push_back(
        impl_->core.submit(std::move(tokenized[i]), take, /*bounded=*/false, std::move(grammars[i])));
  }
  while (!collector->done()) {
    if (keep_going && !ids.empty() && !keep_going()) {
      for (const RequestId id : ids) impl_->core.cancel(id);
      ids.clear();  // asked no more
    }
    if (impl_->runs_itself() || !impl_->core.step()) collector->wait_a_moment();
  }
  std::vector<Completion> completions = collector->result();
  for (std::size_t i = 0; i < completions.size(); ++i) keep_best(completions[i], requests[i].sampling);
  return completions;
}

std::vector<Completion> Engine::generate(std::span<const std::string> prompts, const SamplingParams& params) {
  std::vector<Request> requests(prompts.size());
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    requests[i].prompt = prompts[i];
    requests[i].sampling = params;
  }
  return generate(requests);
}

std::vector<std::int32_t> Engine::prompt_token_ids(Request request) const {
  return impl_->tokenized(std::move(request)).prompt_token_ids;
}

void Engine::prepare(const TextFormat& format) const {
  if (!format.is_free()) impl_->formats.compile(format);
}

std::vector<std::int32_t> Engine::tokenize(std::string_view text, bool add_special_tokens,
                                           bool allow_special) const {
  return impl_->encode(text, add_special_tokens, allow_special);
}

std::string Engine::detokenize(std::span<const std::int32_t> ids, bool skip_special) const {
  return impl_->tokenizer.decode(ids, skip_special);
}

std::string Engine::token_bytes(std::int32_t id) const {
  return std::string(impl_->tokenizer.token_bytes(id));
}

bool Engine::is_special_token(std::int32_t id) const { return impl_->tokenizer.is_special(id); }

std::vector<TextPart> Engine::apply_chat_template(const Request& request) const {
  return impl_->chat_prompt(request);
}
ToolFormat Engine::tool_format() const { return impl_->tool_convention.format; }
std::int32_t Engine::token_id(std::string_view spelling) const {
  return impl_->tokenizer.token_to_id(spelling);
}

bool Engine::chat_template_reads(std::string_view variable) const {
  return impl_->chat_template && impl_->chat_template->reads(variable);
}

std::string Engine::chat_template_origin() const {
  return impl_->chat_template ? impl_->chat_template->origin() : "";
}
std::string Engine::why_no_chat() const { return impl_->why_no_chat; }
SamplingParams Engine::default_sampling() const { return impl_->default_sampling; }

EngineStats Engine::stats() const { return impl_->core.stats(); }
EngineLoad Engine::load() const { return impl_->core.load(); }
std::vector<EngineLoad> Engine::rank_loads() const { return impl_->core.rank_loads(); }
std::vector<CacheEvent> Engine::take_cache_events() { return impl_->core.take_cache_events(); }
std::vector<ExpertCounts> Engine::expert_counts() const { return impl_->core.expert_counts(); }
std::vector<StepRecord> Engine::timeline() const { return impl_->core.timeline(); }
std::string Engine::chrome_trace() const { return engine::chrome_trace(impl_->core.timeline()); }
std::int32_t Engine::vocab_size() const { return impl_->core.vocab_size(); }
std::int64_t Engine::max_length() const { return impl_->core.max_length(); }
const EngineOptions& Engine::options() const { return impl_->core.options(); }

}  // namespace flash_mla
