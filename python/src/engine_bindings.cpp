#include "engine_bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unordered_map.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <tuple>

#include "flash_mla/engine.h"
#include "flash_mla/error.h"
#include "serving_bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

using Device = EngineOptions::Device;
using Precision = EngineOptions::Precision;
using Quantize = EngineOptions::Quantize;
using LoadFormat = EngineOptions::LoadFormat;
using Speculative = EngineOptions::Speculative;

Device device_named(const std::string& name) {
  if (name == "auto") return Device::kAuto;
  if (name == "cpu") return Device::kCpu;
  if (name == "cuda") return Device::kCuda;
  throw InvalidArgument("device is \"" + name + "\", expected auto, cpu or cuda");
}

Precision precision_named(const std::string& name) {
  if (name == "auto") return Precision::kAuto;
  if (name == "float32") return Precision::kFloat32;
  if (name == "bfloat16") return Precision::kBFloat16;
  throw InvalidArgument("precision is \"" + name + "\", expected auto, float32 or bfloat16");
}

Quantize quantize_named(const std::string& name) {
  if (name == "none") return Quantize::kNone;
  if (name == "int8") return Quantize::kInt8;
  if (name == "fp8") return Quantize::kFp8;
  if (name == "w4a8") return Quantize::kW4A8;
  throw InvalidArgument("quantize is \"" + name + "\", expected none, int8, fp8 or w4a8");
}

EngineOptions::KvCache kv_cache_named(const std::string& name) {
  using KvCache = EngineOptions::KvCache;
  if (name == "auto") return KvCache::kAuto;
  if (name == "bfloat16") return KvCache::kBFloat16;
  if (name == "float16") return KvCache::kFloat16;
  if (name == "fp8") return KvCache::kFp8;
  throw InvalidArgument("kv_cache is \"" + name + "\", expected auto, bfloat16, float16 or fp8");
}

LoadFormat load_format_named(const std::string& name) {
  if (name == "auto") return LoadFormat::kAuto;
  if (name == "dummy") return LoadFormat::kDummy;
  throw InvalidArgument("load_format is \"" + name + "\", expected auto or dummy");
}

Speculative speculative_named(const std::string& name) {
  if (name == "off") return Speculative::kOff;
  if (name == "ngram") return Speculative::kNgram;
  if (name == "auto") return Speculative::kAuto;
  if (name == "mtp") return Speculative::kMtp;
  throw InvalidArgument("speculative is \"" + name + "\", expected off, ngram, auto or mtp");
}

nb::dict to_python(const Completion& completion) {
  nb::list choices;
  for (const Completion::Choice& c : completion.choices) {
    nb::dict choice;
    choice["text"] = c.text;
    choice["token_ids"] = c.token_ids;
    choice["logprobs"] = logprobs_of(c.logprobs);
    choice["finish_reason"] = finish_reason_name(c.finish);
    choice["error"] = c.error;
    choices.append(choice);
  }
  nb::dict out;
  out["choices"] = choices;
  out["prompt_logprobs"] = logprobs_of(completion.prompt_logprobs);
  out["prompt_tokens"] = completion.usage.prompt_tokens;
  out["cached_tokens"] = completion.usage.cached_tokens;
  out["completion_tokens"] = completion.usage.completion_tokens;
  return out;
}

// `progress(finished continuations, generated tokens)` is called between steps; so is the interpreter's check
// for Ctrl-C. Whatever either raises ends the requests and is raised again here.
nb::list generate(Engine& engine, const std::vector<Request>& requests, const nb::object& progress) {
  std::int64_t finished = 0, tokens = 0;
  const EventHandler count = [&](const GenerationEvent& e) {
    finished += e.finish != FinishReason::kNone;
    tokens += std::ssize(e.token_ids);
  };
  std::unique_ptr<nb::python_error> kept;  // a Python error that must be raised again
  const auto keep_going = [&] {
    const nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) {
      kept = std::make_unique<nb::python_error>();
    } else if (!progress.is_none()) {
      try {
        progress(finished, tokens);
      } catch (nb::python_error& e) {
        kept = std::make_unique<nb::python_error>(e);
      }
    }
    return kept == nullptr;
  };
  std::vector<Completion> completions;
  {
    const nb::gil_scoped_release release;
    completions = engine.generate(requests, count, keep_going);
  }
  if (kept) throw nb::python_error(*kept);
  nb::list out;
  for (const Completion& c : completions) out.append(to_python(c));
  return out;
}

