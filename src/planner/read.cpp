#include "planner/read.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <fstream>
#include <map>
#include <sstream>

#include "planner/engine_step.h"

namespace flash_mla::planner {
namespace {

constexpr std::int64_t kMaxDim = 1 << 24;     // hidden sizes, ranks, vocabularies
constexpr std::int64_t kMaxTokens = 1 << 28;  // sequence lengths
constexpr std::int64_t kMaxCards = 1 << 16;   // any parallel degree
constexpr double kMaxRate = 1e9;              // TFLOP/s, GB/s, GB: far past any machine, far from overflow

std::string shown(const Json& value) {
  std::string text = value.dump();
  return text.size() > 60 ? text.substr(0, 57) + "..." : text;
}

const std::vector<std::string> kAttention = {"bf16", "fp8"};
const std::vector<std::string> kMoe = {"bf16", "fp8", "w4a8"};
const std::vector<std::string> kKv = {"bf16", "fp8_656", "fp8_576"};
const std::vector<std::string> kPlacement = {"uniform", "linear", "round_robin"};
const std::vector<std::string> kOverlap = {"none", "memory", "operators", "full"};

std::string base_name(const std::string& path) {
  const std::size_t slash = path.find_last_of('/');
  std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  if (name.ends_with(".json")) name.resize(name.size() - 5);
  return name;
}

/// The shipped file's name for what people call a model or a card, in any case; others come back in lower case.
std::string shipped_name(std::string name) {
  for (char& c : name)
    c = c == ' ' || c == '_' ? '-' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  for (const std::string_view prefix : {"deepseek-ai/", "nvidia-", "nvidia/"}) {
    if (name.starts_with(prefix)) name.erase(0, prefix.size());
  }
  for (const std::string_view suffix : {"-sxm", "-sxm5", "-hgx"}) {
    if (name.ends_with(suffix)) name.resize(name.size() - suffix.size());
  }
  // Checkpoints of the same architecture.
  static const std::map<std::string, std::string, std::less<>> kAliases = {
      {"v2", "deepseek-v2"},
      {"deepseek-v2-chat", "deepseek-v2"},
      {"deepseek-v2.5", "deepseek-v2"},
      {"deepseek-coder-v2", "deepseek-v2"},
      {"v2-lite", "deepseek-v2-lite"},
      {"deepseek-v2-lite-chat", "deepseek-v2-lite"},
      {"deepseek-coder-v2-lite", "deepseek-v2-lite"},
      {"v3", "deepseek-v3"},
      {"deepseek-v3-base", "deepseek-v3"},
      {"deepseek-v3-0324", "deepseek-v3"},
      {"deepseek-v3.1", "deepseek-v3"},
      {"deepseek-v3.1-terminus", "deepseek-v3"},
      {"r1", "deepseek-v3"},
      {"deepseek-r1", "deepseek-v3"},
      {"deepseek-r1-0528", "deepseek-v3"},
      {"v3.2", "deepseek-v3.2"},
      {"deepseek-v3.2-exp", "deepseek-v3.2"},
  };
  const auto found = kAliases.find(name);
  return found == kAliases.end() ? name : found->second;
}

/// The JSON that `value` stands for: itself if an object, else a shipped file or one on disk.
Json resolve(const Json& value, const std::string& key, const std::string& folder, std::string& source) {
  if (value.is_object()) {
    source = key;
    return value;
  }
  std::vector<std::string> names;
  for (const DataFile& file : data_files()) {
    if (file.path.starts_with(folder)) names.push_back(base_name(std::string(file.path)));
  }
  if (!value.is_string()) {
    throw InvalidArgument(
        fmt::format("request: {} = {}: expected one of {}, a path to a .json file, or an object", key,
                    shown(value), fmt::join(names, ", ")));
  }
  const std::string name = value.get<std::string>();
  const std::string shipped = shipped_name(name);
  for (const DataFile& file : data_files()) {
    if (file.path == fmt::format("{}/{}.json", folder, shipped)) {
      source = "data/" + std::string(file.path);
      return parse_json(file.text, source);
    }
  }
  if (name.find('/') == std::string::npos && !name.ends_with(".json")) {
    throw InvalidArgument(
        fmt::format("request: {} = \"{}\": expected one of {} (in any case), or a path to a .json file", key,
                    name, fmt::join(names, ", ")));
  }
  source = name;
  return load_json(name);
}

Plan read_plan(ObjectReader r, const Plan& fallback) {
  Plan p;
  p.tp = r.integer("tp", fallback.tp, 1, kMaxCards);
  p.ep = r.integer("ep", fallback.ep, 1, kMaxCards);
  p.dp = r.integer("dp", fallback.dp, 0, kMaxCards);
  p.pp = r.integer("pp", fallback.pp, 1, kMaxCards);
  p.cp = r.integer("cp", fallback.cp, 1, kMaxCards);
  r.finish();
  return p;
}

}  // namespace

Json parse_json(std::string_view text, const std::string& source) {
  try {
    return Json::parse(text);
  } catch (const Json::parse_error& e) {
    throw InvalidArgument(fmt::format("{}: not valid JSON: {}", source, e.what()));
  }
}

Json load_json(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    throw InvalidArgument(fmt::format("{}: cannot be read; expected a JSON file", path));
  }
  return parse_json(text.str(), path);
}

