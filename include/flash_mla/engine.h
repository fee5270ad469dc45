#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "flash_mla/cache_events.h"
#include "flash_mla/chat.h"
#include "flash_mla/expert_counts.h"
#include "flash_mla/model_options.h"
#include "flash_mla/text_format.h"
#include "flash_mla/transfer_options.h"

namespace flash_mla {

/// Added to a token's logit.
struct LogitBias {
  std::int32_t token = -1;
  double bias = 0;  ///< in [-100, 100]
};

/// How a request's tokens are chosen. Order: tokens that are excluded (allowed_token_ids, bad_words,
/// min_tokens) and logit_bias; repetition, frequency and presence penalties on the logits; temperature;
/// min_p; top_k; top_p; one draw from what is left, renormalised after each filter.
struct SamplingParams {
  int max_tokens = 256;      ///< tokens to generate at most, >= 0; 0 is for prompt_logprobs alone
  int n = 1;                 ///< continuations of the prompt, >= 1
  double temperature = 1.0;  ///< >= 0; 0 takes the likeliest token (the smallest id among equals)
  double top_p = 1.0;        ///< in (0, 1]: the likeliest tokens that together reach it
  int top_k = 0;             ///< >= 0: that many likeliest tokens; 0 is all
  double min_p = 0.0;        ///< in [0, 1): tokens at least that share of the likeliest one's probability
  /// 0.01 to 100: logits of tokens in prompt or continuation are divided by it if positive, else multiplied.
  double repetition_penalty = 1.0;
  double frequency_penalty = 0.0;  ///< in [-2, 2]: subtracted per occurrence in the continuation
  double presence_penalty = 0.0;   ///< in [-2, 2]: subtracted once for tokens in the continuation
  /// The same seed gives the same tokens, whatever else runs, as far as the model gives the same logits (see
  /// EngineOptions::batch_invariant). Without: a fresh one per request.
  std::optional<std::uint64_t> seed;
  std::vector<std::string> stop;  ///< texts that end the continuation; not part of it unless include_stop
  bool include_stop = false;
  std::vector<std::int32_t> stop_token_ids;  ///< tokens that end it, like the model's own end of sentence
  bool ignore_eos = false;                   ///< go on after the model's end of sentence
  /// -1: none. k >= 0: the log-probability of every token and of the k likeliest. They are the model's own,
  /// of its logits before penalties, temperature and filters.
  int logprobs = -1;
  /// The same of the prompt's tokens: all of them go through the model, whatever the prefix cache has, up to
  /// kMaxScoredTokens of all such prompts in a step.
  int prompt_logprobs = -1;
  std::vector<LogitBias> logit_bias;
  std::vector<std::int32_t> allowed_token_ids;  ///< no others; empty: all. The end needs its token among them
  int min_tokens = 0;  ///< <= max_tokens: before that many no end of sentence, stop token or stop string
  /// Texts that do not come up in the tokens that the tokenizer makes of them, alone or behind a space.
  std::vector<std::string> bad_words;
  /// Runs of tokens that do not come up.
  std::vector<std::vector<std::int32_t>> bad_token_ids;
  /// Continuations to generate, of which Engine::generate keeps the n with the largest mean log-probability;
  /// 0 is n.
  int best_of = 0;
  /// Excludes tokens as allowed_token_ids does; a format's end ends the text, with ignore_eos too, and stop
  /// tokens come only where it may end. Not together with `stop`, which could cut it anywhere.
  TextFormat format;
};

/// Most alternatives that SamplingParams::logprobs may ask for.
inline constexpr int kMaxLogprobs = 20;
/// Tokens of prompts in a step whose log-probabilities are wanted, at most: each needs a row of logits.
inline constexpr int kMaxScoredTokens = 128;

/// Most tokens that EngineOptions::draft_tokens may ask for.
inline constexpr int kMaxDraftTokens = 15;

/// Throws InvalidArgument that names the field, its value and what was expected.
void validate(const SamplingParams& params);

struct TokenLogprob {
  std::int32_t token = -1;
  float logprob = 0;  ///< natural log
};

/// Of one token, generated or of a prompt.
struct TokenLogprobs {
  TokenLogprob chosen;
  std::int32_t rank = 0;  ///< of the chosen one among all: 1 is the likeliest; 0: it has no log-probability
  std::vector<TokenLogprob> top;  ///< likeliest first
};

/// A prompt and how to continue it. Exactly one of prompt, prompt_token_ids, prompt_parts and messages is given.
struct Request {
  std::string prompt;  ///< tokenized with the begin-of-sentence token in front
  std::vector<std::int32_t> prompt_token_ids;
  std::vector<TextPart> prompt_parts;  ///< one text, as apply_chat_template() makes it; nothing is added
  /// Put through the model's chat template. Special tokens that a content spells out are ordinary text.
  std::vector<ChatMessage> messages;
  /// What the chat template is to see besides the messages: a JSON object, such as {"thinking": true}. Empty:
  /// nothing. A name that the template does not look at is refused, unless its value is null, false or empty.
  std::string chat_variables;
  /// What follows the gap that is to be filled: `prompt` is what comes before it. For tokenizers that have
  /// tokens for it.
  std::string suffix;
  /// The last of `messages`, the assistant's, is not over: the answer goes on from it.
  bool continue_final_message = false;
  /// `messages` end with what begins an answer. Not with continue_final_message.
  bool add_generation_prompt = true;
  /// Of a request with messages, what the model may call: a JSON array in OpenAI's form. Empty: nothing.
  std::string tools;
  /// Special tokens that `prompt` spells out become those tokens. False for text of strangers: it cannot end
  /// the sentence or begin another speaker's turn then.
  bool allow_special = true;
  /// For engines with EngineOptions::transfer: where a prefill and a decode engine meet for the request.
  std::optional<BootstrapRoom> bootstrap;
  /// For a router that has chosen: which of the ranks with caches of their own (EngineOptions::dp) runs it. None: the one
  /// that is expected to come to its tokens first.
  std::optional<int> data_parallel_rank;
  SamplingParams sampling;
};

using RequestId = std::uint64_t;

enum class FinishReason {
  kNone,       ///< goes on
  kStop,       ///< end of sentence, a stop token or a stop string
  kLength,     ///< max_tokens, or the longest sequence that model and cache hold
  kCancelled,  ///< cancel(), or the engine was stopped
  kError,      ///< see GenerationEvent::error
};
/// "", "stop", "length", "cancelled", "error".
const char* finish_reason_name(FinishReason reason);

/// What a continuation that ended with FinishReason::kLength ran into.
enum class LengthLimit {
  kNone,       ///< it did not end so
  kMaxTokens,  ///< SamplingParams::max_tokens
  kModel,      ///< the positions that the model has
  kOption,     ///< EngineOptions::max_model_len
  kCache,  ///< the pages that the cache has (EngineOptions::num_pages, memory_bytes): fewer than the model
           ///< has positions for
};
/// "", "max_tokens", "model", "max_model_len", "cache".
const char* length_limit_name(LengthLimit limit);

struct Usage {
  std::int64_t prompt_tokens = 0;
  std::int64_t cached_tokens = 0;  ///< of the prompt, found in the prefix cache or loaded from a tier
  std::int64_t completion_tokens = 0;
};

/// News of one continuation. Text is whole UTF-8, and held back while it could still become a stop string; so
/// tokens and text of one event need not belong together, but all events together do.
struct GenerationEvent {
  RequestId request = 0;
  int index = 0;  ///< which of the n continuations
  std::string text;
  std::vector<std::int32_t> token_ids;
  std::vector<TokenLogprobs> logprobs;  ///< one per token id, if asked for
  /// In a continuation's first event, if asked for: one per token of the prompt. The first follows nothing
  /// and has none (rank 0).
  std::vector<TokenLogprobs> prompt_logprobs;
  FinishReason finish = FinishReason::kNone;
  LengthLimit limit = LengthLimit::kNone;  ///< with kLength
  std::string error;                       ///< with kError
  Usage usage;                             ///< of this continuation so far
  bool last = false;                       ///< nothing more comes of the request
};

/// Called from the thread that steps the engine, in order. Must not block, throw or call into the engine
/// except for submit and cancel.
using EventHandler = std::function<void(const GenerationEvent&)>;

struct EngineOptions {
  using Device = ModelDevice;
  using Precision = ModelPrecision;
  using Quantize = ModelQuantize;
  using KvCache = ModelKvCache;
  enum class LoadFormat { kAuto, kDummy };
  /// Where drafts come from: tokens that may follow, which the model checks in one step. kNgram: what came
  /// behind the last tokens when they occurred before, in prompt or continuation. kMtp: the model's own module
  /// for multi-token prediction; refused where it has none. kAuto: only as many drafts as have paid so far, of
  /// n-grams where there are any, else of the module where there is one.
  enum class Speculative { kOff, kNgram, kAuto, kMtp };
  Device device = Device::kAuto;
  Precision precision = Precision::kAuto;
  /// The form that weights are kept in. On a GPU, kNone alone.
  Quantize quantize = Quantize::kNone;
  /// Type of the cache's rows; kFp8 keeps 656 bytes for a token and layer instead of 1,152 in bfloat16.
  KvCache kv_cache = KvCache::kAuto;
  /// kAuto: the directory's safetensors. kDummy: random weights in the shape of its config.json, for load
  /// tests without a checkpoint; the tokenizer is still the directory's.
  LoadFormat load_format = LoadFormat::kAuto;
  /// A Jinja file that turns messages into prompts, instead of the model directory's own chat template.
  std::filesystem::path chat_template;
  /// Tokens of prompt and continuation together; 0: the positions that the model has, at most which it may be.
  std::int64_t max_model_len = 0;
  /// Engine::default_sampling is what the directory's generation_config.json says. False: SamplingParams' own
  /// defaults.
  bool generation_config = true;
  /// Called before the first layer is loaded and after every one, from the thread that makes the engine.
  std::function<void(const LoadProgress&)> on_load;
  /// How the model writes calls of tools, where the chat template's own way is not to count.
  std::optional<ToolFormat> tool_format;
  /// Pages of 64 tokens in the cache; 0: as many as fit into memory_bytes.
  int num_pages = 0;
  /// Of the cache. 0: what max_batch_size sequences of the model's longest length need, or if that is less
  /// 2 GiB on the CPU, nine tenths of the free memory of a GPU (seven with batch_invariant).
  std::size_t memory_bytes = 0;
  int max_batch_size = 128;        ///< sequences per step
  int max_tokens_per_step = 2048;  ///< >= max_batch_size; prompts are processed in chunks that fit
  int max_waiting = 0;  ///< requests that wait at most; 0: no bound. submit throws Overloaded past it
  bool prefix_cache = true;
  /// Engine::take_cache_events says what comes into the prefix cache and leaves it.
  bool cache_events = false;
  /// Places beyond the cache where pages are kept, in chunks of 256 tokens, for later requests, after a restart, or for
  /// other engines of the same model: "ram:SIZE" (host memory), "file:DIRECTORY,SIZE" and "lmcache://HOST:PORT" (LMCache's
  /// server on this machine, where this build has a client of it), asked in this order (docs/serving.md). What is found there is as if computed; what is not found in time is computed.
  std::vector<std::string> kv_tiers;
  /// How long a request waits for them at most, once to be told what they have and once for it. 0: as long as computing
  /// those tokens would take, by the prompts so far.
  double kv_tier_wait_seconds = 0;
  /// Not empty: chunks at an LMCache server are vLLM's, under this name of the model, and come from there and go there. Only
  /// for models whose pages are vLLM's in bfloat16: no indexer, no module for drafts, rotary pairs interleaved. Not with
  /// batch_invariant. Chunks then have no checksum.
  std::string kv_shared;
  /// Prefill and decode as two engines. Not together with kv_tiers yet.
  TransferOptions transfer;
  /// The same bits for a request whatever else is in the batch.
  bool batch_invariant = false;
  /// On a GPU the next step is queued while the current one runs, wherever nothing but more tokens of the
  /// same sequences can come next and the GPU chooses them (no penalties, no logprobs). Tokens are the same
  /// without.
  bool overlap_steps = true;
  /// A draft counts only if it is the very token that the model chooses there, drawn with that position's own
  /// random number; so a text is the same as without, as far as the model gives the same logits (see
  /// batch_invariant).
  Speculative speculative = Speculative::kOff;
  int draft_tokens = 3;  ///< drafts of a sequence and step, 1 to kMaxDraftTokens; with kAuto at most
  int num_threads = 0;   ///< CPU: 0 for as many as OpenMP would use; of all ranks together
  /// Ranks that share the model: attention, dense layers and the LM head are cut into `tp` parts, a divisor of its heads.
  /// On the CPU they are threads; on GPUs each has a GPU, or a stream of one (`devices`).
  int tp = 1;
  /// Of each rank of tp, the CUDA index of its GPU; the first is 0, and those with the same GPU are streams of it. Empty: GPUs 0
  /// to tp - 1.
  std::vector<int> devices;
  /// Ranks that share the experts alone: each has a cache, a scheduler and all other weights of its own, and runs some of
  /// the requests, in steps that all take together. num_pages, max_batch_size and max_tokens_per_step are each rank's, and
  /// memory_bytes all ranks' together. With tp above 1 each of them is a group of tp ranks that share its attention, dense
  /// layers and LM head; all tp * dp share the experts. On the CPU they are threads; on a GPU only 1 so far.
  int dp = 1;
  /// Parts that the experts are divided into, a divisor of tp * dp; 0: that many.
  int ep = 0;
  /// Which rank has which experts: "linear", "round-robin", or the path of a JSON file (docs/ranks.md).
  std::string expert_placement = "linear";
  /// Called once if no step can run any more, since a rank has failed: with its name and reason, by the thread that steps,
  /// when the requests of that step have ended with the error.
  std::function<void(const std::string& why)> on_broken;
};

/// Throws InvalidArgument unless each is a tier as EngineOptions::kv_tiers has them, one of them a server if there is
/// kv_shared, and Unsupported for one that this build has not: worth knowing before a model is loaded.
void check_kv_tiers(std::span<const std::string> kv_tiers, const std::string& kv_shared = {});

/// Too many requests wait already (EngineOptions::max_waiting).
class Overloaded : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Counts of values at most `bounds[i]`, and one more for the rest.
struct Histogram {
  std::vector<double> bounds;
  std::vector<std::int64_t> counts;  ///< (bounds.size() + 1), not cumulative
  double sum = 0;
  std::int64_t total = 0;