nb::dict to_python(const DraftStats& s) {
  nb::dict d;
  d["steps"] = s.steps;
  d["drafted"] = s.drafted;
  d["accepted"] = s.accepted;
  d["tokens"] = s.tokens;
  return d;
}

nb::dict to_python(const KvTierStats& s) {
  nb::dict d;
  d["name"] = s.name;
  d["tokens_looked_up"] = s.tokens_looked_up;
  d["tokens_found"] = s.tokens_found;
  d["tokens_loaded"] = s.tokens_loaded;
  d["tokens_stored"] = s.tokens_stored;
  d["tokens_dropped"] = s.tokens_dropped;
  d["bytes_loaded"] = s.bytes_loaded;
  d["bytes_stored"] = s.bytes_stored;
  d["look_up_seconds"] = s.look_up_seconds;
  d["load_seconds"] = s.load_seconds;
  d["store_seconds"] = s.store_seconds;
  d["failures"] = s.failures;
  return d;
}

nb::dict to_python(const EngineStats& s) {
  const auto mean = [](const Histogram& h) {
    return h.total == 0 ? 0 : h.sum / static_cast<double>(h.total);
  };
  nb::dict d;
  d["requests_submitted"] = s.requests_submitted;
  d["finished_stop"] = s.finished_stop;
  d["finished_length"] = s.finished_length;
  d["cancelled"] = s.cancelled;
  d["failed"] = s.failed;
  d["running"] = s.running;
  d["waiting"] = s.waiting;
  d["pages_total"] = s.pages_total;
  d["pages_used"] = s.pages_used;
  d["pages_cached"] = s.pages_cached;
  d["bytes_per_page"] = s.bytes_per_page;
  d["prompt_tokens"] = s.prompt_tokens;
  d["computed_tokens"] = s.computed_tokens;
  d["generated_tokens"] = s.generated_tokens;
  d["prefix_tokens_looked_up"] = s.prefix_tokens_looked_up;
  d["prefix_tokens_hit"] = s.prefix_tokens_hit;
  d["preemptions"] = s.preemptions;
  nb::list ranks;
  for (const RankStats& rank : s.ranks) {
    nb::dict of;
    of["seconds"] = rank.seconds;
    of["exchanges"] = rank.exchanges;
    of["bytes_sent"] = rank.bytes_sent;
    of["exchange_seconds"] = rank.exchange_seconds;
    if (rank.pages_total > 0) {  // it has requests of its own
      of["running"] = rank.running;
      of["waiting"] = rank.waiting;
      of["pages_total"] = rank.pages_total;
      of["pages_used"] = rank.pages_used;
      of["pages_cached"] = rank.pages_cached;
      of["computed_tokens"] = rank.computed_tokens;
      of["prefix_tokens_hit"] = rank.prefix_tokens_hit;
      of["preemptions"] = rank.preemptions;
    }
    ranks.append(of);
  }
  d["ranks"] = ranks;
  nb::list experts;
  for (const ExpertCounts& layer : s.experts) {
    nb::dict of;
    of["layer"] = layer.layer;
    of["counts"] = layer.counts;
    of["rank_counts"] = layer.rank_counts;
    experts.append(of);
  }
  d["experts"] = experts;
  d["ngram_drafts"] = to_python(s.ngram_drafts);
  d["mtp_drafts"] = to_python(s.mtp_drafts);
  nb::list tiers;
  for (const KvTierStats& tier : s.kv_tiers) tiers.append(to_python(tier));
  d["kv_tiers"] = tiers;
  d["transfer"] = transfer_of(s.transfer);
  d["steps"] = s.steps;
  d["step_seconds"] = s.step_seconds;
  d["ttft_seconds_mean"] = mean(s.ttft_seconds);
  d["tpot_seconds_mean"] = mean(s.tpot_seconds);
  return d;
}