ObjectReader::ObjectReader(const Json& json, std::string source, std::string where)
    : json_(json), source_(std::move(source)), where_(std::move(where)) {
  if (!json.is_object()) {
    throw InvalidArgument(fmt::format("{}: {} = {}: expected a JSON object", source_,
                                      where_.empty() ? "top level" : where_, shown(json)));
  }
}

void ObjectReader::fail(const std::string& key, const std::string& value, const std::string& expected) const {
  throw InvalidArgument(fmt::format("{}: {} = {}: expected {}", source_, path(key), value, expected));
}

const Json* ObjectReader::find(const char* key) {
  known_.emplace_back(key);
  const auto found = json_.find(key);
  return found == json_.end() ? nullptr : &*found;
}

bool ObjectReader::has(const char* key) {
  const Json* value = find(key);
  return value != nullptr && !value->is_null();
}

const Json& ObjectReader::require(const char* key, const std::string& expected) {
  const Json* value = find(key);
  if (value == nullptr) fail(key, "(missing)", expected);
  return *value;
}

std::int64_t ObjectReader::integer(const char* key, std::int64_t low, std::int64_t high) {
  const std::string expected = fmt::format("an integer from {} to {}", low, high);
  const Json& value = require(key, expected);
  const double number = value.is_number() ? value.get<double>() : NAN;  // 8.0 is as good as 8
  if (!(number >= static_cast<double>(low) && number <= static_cast<double>(high)) ||
      number != std::floor(number)) {
    fail(key, shown(value), expected);
  }
  return static_cast<std::int64_t>(number);
}

std::int64_t ObjectReader::integer(const char* key, std::int64_t fallback, std::int64_t low,
                                   std::int64_t high) {
  return has(key) ? integer(key, low, high) : fallback;
}

double ObjectReader::number(const char* key, double low, double high) {
  const std::string expected = fmt::format("a number from {} to {}", low, high);
  const Json& value = require(key, expected);
  const double number = value.is_number() ? value.get<double>() : NAN;
  if (!(number >= low && number <= high)) fail(key, shown(value), expected);
  return number;
}

double ObjectReader::number(const char* key, double fallback, double low, double high) {
  return has(key) ? number(key, low, high) : fallback;
}

std::string ObjectReader::choice(const char* key, const std::string& fallback,
                                 const std::vector<std::string>& allowed) {
  if (!has(key)) return fallback;
  const Json& value = *find(key);
  if (!value.is_string() ||
      std::find(allowed.begin(), allowed.end(), value.get<std::string>()) == allowed.end()) {
    fail(key, shown(value), fmt::format("one of {}", fmt::join(allowed, ", ")));
  }
  return value.get<std::string>();
}

std::string ObjectReader::text(const char* key, const std::string& fallback) {
  if (!has(key)) return fallback;
  const Json& value = *find(key);
  if (!value.is_string()) fail(key, shown(value), "a string");
  return value.get<std::string>();
}