  void add(double value);
  /// Estimate of a quantile, q in [0, 1], linear within a bucket; 0 if nothing was counted.
  double quantile(double q) const;
};

/// What drafts of one source have brought.
struct DraftStats {
  std::int64_t steps = 0;     ///< of a sequence, with such drafts
  std::int64_t drafted = 0;   ///< drafts in them
  std::int64_t accepted = 0;  ///< of which the model chose the same token
  std::int64_t tokens = 0;  ///< that these steps gave: those accepted and one more, or fewer at a text's end
  double acceptance() const {
    return drafted == 0 ? 0 : static_cast<double>(accepted) / static_cast<double>(drafted);
  }
  double tokens_per_step() const {
    return steps == 0 ? 0 : static_cast<double>(tokens) / static_cast<double>(steps);
  }
};

/// What a tier beyond the cache has done (EngineOptions::kv_tiers).
struct KvTierStats {
  std::string name;                   ///< "ram", "file"
  std::int64_t tokens_looked_up = 0;  ///< of prompts, in whole chunks
  std::int64_t tokens_found = 0;      ///< of which it had
  std::int64_t tokens_loaded = 0;     ///< read, and the chunks good
  std::int64_t tokens_stored = 0;     ///< taken, or known already
  std::int64_t tokens_dropped = 0;    ///< not offered, since too much was on its way
  std::int64_t bytes_loaded = 0, bytes_stored = 0;
  double look_up_seconds = 0, load_seconds = 0, store_seconds = 0;  ///< in its calls
  std::int64_t failures = 0;  ///< calls that failed, chunks that were gone, torn or changed
};

/// Since the engine was made.
struct EngineStats {
  std::int64_t requests_submitted = 0;
  /// Continuations by how they ended.
  std::int64_t finished_stop = 0, finished_length = 0, cancelled = 0, failed = 0;
  int running = 0, waiting = 0;  ///< sequences now
  int max_batch_size = 0;
  int pages_total = 0;
  int pages_used = 0;    ///< now, by running sequences
  int pages_cached = 0;  ///< now, kept for prefix reuse, free to be taken
  std::size_t bytes_per_page = 0;
  double weight_bytes = 0;            ///< of the model's products, embedding and LM head, on all ranks
  std::int64_t prompt_tokens = 0;     ///< of submitted requests
  std::int64_t computed_tokens = 0;   ///< that went through the model, without drafts that were not accepted
  std::int64_t generated_tokens = 0;  ///< of continuations
  std::int64_t prefix_tokens_looked_up = 0, prefix_tokens_hit = 0;
  std::int64_t preemptions = 0, pages_evicted = 0, pages_copied = 0;
  DraftStats ngram_drafts, mtp_drafts;
  std::vector<KvTierStats> kv_tiers;
  TransferStats transfer;
  std::int64_t steps = 0;
  double step_seconds = 0;            ///< all steps together
  std::vector<RankStats> ranks;       ///< of a model that several share; else empty
  std::vector<ExpertCounts> experts;  ///< of every mixture layer; empty where Engine::expert_counts throws
  double seconds = 0;                 ///< since the engine was made
  /// Of the last step with a sequence in decoding: blocks of the decode schedule over what its workers could
  /// have done in the time of the busiest, in [0, 1].
  double schedule_utilisation = 0;
  Histogram ttft_seconds;  ///< submission to first token
  Histogram tpot_seconds;  ///< per token after the first, one value per continuation
  Histogram e2e_seconds;   ///< submission to the end of a continuation
};

/// How full an engine is, between two steps.
struct EngineLoad {
  int running = 0, waiting = 0;  ///< sequences
  int pages_used = 0;            ///< by running sequences
  int pages_cached = 0;          ///< kept for prefix reuse, free to be taken
  int pages_total = 0;
  std::int64_t prefix_tokens_looked_up = 0, prefix_tokens_hit = 0;  ///< since the engine was made
};

/// One step in the past; times in seconds since the engine was made. A step that was queued while the one
/// before it ran begins, planned, when the engine turns to it.
struct StepRecord {
  std::int64_t step = 0;
  int rank = 0;  ///< whose part of the step it is, 0 to EngineOptions::dp - 1
  double begin = 0, planned = 0, computed = 0, end = 0;  ///< plan, then model, then sampling and events
  int prefill_tokens = 0, decode_tokens = 0, sequences = 0;
  int waiting = 0, preempted = 0, pages_used = 0;
  /// What a rank's model did in it: one of those that share the model (EngineOptions::tp), or the rank itself.
  struct Rank {
    int rank = 0;                 ///< as in EngineStats::ranks
    double begin = 0, end = 0;    ///< of the model's step
    double exchange_seconds = 0;  ///< of it in exchanges with other ranks, the wait for them included
  };
  std::vector<Rank> ranks;  ///< of a model that several share; else empty
};

/// What generate() returns for one prompt.
struct Completion {
  struct Choice {
    std::string text;
    std::vector<std::int32_t> token_ids;
    std::vector<TokenLogprobs> logprobs;
    FinishReason finish = FinishReason::kNone;
    LengthLimit limit = LengthLimit::kNone;
    std::string error;
  };
  std::vector<Choice> choices;                 ///< n of them; with best_of the best first
  std::vector<TokenLogprobs> prompt_logprobs;  ///< as in GenerationEvent
  Usage usage;                                 ///< over all choices
};

/// Generation with continuous batching over a paged MLA cache: requests join and leave the batch at every
/// step, prompts are processed in chunks beside running sequences, equal prefixes are computed once.
///
/// All members may be called from any thread. Work is done by step(): call it yourself, or let start() do so
/// in a thread of the engine's own.
class Engine {
 public:
  /// Loads a Hugging Face model directory (config.json, safetensors unless EngineOptions::load_format says
  /// otherwise, tokenizer.json). Throws InvalidArgument, Unsupported, or OutOfMemory (a std::bad_alloc) where
  /// model or cache do not fit. A chat template of the directory that is missing or not understood only keeps
  /// requests from having messages: see why_no_chat.
  explicit Engine(const std::filesystem::path& model_directory, const EngineOptions& options = {});
  /// Stops; whatever still runs ends as cancelled.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Queues a request. Throws InvalidArgument naming the field (empty or too long prompt, token outside the
  /// vocabulary, sampling parameters out of range, best_of above n: events come before the best is known), Overloaded when the queue is full. Errors later on arrive
  /// as events and end this request alone.
  RequestId submit(Request request, EventHandler on_event);