std::vector<LogitBias> logit_bias(const std::unordered_map<std::int32_t, double>& by_token) {
  std::vector<LogitBias> out;
  for (const auto& [token, bias] : by_token) out.push_back({token, bias});
  return out;
}

// At most one of them.
TextFormat text_format(const nb::object& json_schema, bool json_object, const std::string& regex,
                       std::vector<std::string> choice, const std::string& grammar) {
  using Kind = TextFormat::Kind;
  const int given =
      !json_schema.is_none() + json_object + !regex.empty() + !choice.empty() + !grammar.empty();
  if (given > 1) {
    throw InvalidArgument(
        "json_schema, json_object, regex, choice and grammar: more than one is given, expected one");
  }
  if (json_object) return {Kind::kJsonObject, {}, {}};
  if (!regex.empty()) return {Kind::kRegex, regex, {}};
  if (!choice.empty()) return {Kind::kChoice, {}, std::move(choice)};
  if (!grammar.empty()) return {Kind::kGrammar, grammar, {}};
  if (json_schema.is_none()) return {};
  if (nb::isinstance<nb::str>(json_schema))
    return {Kind::kJsonSchema, nb::cast<std::string>(json_schema), {}};
  const nb::object text = nb::module_::import_("json").attr("dumps")(json_schema);
  return {Kind::kJsonSchema, nb::cast<std::string>(text), {}};
}