bool ObjectReader::boolean(const char* key, bool fallback) {
  if (!has(key)) return fallback;
  const Json& value = *find(key);
  if (!value.is_boolean()) fail(key, shown(value), "true or false");
  return value.get<bool>();
}

ObjectReader ObjectReader::object(const char* key) {
  static const Json kEmpty = Json::object();
  const Json* value = find(key);
  return ObjectReader(value == nullptr || value->is_null() ? kEmpty : *value, source_, path(key));
}

void ObjectReader::finish() const {
  for (const auto& [key, value] : json_.items()) {
    if (std::find(known_.begin(), known_.end(), key) == known_.end()) {
      std::vector<std::string> known = known_;
      std::sort(known.begin(), known.end());
      known.erase(std::unique(known.begin(), known.end()), known.end());
      throw InvalidArgument(fmt::format("{}: unknown key {} = {}: expected one of {}", source_, path(key),
                                        shown(value), fmt::join(known, ", ")));
    }
  }
}

Model read_model(const Json& json, const std::string& source) {
  ObjectReader r(json, source);
  Model m;
  m.name = base_name(source);
  m.hidden_size = r.integer("hidden_size", 1, kMaxDim);
  m.num_layers = r.integer("num_hidden_layers", 1, 100000);
  m.num_dense_layers = r.integer("first_k_dense_replace", 0, 0, m.num_layers);
  m.num_heads = r.integer("num_attention_heads", 1, kMaxDim);
  m.q_lora_rank = r.integer("q_lora_rank", 0, 1, kMaxDim);  // null: queries are projected directly
  m.kv_lora_rank = r.integer("kv_lora_rank", 1, kMaxDim);
  m.qk_nope_head_dim = r.integer("qk_nope_head_dim", 1, kMaxDim);
  m.qk_rope_head_dim = r.integer("qk_rope_head_dim", 1, kMaxDim);
  m.v_head_dim = r.integer("v_head_dim", 1, kMaxDim);
  m.intermediate_size = r.integer("intermediate_size", 1, kMaxDim);
  m.moe_intermediate_size = r.integer("moe_intermediate_size", 1, kMaxDim);
  m.num_routed_experts = r.integer("n_routed_experts", 1, 100000);
  m.num_shared_experts = r.integer("n_shared_experts", 0, 0, 1000);
  m.num_experts_per_token = r.integer("num_experts_per_tok", 1, m.num_routed_experts);
  m.n_group = r.integer("n_group", 1, 1, m.num_routed_experts);
  m.topk_group = r.integer("topk_group", 1, 1, m.n_group);
  m.vocab_size = r.integer("vocab_size", 1, kMaxDim);
  m.max_position_embeddings = r.integer("max_position_embeddings", kMaxTokens, 1, kMaxTokens);
  m.tied_embeddings = r.boolean("tie_word_embeddings", false);
  m.num_mtp_layers = r.integer("num_nextn_predict_layers", 0, 0, 100);
  if (r.has("index_n_heads") || r.has("index_topk")) {
    m.index_num_heads = r.integer("index_n_heads", 1, kMaxDim);
    m.index_head_dim = r.integer("index_head_dim", 1, kMaxDim);
    m.index_topk = r.integer("index_topk", 1, kMaxTokens);
    if (m.q_lora_rank == 0) r.fail("q_lora_rank", "null", "a rank: the indexer reads the query latent");
  }
  if (r.has("hc_mult")) {
    m.hc_mult = r.integer("hc_mult", 1, 64);
    m.hc_sinkhorn_iters = r.integer("hc_sinkhorn_iters", 20, 0, 10000);
  }
  if (r.integer("moe_layer_freq", 1, 1, m.num_layers) != 1) {
    r.fail("moe_layer_freq", shown(json["moe_layer_freq"]), "1: every layer after the dense ones is MoE");
  }
  if (m.num_routed_experts % m.n_group != 0) {
    r.fail("n_group", fmt::format("{}", m.n_group),
           fmt::format("a divisor of n_routed_experts = {}", m.num_routed_experts));
  }
  if (r.has("flash_mla_article")) {
    ObjectReader article = r.object("flash_mla_article");
    m.article_active = article.number("active_non_attention_params", 1, 1e15);
    m.article_dense = article.number("dense_params", 1, 1e15);
    m.article_moe = article.number("moe_params", 1, 1e15);
    article.text("note", "");
    article.finish();
  }
  return m;  // a config.json has many more keys, so the rest is not refused
}