  /// Ends a request at the next step with kCancelled; without effect if it has ended.
  void cancel(RequestId id);
  /// The same for one of its continuations (GenerationEvent::index); without effect before that one's first event.
  void cancel(RequestId id, int continuation);

  /// One step: joins, at most max_tokens_per_step tokens through the model, events. False if there was
  /// nothing to do. Not while the engine runs in its own thread.
  bool step();

  void start();  ///< steps in a thread of its own, from now on
  void stop();   ///< ends that thread after its step; everything waiting and running ends as cancelled

  /// Generates for all prompts and waits. Steps the engine itself unless start() was called. `on_event`, if
  /// given, sees every event as it comes. `keep_going` is asked between steps; once it says false the
  /// requests end as cancelled.
  std::vector<Completion> generate(std::span<const Request> requests, const EventHandler& on_event = {},
                                   const std::function<bool()>& keep_going = {});
  std::vector<Completion> generate(std::span<const std::string> prompts, const SamplingParams& params);

  /// The tokens of a request's prompt, which submit would begin with. Throws as submit.
  std::vector<std::int32_t> prompt_token_ids(Request request) const;

  /// Makes the grammar of a format ready, so that submit finds it: up to a second for the largest. Throws
  /// InvalidArgument or Unsupported, naming what is wrong with it, as submit does.
  void prepare(const TextFormat& format) const;

