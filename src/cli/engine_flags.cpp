#include "cli/engine_flags.h"

#include <map>
#include <string>

namespace flash_mla::cli {

void add_engine_flags(CLI::App& app, EngineOptions& o) {
  using Device = EngineOptions::Device;
  using Precision = EngineOptions::Precision;
  static const std::map<std::string, Device> devices = {
      {"auto", Device::kAuto}, {"cpu", Device::kCpu}, {"cuda", Device::kCuda}};
  static const std::map<std::string, Precision> precisions = {
      {"auto", Precision::kAuto}, {"fp32", Precision::kFloat32}, {"bf16", Precision::kBFloat16}};
  using Quantize = EngineOptions::Quantize;
  static const std::map<std::string, Quantize> quantizations = {{"none", Quantize::kNone},
                                                                {"int8", Quantize::kInt8},
                                                                {"fp8", Quantize::kFp8},
                                                                {"w4a8", Quantize::kW4A8}};
  using KvCache = EngineOptions::KvCache;
  static const std::map<std::string, KvCache> kv_caches = {{"auto", KvCache::kAuto},
                                                           {"bf16", KvCache::kBFloat16},
                                                           {"fp16", KvCache::kFloat16},
                                                           {"fp8", KvCache::kFp8}};
  using LoadFormat = EngineOptions::LoadFormat;
  static const std::map<std::string, LoadFormat> load_formats = {{"auto", LoadFormat::kAuto},
                                                                 {"dummy", LoadFormat::kDummy}};
  using Speculative = EngineOptions::Speculative;
  static const std::map<std::string, Speculative> speculative = {{"off", Speculative::kOff},
                                                                 {"ngram", Speculative::kNgram},
                                                                 {"auto", Speculative::kAuto},
                                                                 {"mtp", Speculative::kMtp}};
  app.add_option_function<std::string>(
         "--device", [&o](const std::string& name) { o.device = devices.at(name); }, "auto, cpu or cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  app.add_option_function<std::string>(
         "--precision", [&o](const std::string& name) { o.precision = precisions.at(name); },
         "Of weights and cache: auto, fp32 or bf16")
      ->check(CLI::IsMember({"auto", "fp32", "bf16"}));
  app.add_option_function<std::string>(
         "--quantize", [&o](const std::string& name) { o.quantize = quantizations.at(name); },
         "Of the weights: none (as the checkpoint has them); fp8 with one scale per block of 128 x 128 (attention, "
         "experts); w4a8: experts in 4 bits; on the CPU int8 with one scale per output channel")
      ->check(CLI::IsMember({"none", "int8", "fp8", "w4a8"}));
  app.add_option_function<std::string>(
         "--kv-cache", [&o](const std::string& name) { o.kv_cache = kv_caches.at(name); },
         "Of the cache's rows: auto (as --precision), bf16, fp16 (CPU only), or fp8 with 656 bytes per token and "
         "layer (on a GPU for models with an indexer)")
      ->check(CLI::IsMember({"auto", "bf16", "fp16", "fp8"}));
  app.add_option_function<std::string>(
         "--load-format", [&o](const std::string& name) { o.load_format = load_formats.at(name); },
         "Of the weights: auto (safetensors), or dummy for random ones in the shape of config.json")
      ->check(CLI::IsMember({"auto", "dummy"}));
  app.add_option("--chat-template", o.chat_template,
                 "Jinja file that turns messages into prompts (default: the model directory's own)")
      ->check(CLI::ExistingFile);
  app.add_option("--max-model-len", o.max_model_len,
                 "Tokens of prompt and continuation together at most (0: the model's positions)")
      ->capture_default_str();
  app.add_option_function<std::string>(
         "--generation-config", [&o](const std::string& name) { o.generation_config = name == "auto"; },
         "Defaults of temperature and its like: auto (generation_config.json's) or none (1, all tokens)")
      ->check(CLI::IsMember({"auto", "none"}));
  app.add_option("--num-pages", o.num_pages, "Pages of 64 tokens in the cache (0: what --memory holds)")
      ->capture_default_str();
  app.add_option("--memory", o.memory_bytes,
                 "Bytes of the cache, e.g. 4GiB (default: as useful, at most 2 GiB or 90% of a GPU's free "
                 "memory, 70% "
                 "with --batch-invariant)")
      ->transform(CLI::AsSizeValue(false));
  app.add_option("--max-batch-size", o.max_batch_size, "Sequences per step")->capture_default_str();
  app.add_option("--max-tokens-per-step", o.max_tokens_per_step,
                 "Tokens per step; longer prompts are processed in chunks")
      ->capture_default_str();
  app.add_flag("!--no-prefix-cache", o.prefix_cache, "Compute equal prefixes every time");
  app.add_option(
         "--kv-tier", o.kv_tiers,
         "Where pages are kept beyond the cache: ram:SIZE, file:DIRECTORY,SIZE, as in file:/var/cache/kv,64GiB, or "
         "lmcache://HOST:PORT; may be given several times, the fastest first")
      ->allow_extra_args(false);
  app.add_option("--kv-shared", o.kv_shared,
                 "The model's name at vLLM, with which the LMCache server's chunks are shared");
  app.add_option("--kv-tier-wait", o.kv_tier_wait_seconds,
                 "Seconds that a request waits for a tier at most (0: as long as computing would take)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_flag("--batch-invariant", o.batch_invariant, "The same bits whatever else is in the batch");
  app.add_flag("!--no-overlap", o.overlap_steps,
               "CUDA: wait for every step's tokens before the next is queued");
  app.add_option_function<std::string>(
         "--speculative", [&o](const std::string& name) { o.speculative = speculative.at(name); },
         "Drafts that a step checks, with the same text: off, ngram (what came behind the last tokens before), "
         "mtp (the model's module for multi-token prediction) or auto (as many as pay)")
      ->check(CLI::IsMember({"off", "ngram", "auto", "mtp"}));
  app.add_option("--draft-tokens", o.draft_tokens,
                 "Drafts of a sequence and step, 1 to 15; with auto at most")
      ->capture_default_str();
  app.add_option("--tp", o.tp,
                 "Ranks that share the model, each with a part of every layer's weights; on the CPU threads")
      ->capture_default_str();
  app.add_option("--devices", o.devices,
                 "GPU of each rank of --tp, as in 0,0 for two streams of one (default: a GPU each)")
      ->delimiter(',');
  app.add_option(
         "--dp", o.dp,
         "Ranks that share the experts alone: each has a cache and runs some of the requests; with --tp each is a "
         "group of so many")
      ->capture_default_str();
  app.add_option("--ep", o.ep,
                 "Parts that the experts are divided into, a divisor of --tp times --dp (0: that many)")
      ->capture_default_str();
  app.add_option("--expert-placement", o.expert_placement,
                 "Which rank has which experts: linear, round-robin or a JSON file")
      ->capture_default_str();
  app.add_option("--threads", o.num_threads, "CPU threads (0: all)")->capture_default_str();
}

void add_sampling_flags(CLI::App& app, SamplingParams& p) {
  app.add_option("--max-tokens", p.max_tokens, "Tokens to generate at most")->capture_default_str();
  app.add_option("-n,--num-continuations", p.n, "Continuations per prompt")->capture_default_str();
  app.add_option("--temperature", p.temperature, "0: always the likeliest token")->capture_default_str();
  app.add_option("--top-p", p.top_p, "The likeliest tokens that together reach this probability")
      ->capture_default_str();
  app.add_option("--top-k", p.top_k, "That many likeliest tokens (0: all)")->capture_default_str();
  app.add_option("--min-p", p.min_p, "Tokens with at least this share of the likeliest one's probability")
      ->capture_default_str();
  app.add_option("--repetition-penalty", p.repetition_penalty, "Divides logits of tokens seen before")
      ->capture_default_str();
  app.add_option("--frequency-penalty", p.frequency_penalty, "Subtracted per earlier occurrence")
      ->capture_default_str();
  app.add_option("--presence-penalty", p.presence_penalty, "Subtracted once for tokens generated before")
      ->capture_default_str();
  app.add_option_function<std::uint64_t>(
      "--seed", [&p](std::uint64_t seed) { p.seed = seed; }, "The same seed gives the same text");
  app.add_option("--stop", p.stop, "Text that ends the continuation; may be given several times")
      ->allow_extra_args(false);
  app.add_flag("--ignore-eos", p.ignore_eos, "Go on after the model's end of sentence");
  app.add_option("--logprobs", p.logprobs, "With --json: log-probabilities of that many alternatives")
      ->capture_default_str();
}

void use_model_defaults(const CLI::App& app, const SamplingParams& defaults, SamplingParams& p) {
  const auto given = [&](const char* flag) { return app.count(flag) > 0; };
  if (!given("--temperature")) p.temperature = defaults.temperature;
  if (!given("--top-p")) p.top_p = defaults.top_p;
  if (!given("--top-k")) p.top_k = defaults.top_k;
  if (!given("--min-p")) p.min_p = defaults.min_p;
  if (!given("--repetition-penalty")) p.repetition_penalty = defaults.repetition_penalty;
}

}  // namespace flash_mla::cli