namespace {

EngineCosts read_engine_costs(ObjectReader r) {
  EngineCosts e;
  for (const auto& [key, value] : engine_factors(e)) *value = r.number(key, 1e-3, 1e6);
  e.layer_s = r.number("layer_us", 0, 1e6) * 1e-6;
  e.indexer_s = r.number("indexer_us", 0, 1e6) * 1e-6;
  e.pass_s = r.number("pass_us", 0, 1e6) * 1e-6;
  r.finish();
  return e;
}

}  // namespace

Hardware read_hardware(const Json& json, const std::string& source) {
  ObjectReader r(json, source);
  Hardware h;
  h.name = r.text("name", base_name(source));
  ObjectReader peaks = r.object("peak_tflops");
  h.peak_bf16 = peaks.number("bf16", 1e-3, kMaxRate) * 1e12;
  h.peak_fp8 = peaks.number("fp8", 0, 1e-3, kMaxRate) * 1e12;  // null: none
  peaks.finish();
  h.memory_bytes = r.number("memory_gb", 1e-3, kMaxRate) * 1e9;
  h.memory_bandwidth = r.number("memory_bandwidth_gb_s", 1e-3, kMaxRate) * 1e9;
  h.nvlink_both_directions = r.number("nvlink_both_directions_gb_s", 1e-3, kMaxRate) * 1e9;
  h.network_one_way = r.number("network_one_way_gb_s", 1e-3, kMaxRate) * 1e9;
  h.cards_per_node = r.integer("cards_per_node", 8, 1, kMaxCards);
  h.reserve_bytes = r.number("reserve_gb", 10, 0, kMaxRate) * 1e9;
  ObjectReader e = r.object("efficiency");
  Efficiency& f = h.efficiency;
  f.attention_compute = e.number("attention_compute", 1, 1e-4, 1);
  f.attention_memory = e.number("attention_memory", 1, 1e-4, 1);
  f.attention_launch_s = e.number("attention_launch_us", 0, 0, 1e6) * 1e-6;
  f.gemm = e.number("gemm", 1, 1e-4, 1);
  f.memory = e.number("memory", 1, 1e-4, 1);
  f.link = e.number("link", 1, 1e-4, 1);
  e.finish();
  if (r.has("engine")) h.engine = read_engine_costs(r.object("engine"));
  r.text("note", "");
  r.find("calibration");  // where the efficiencies come from; for the reader
  r.find("sm_count");
  r.finish();
  return h;
}

Model find_model(const Json& value, const std::string& key) {
  std::string source;
  const Json json = resolve(value, key, "models", source);
  return read_model(json, source);
}

Hardware find_hardware(const Json& value, const std::string& key) {
  std::string source;
  const Json json = resolve(value, key, "hardware", source);
  return read_hardware(json, source);
}