  /// `allow_special` as in Request.
  std::vector<std::int32_t> tokenize(std::string_view text, bool add_special_tokens = true,
                                     bool allow_special = true) const;
  /// The text of `ids`; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves special tokens out. Throws
  /// InvalidArgument for a negative token; one that the tokenizer lacks stands for no text.
  std::string detokenize(std::span<const std::int32_t> ids, bool skip_special = true) const;
  /// The bytes of one token, not necessarily whole UTF-8.
  std::string token_bytes(std::int32_t id) const;
  /// Whether texts leave it out (the end of sentence and its like).
  bool is_special_token(std::int32_t id) const;

  /// The prompt that the chat template makes of a request's messages, chat_variables and tools. Throws as submit.
  std::vector<TextPart> apply_chat_template(const Request& request) const;
  /// How calls of tools are written: EngineOptions::tool_format, or what the chat template writes for one; kNone
  /// if it writes none.
  ToolFormat tool_format() const;
  /// The token of this spelling in tokenizer.json ("</think>"), or -1.
  std::int32_t token_id(std::string_view spelling) const;

  /// Whether the chat template looks at a variable of this name ("thinking").
  bool chat_template_reads(std::string_view variable) const;
  /// Where the chat template came from: a file, or a file and its field; or which built-in format stands in for
  /// it, and why. Empty if there is none.
  std::string chat_template_origin() const;
  /// Why requests cannot have messages; empty if they can. It names files of this machine.
  std::string why_no_chat() const;
  /// SamplingParams' defaults, and what the model directory's generation_config.json says of them
  /// (EngineOptions::generation_config).
  SamplingParams default_sampling() const;

  EngineStats stats() const;
  /// Of stats() what changes from step to step, without the rest's price: for somebody who asks many times a second.
  EngineLoad load() const;
  /// Of each rank with a cache of its own (EngineOptions::dp). Requests that have none yet count in load() alone.
  std::vector<EngineLoad> rank_loads() const;
  /// What has come into the prefix cache, or left it, since the last call; in the order in which it happened, of each rank.
  /// Empty without EngineOptions::cache_events. If nobody calls it, it costs no more than two events of each page.
  std::vector<CacheEvent> take_cache_events();
  /// How often each expert of every mixture layer has been chosen since the engine was made. Throws Unsupported for a model
  /// without experts, and on a GPU, where nobody counts yet.
  std::vector<ExpertCounts> expert_counts() const;
  /// The latest steps, oldest first.
  std::vector<StepRecord> timeline() const;
  /// The same as Chrome trace events in JSON (chrome://tracing, Perfetto).
  std::string chrome_trace() const;

  std::int32_t vocab_size() const;  ///< tokens are 0 to that less one
  std::int64_t max_length() const;  ///< tokens of prompt and continuation together
  const EngineOptions& options() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flash_mla