void bind_sampling_params(nb::module_& m) {
  const SamplingParams d;
  nb::class_<SamplingParams>(m, "SamplingParams")
      .def(
          "__init__",
          [](SamplingParams* self, int max_tokens, int n, double temperature, double top_p, int top_k,
             double min_p, double repetition_penalty, double frequency_penalty, double presence_penalty,
             std::optional<std::uint64_t> seed, std::vector<std::string> stop, bool include_stop,
             std::vector<std::int32_t> stop_token_ids, bool ignore_eos, int logprobs, int prompt_logprobs,
             const std::unordered_map<std::int32_t, double>& bias,
             std::vector<std::int32_t> allowed_token_ids, int min_tokens, std::vector<std::string> bad_words,
             int best_of, const nb::object& json_schema, bool json_object, const std::string& regex,
             std::vector<std::string> choice, const std::string& grammar) {
            SamplingParams p;
            p.max_tokens = max_tokens;
            p.n = n;
            p.temperature = temperature;
            p.top_p = top_p;
            p.top_k = top_k;
            p.min_p = min_p;
            p.repetition_penalty = repetition_penalty;
            p.frequency_penalty = frequency_penalty;
            p.presence_penalty = presence_penalty;
            p.seed = seed;
            p.stop = std::move(stop);
            p.include_stop = include_stop;
            p.stop_token_ids = std::move(stop_token_ids);
            p.ignore_eos = ignore_eos;
            p.logprobs = logprobs;
            p.prompt_logprobs = prompt_logprobs;
            p.logit_bias = logit_bias(bias);
            p.allowed_token_ids = std::move(allowed_token_ids);
            p.min_tokens = min_tokens;
            p.bad_words = std::move(bad_words);
            p.best_of = best_of;
            p.format = text_format(json_schema, json_object, regex, std::move(choice), grammar);
            validate(p);
            new (self) SamplingParams(std::move(p));
          },
          nb::kw_only(), "max_tokens"_a = d.max_tokens, "n"_a = d.n, "temperature"_a = d.temperature,
          "top_p"_a = d.top_p, "top_k"_a = d.top_k, "min_p"_a = d.min_p,
          "repetition_penalty"_a = d.repetition_penalty, "frequency_penalty"_a = d.frequency_penalty,
          "presence_penalty"_a = d.presence_penalty, "seed"_a = nb::none(),
          "stop"_a = std::vector<std::string>(), "include_stop"_a = d.include_stop,
          "stop_token_ids"_a = std::vector<std::int32_t>(), "ignore_eos"_a = d.ignore_eos,
          "logprobs"_a = d.logprobs, "prompt_logprobs"_a = d.prompt_logprobs,
          "logit_bias"_a = std::unordered_map<std::int32_t, double>(),
          "allowed_token_ids"_a = std::vector<std::int32_t>(), "min_tokens"_a = d.min_tokens,
          "bad_words"_a = std::vector<std::string>(), "best_of"_a = d.best_of, "json_schema"_a = nb::none(),
          "json_object"_a = false, "regex"_a = "", "choice"_a = std::vector<std::string>(), "grammar"_a = "",
          "How a request's tokens are chosen. Penalties act on the logits, then temperature (0: always the\n"
          "likeliest token), min_p, top_k and top_p filter, and one token is drawn from what is left.\n"
          "logprobs: -1 for none, k for those of every token and of the k likeliest; prompt_logprobs the\n"
          "same of the prompt's tokens. logit_bias: {token: value} added to logits, -100 to 100.\n"
          "allowed_token_ids: no others. min_tokens: no end before that many. bad_words do not come up.\n"
          "best_of: so many continuations are made, of which the n with the largest mean log-probability\n"
          "are returned. json_schema (a dict, or its text), json_object, regex, choice, grammar (EBNF): what the\n"
          "text must be, one of them at most. Raises ValueError naming the field for a value out of range.")
      .def_rw("max_tokens", &SamplingParams::max_tokens)
      .def_rw("n", &SamplingParams::n)
      .def_rw("temperature", &SamplingParams::temperature)
      .def_rw("top_p", &SamplingParams::top_p)
      .def_rw("top_k", &SamplingParams::top_k)
      .def_rw("min_p", &SamplingParams::min_p)
      .def_rw("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_rw("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_rw("presence_penalty", &SamplingParams::presence_penalty)
      .def_rw("seed", &SamplingParams::seed)
      .def_rw("stop", &SamplingParams::stop)
      .def_rw("include_stop", &SamplingParams::include_stop)
      .def_rw("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_rw("ignore_eos", &SamplingParams::ignore_eos)
      .def_rw("logprobs", &SamplingParams::logprobs)
      .def_rw("prompt_logprobs", &SamplingParams::prompt_logprobs)
      .def_prop_rw(
          "logit_bias",
          [](const SamplingParams& p) {
            std::unordered_map<std::int32_t, double> out;
            for (const auto& [token, bias] : p.logit_bias) out.emplace(token, bias);
            return out;
          },
          [](SamplingParams& p, const std::unordered_map<std::int32_t, double>& bias) {
            p.logit_bias = logit_bias(bias);
          })
      .def_rw("allowed_token_ids", &SamplingParams::allowed_token_ids)
      .def_rw("min_tokens", &SamplingParams::min_tokens)
      .def_rw("bad_words", &SamplingParams::bad_words)
      .def_rw("best_of", &SamplingParams::best_of);
}

}  // namespace

nb::list logprobs_of(const std::vector<TokenLogprobs>& logprobs) {
  nb::list out;
  for (const TokenLogprobs& l : logprobs) {
    nb::dict top;
    for (const TokenLogprob& t : l.top) top[nb::int_(t.token)] = t.logprob;
    nb::dict one;
    one["token"] = l.chosen.token;
    one["logprob"] = l.rank == 0 ? nb::object(nb::none()) : nb::object(nb::float_(l.chosen.logprob));
    one["rank"] = l.rank;
    one["top"] = top;
    out.append(one);
  }
  return out;
}

void bind_engine(nb::module_& m) {
  bind_sampling_params(m);
  bind_serving(m);
  nb::class_<Request>(m, "Request")
      .def(
          "__init__",
          [](Request* self, std::string prompt, std::vector<std::int32_t> prompt_token_ids,
             const std::vector<std::pair<std::string, std::string>>& messages, const SamplingParams& sampling,
             std::string suffix, bool continue_final_message, std::string chat_variables,
             const std::optional<std::tuple<std::string, int, std::int64_t>>& bootstrap,
             std::optional<int> data_parallel_rank) {
            Request r;
            r.data_parallel_rank = data_parallel_rank;
            if (bootstrap) {
              const auto& [host, port, room] = *bootstrap;
              r.bootstrap = BootstrapRoom{host, port, room};
            }
            r.chat_variables = std::move(chat_variables);
            r.prompt = std::move(prompt);
            r.suffix = std::move(suffix);
            r.continue_final_message = continue_final_message;
            r.prompt_token_ids = std::move(prompt_token_ids);
            for (const auto& [role, content] : messages) r.messages.push_back({role, content});
            r.sampling = sampling;
            new (self) Request(std::move(r));
          },
          nb::kw_only(), "prompt"_a = "", "prompt_token_ids"_a = std::vector<std::int32_t>(),
          "messages"_a = std::vector<std::pair<std::string, std::string>>(), "sampling"_a, "suffix"_a = "",
          "continue_final_message"_a = false, "chat_variables"_a = "", "bootstrap"_a = nb::none(),
          "data_parallel_rank"_a = nb::none());
  nb::class_<Engine> engine(m, "Engine");
  engine
      .def(
          "__init__",
          [](Engine* self, const std::string& directory, const std::string& device,
             const std::string& precision, const std::string& quantize, const std::string& kv_cache,
             const std::string& load_format, std::int64_t max_model_len, int num_pages,
             std::size_t memory_bytes, int max_batch_size, int max_tokens_per_step, bool prefix_cache,
             bool batch_invariant, bool overlap_steps, int num_threads, bool generation_config,
             const std::string& chat_template, const std::string& speculative, int draft_tokens, int tp,
             const std::vector<int>& devices, int dp, int ep, const std::string& expert_placement,
             const std::vector<std::string>& kv_tiers, double kv_tier_wait_seconds, bool cache_events,
             const TransferOptions& transfer) {
            EngineOptions o;
            o.generation_config = generation_config;
            o.chat_template = chat_template;
            o.device = device_named(device);
            o.precision = precision_named(precision);
            o.quantize = quantize_named(quantize);
            o.kv_cache = kv_cache_named(kv_cache);
            o.load_format = load_format_named(load_format);
            o.max_model_len = max_model_len;
            o.num_pages = num_pages;
            o.memory_bytes = memory_bytes;
            o.max_batch_size = max_batch_size;
            o.max_tokens_per_step = max_tokens_per_step;
            o.prefix_cache = prefix_cache;
            o.batch_invariant = batch_invariant;
            o.overlap_steps = overlap_steps;
            o.num_threads = num_threads;
            o.speculative = speculative_named(speculative);
            o.draft_tokens = draft_tokens;
            o.tp = tp;
            o.devices = devices;
            o.dp = dp;
            o.ep = ep;
            o.expert_placement = expert_placement;
            o.kv_tiers = kv_tiers;
            o.kv_tier_wait_seconds = kv_tier_wait_seconds;
            o.cache_events = cache_events;
            o.transfer = transfer;
            const nb::gil_scoped_release release;
            new (self) Engine(directory, o);
          },
          "directory"_a, nb::kw_only(), "device"_a, "precision"_a, "quantize"_a, "kv_cache"_a,
          "load_format"_a, "max_model_len"_a, "num_pages"_a, "memory_bytes"_a, "max_batch_size"_a,
          "max_tokens_per_step"_a, "prefix_cache"_a, "batch_invariant"_a, "overlap_steps"_a, "num_threads"_a,
          "generation_config"_a, "chat_template"_a, "speculative"_a, "draft_tokens"_a, "tp"_a, "devices"_a,
          "dp"_a, "ep"_a, "expert_placement"_a, "kv_tiers"_a, "kv_tier_wait_seconds"_a, "cache_events"_a,
          "transfer"_a)
      .def("generate", &generate, "requests"_a, "progress"_a.none())
      .def("tokenize", &Engine::tokenize, "text"_a, "add_special_tokens"_a, "allow_special"_a = true)
      .def(
          "detokenize",
          [](const Engine& e, const std::vector<std::int32_t>& ids) { return e.detokenize(ids); }, "ids"_a)
      .def("default_sampling", &Engine::default_sampling)
      .def("chat_template_origin", &Engine::chat_template_origin)
      .def("stats", [](const Engine& e) { return to_python(e.stats()); })
      .def("chrome_trace", &Engine::chrome_trace)
      .def_prop_ro("max_length", &Engine::max_length);
  bind_serving(engine);
}

}  // namespace flash_mla::python