Request read_request(const Json& json, const std::string& source, const Model* model,
                     const Hardware* hardware) {
  ObjectReader r(json, source);
  Request q;
  q.mode = r.choice("mode", "exact", {"article", "exact"}) == "article" ? Mode::kArticle : Mode::kExact;
  const bool article = q.mode == Mode::kArticle;
  static const Json kDefaultModel = "deepseek-v3";
  static const Json kDefaultHardware = "h20";
  const Json& model_value = r.has("model") ? *r.find("model") : kDefaultModel;
  const Json& hardware_value = r.has("hardware") ? *r.find("hardware") : kDefaultHardware;
  q.model = model != nullptr ? *model : find_model(model_value, "model");
  q.hardware = hardware != nullptr ? *hardware : find_hardware(hardware_value, "hardware");
  q.decode_plan = read_plan(r.object("plan"), Plan{});
  q.prefill_plan = read_plan(r.object("prefill_plan"), q.decode_plan);

  ObjectReader p = r.object("precision");
  q.precision.attention = p.choice("attention", article ? "fp8" : "bf16", kAttention);
  q.precision.dense = p.choice("dense", "fp8", kAttention);
  q.precision.moe = p.choice("moe", article ? "w4a8" : "fp8", kMoe);
  q.precision.kv = p.choice("kv", article ? "fp8_576" : "fp8_656", kKv);
  q.precision.activation = p.choice("activation", article ? "fp8" : "bf16", kAttention);
  q.precision.scale_group = p.integer("scale_group", 0, 0, 65536);
  p.finish();

  ObjectReader w = r.object("workload");
  Workload& work = q.workload;
  work.input = w.integer("input", work.input, 1, kMaxTokens);
  work.output = w.integer("output", work.output, 1, kMaxTokens);
  work.batch = w.integer("batch", work.batch, 1, 1 << 24);
  work.prefill_batch = w.integer("prefill_batch", work.prefill_batch, 1, 1 << 24);
  work.chunk = w.integer("chunk", 0, 0, kMaxTokens);
  work.prefix_hit = w.number("prefix_hit", 0, 0, 0.999999);
  work.arrival_rate = w.number("arrival_rate", 0, 0, 1e9);
  work.mtp_draft = w.integer("mtp_draft", 0, 0, 16);
  work.mtp_acceptance = w.number("mtp_acceptance", 0, 0, 1);
  work.placement = w.choice("placement", "uniform", kPlacement);
  if (w.has("expert_load")) {
    const Json& load = *w.find("expert_load");
    if (!load.is_array()) w.fail("expert_load", shown(load), "an array of tokens per routed expert");
    for (const Json& count : load) {
      if (!count.is_number() || !(count.get<double>() >= 0 && count.get<double>() <= 1e15)) {
        w.fail("expert_load", shown(count), "numbers from 0 to 1e15");
      }
      work.expert_load.push_back(count.get<double>());
    }
  }
  if (w.has("mix")) {
    const Json& mix = *w.find("mix");
    if (!mix.is_array() || mix.empty() || mix.size() > 1000) {
      w.fail("mix", shown(mix), "an array of 1 to 1000 objects {input, output, share}");
    }
    for (std::size_t i = 0; i < mix.size(); ++i) {
      ObjectReader m(mix[i], source, fmt::format("workload.mix[{}]", i));
      RequestShape shape;
      shape.input = m.integer("input", 1, kMaxTokens);
      shape.output = m.integer("output", 1, kMaxTokens);
      shape.share = m.number("share", 1, 1e-9, 1e9);
      m.finish();
      work.mix.push_back(shape);
    }
  }
  w.finish();

  ObjectReader slo = r.object("slo");
  q.slo.ttft_s = slo.number("ttft_ms", 0, 0, 1e9) / 1e3;
  q.slo.tpot_s = slo.number("tpot_ms", 0, 0, 1e9) / 1e3;
  slo.finish();

  ObjectReader c = r.object("prices");
  q.prices.card_hour = c.number("card_hour", 0, 0, 1e9);
  q.prices.card_price = c.number("card_price", 0, 0, 1e12);
  q.prices.years = c.number("years", 0, 0, 100);
  q.prices.power_w = c.number("power_w", 0, 0, 1e6);
  q.prices.pue = c.number("pue", 1, 1, 10);
  q.prices.electricity_kwh = c.number("electricity_kwh", 0, 0, 1e6);
  q.prices.other_hour = c.number("other_hour", 0, 0, 1e9);
  if (q.prices.card_price > 0 && q.prices.years == 0)
    c.fail("years", "0", "the years card_price is written off over");
  c.finish();

  q.overlap = r.choice("overlap", article ? "none" : "operators", kOverlap);
  q.mhc_fused = r.boolean("mhc_fused", false);
  r.boolean("explain", false);
  r.text("command", "plan");
  r.text("name", "");
  r.finish();
  return q;
}

}  // namespace flash_mla::planner
