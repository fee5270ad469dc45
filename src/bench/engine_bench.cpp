#include "bench/engine_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string_view>

#include "bench/borrowed_model.h"
#include "bench/machine.h"
#include "bench/speculation_bench.h"
#include "bench/table.h"
#include "bench/wall_time.h"
#include "checkpoint/config.h"
#include "engine/engine_core.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"
#include "model/e4m3_weight.h"
#include "model/int4_weight.h"
#include "model/model.h"
#include "planner/read.h"

namespace flash_mla::bench {
namespace {

// 15.7 billion parameters; one of the planner's models.
checkpoint::ModelConfig v2_lite() {
  constexpr std::string_view kPath = "models/deepseek-v2-lite.json";
  const auto files = planner::data_files();
  return checkpoint::parse_config(std::ranges::find(files, kPath, &planner::DataFile::path)->text, kPath);
}

/// Bytes of weights that a decoding step reads, `experts` of them (over all layers) taken.
double weight_bytes(const checkpoint::ModelConfig& c, std::int64_t experts, ModelQuantize quantize) {
  constexpr double kBf16 = 2, kFp32 = 4, kScale = 4;
  const auto each = [&](model::LayerKind kind) {
    if (model::asks_for_int4(quantize, kind)) return 0.5 + kScale / kInt4Group;
    return model::asks_for_e4m3(quantize, kind) ? 1 + kScale / (model::kE4m3Rows * model::kE4m3Columns)
                                                : kBf16;
  };
  const double of_attention = each(model::LayerKind::kAttention);
  const double hidden = c.hidden_size, heads = c.num_attention_heads, rank = c.kv_lora_rank;
  const double nope = c.qk_nope_head_dim, rope = c.qk_rope_head_dim, v = c.v_head_dim;
  const double q =
      c.q_lora_rank > 0 ? c.q_lora_rank * (hidden + heads * (nope + rope)) : hidden * heads * (nope + rope);
  const double attention =
      of_attention * (q + (rank + rope) * hidden + heads * v * hidden) + kBf16 * heads * rank * (nope + v);
  const double expert = 3.0 * hidden * c.moe_intermediate_size;
  double total = each(model::LayerKind::kHead) * hidden * c.vocab_size;
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    total += attention;
    if (c.has_indexer(i)) {
      total += of_attention * c.index_head_dim * (double{1} * c.index_n_heads * c.q_lora_rank + hidden) +
               kFp32 * c.index_n_heads * hidden;
    }
    if (c.is_moe_layer(i)) {
      total +=
          each(model::LayerKind::kShared) * expert * c.n_shared_experts + kFp32 * hidden * c.n_routed_experts;
    } else {
      total += each(model::LayerKind::kDense) * 3 * hidden * c.intermediate_size;
    }
  }
  return total + each(model::LayerKind::kExperts) * expert * static_cast<double>(experts);
}

/// Bytes of the cache that a token reads which sees `context` others: of all of them, or of those that an indexer chooses
/// and of all index keys.
double cache_bytes(const checkpoint::ModelConfig& c, int context, bool fp8) {
  const double token = fp8 ? 656 : 2.0 * (c.kv_lora_rank + c.qk_rope_head_dim);
  const double attended = c.index_topk > 0 ? std::min(context, c.index_topk) : context;
  double total = 0;
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    total += attended * token;
    if (c.has_indexer(i) && context > c.index_topk) total += context * (c.index_head_dim + 4.0);
  }
  return total;
}

double parameters(const checkpoint::ModelConfig& c) {
  std::int64_t layers = 0;
  for (int i = 0; i < c.num_hidden_layers; ++i) layers += c.is_moe_layer(i);
  return weight_bytes(c, layers * c.n_routed_experts, ModelQuantize::kNone) / 2 +
         double{1} * c.hidden_size * c.vocab_size;
}

class EngineBench {
 public:
  explicit EngineBench(const EngineBenchOptions& options)
      : options_(options),
        quantize_(options.fp8_weights    ? ModelQuantize::kFp8
                  : options.int4_weights ? ModelQuantize::kW4A8
                                         : ModelQuantize::kNone),
        config_(options.config.empty() ? v2_lite() : checkpoint::read_config(options.config)) {}

  int run() {
    const Clock::time_point begin = Clock::now();
    model::ModelOptions model_options;
    model_options.device = options_.cpu ? ModelDevice::kCpu : ModelDevice::kCuda;
    model_options.time_steps = true;
    model_options.quantize = quantize_;
    model_options.tp = options_.tp;
    model_options.devices = options_.devices;
    model_options.dp = options_.dp;
    model_options.ep = options_.ep;
    if (options_.fp8_cache) model_options.kv_cache = ModelKvCache::kFp8;
    model_options.draft_module = !options_.draft_tokens.empty();
    models_ = model::make_random_models(config_, model_options);
    model_ = models_.front().get();
    const int most_batch = *std::ranges::max_element(options_.batch);
    const int most_context = *std::ranges::max_element(options_.context);
    const int most_prefill = *std::ranges::max_element(options_.prefill);
    pages_per_sequence_ = pages(std::max(most_context + options_.steps + 16, most_prefill));
    if (options_.dp == 1) model_->allocate_cache(most_batch * pages_per_sequence_);
    const int most_drafts =
        options_.draft_tokens.empty() ? 0 : *std::ranges::max_element(options_.draft_tokens);
    model_->reserve(std::max(kChunk, most_batch * (1 + most_drafts)), most_batch * (1 + most_drafts));
    out_ = report_head();
    for (const BackendInfo& b : backends()) {
      if (b.backend == Backend::kSm90) out_["gpu"] = b.device;
    }
    // What `flash-mla plan calibrate` needs to know.
    out_["model"] = options_.config.empty()
                        ? nlohmann::ordered_json("deepseek-v2-lite")
                        : nlohmann::ordered_json::parse(std::ifstream(options_.config + "/config.json"));
    out_["weights"] = options_.fp8_weights ? "fp8" : options_.int4_weights ? "w4a8" : "bf16";
    if (const int ranks = options_.tp * options_.dp; ranks > 1) {
      out_["ranks"] = {
          {"tp", options_.tp}, {"dp", options_.dp}, {"ep", options_.ep > 0 ? options_.ep : ranks}};
    }
    out_["cache"] = options_.fp8_cache ? "fp8" : "bf16";
    out_["parameters"] = parameters(config_);
    out_["bandwidth_of_floor"] = options_.bandwidth;
    out_["load_seconds"] = seconds_since(begin);
    fmt::print("{:.2f} billion parameters, made in {:.1f} s\n", parameters(config_) / 1e9,
               seconds_since(begin));

    std::fflush(stdout);
    if (options_.dp > 1) {
      if (!options_.draft_tokens.empty()) throw Unsupported("--draft-tokens with --dp: expected one rank");
      generate();
    } else if (options_.draft_tokens.empty()) {
      prefill();
      fill_cache();
      decode();
      generate();
    } else {
      fill_cache();
      speculation();
    }
    if (!options_.json.empty()) write_json(options_.json, out_);
    return 0;
  }

 private:
  static constexpr int kChunk = 2048;
  static constexpr int kPrompt = 16;  // of generate(): those of 128 requests fit into one step

  static int pages(int tokens) { return (tokens + kPageSize - 1) / kPageSize; }

  std::vector<std::int32_t> random_tokens(int count) {
    std::vector<std::int32_t> out(static_cast<std::size_t>(count));
    for (std::int32_t& t : out)
      t = static_cast<std::int32_t>(random_() % static_cast<unsigned>(config_.vocab_size));
    return out;
  }

  // Of sequence s: the pages behind those of the sequences before.
  std::vector<std::int32_t> table(int batch, int width) const {
    std::vector<std::int32_t> out;
    for (int s = 0; s < batch; ++s) {
      for (int i = 0; i < width; ++i) out.push_back(s * pages_per_sequence_ + i);
    }
    return out;
  }

  // A prompt of sequence 0 in chunks; its wall time.
  double process_prompt(int length) {
    const std::vector<std::int32_t> tokens = random_tokens(length);
    const Clock::time_point begin = Clock::now();
    for (int at = 0; at < length; at += kChunk) {
      const int end = std::min(length, at + kChunk);
      const std::vector<std::int32_t> starts{0, end - at}, lens{end}, rows{end - at - 1};
      const std::vector<std::int32_t> block_table = table(1, pages(end));
      model::ForwardBatch batch;
      batch.token_ids =
          std::span(tokens).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(end - at));
      batch.query_starts = starts;
      batch.seq_lens = lens;
      batch.block_table = block_table;
      batch.max_blocks = pages(end);
      if (end == length) batch.greedy_rows = rows;
      std::int32_t token = 0;
      model_->forward(batch, nullptr, &token);
    }
    return seconds_since(begin);
  }

  void prefill() {
    Table rows({"prompt", "ms", "tokens/s"});
    for (const int length : options_.prefill) {
      process_prompt(length);
      std::vector<double> times(3);
      for (double& time : times) time = process_prompt(length);
      const double time = upper_median(times);
      rows.add({fmt::format("{}", length), fmt::format("{:.2f}", time * 1e3),
                fmt::format("{:.0f}", length / time)});
      out_["prefill"].push_back({{"prompt_tokens", length},
                                 {"chunk", kChunk},
                                 {"seconds", time},
                                 {"tokens_per_second", length / time}});
    }
    fmt::print("{}\n", rows.str());
  }

  // Every sequence's pages with those of sequence 0, so that caches hold what a model writes.
  void fill_cache() {
    process_prompt(*std::ranges::max_element(options_.context));
    const int most = *std::ranges::max_element(options_.batch);
    for (int s = 1; s < most; ++s) {
      for (int i = 0; i < pages_per_sequence_; ++i) model_->copy_page(i, s * pages_per_sequence_ + i);
    }
  }

  void decode() {
    Table rows(
        {"batch", "context", "step ms", "device ms", "idle", "floor ms", "x floor", "experts", "tokens/s"});
    for (const int context : options_.context) {
      for (const int b : options_.batch) {
        const auto size = static_cast<std::size_t>(b);
        std::vector<std::int32_t> tokens = random_tokens(b), starts(size + 1), lens(size), wanted(size);
        const int width = pages(context + options_.steps + 8);
        const std::vector<std::int32_t> block_table = table(b, width);
        for (std::size_t i = 0; i <= size; ++i) starts[i] = static_cast<std::int32_t>(i);
        for (std::size_t i = 0; i < size; ++i) wanted[i] = static_cast<std::int32_t>(i);
        std::vector<double> wall, device;
        double experts = 0;
        for (int step = -5; step < options_.steps; ++step) {
          std::ranges::fill(lens, context + 6 + step);
          model::ForwardBatch batch;
          batch.token_ids = tokens;
          batch.query_starts = starts;
          batch.seq_lens = lens;
          batch.block_table = block_table;
          batch.max_blocks = width;
          batch.greedy_rows = wanted;
          const double device_before = model_->device_seconds();
          const Clock::time_point begin = Clock::now();
          std::vector<std::int32_t> next(size);
          model_->forward(batch, nullptr, next.data());
          if (step >= 0) {
            wall.push_back(seconds_since(begin));
            device.push_back(model_->device_seconds() - device_before);
            experts += static_cast<double>(model_->experts_hit(b)) / options_.steps;
          }
          // Not the greedy continuation, which a random model repeats: all rows would share their experts.
          tokens = random_tokens(b);
        }
        const double bytes = weight_bytes(config_, std::llround(experts), quantize_) +
                             b * cache_bytes(config_, context, options_.fp8_cache);
        const double floor = bytes / options_.bandwidth, time = upper_median(wall),
                     busy = upper_median(device);
        rows.add({fmt::format("{}", b), fmt::format("{}", context), fmt::format("{:.3f}", time * 1e3),
                  fmt::format("{:.3f}", busy * 1e3), fmt::format("{:.1f}%", 100 * (1 - busy / time)),
                  fmt::format("{:.3f}", floor * 1e3), fmt::format("{:.2f}", time / floor),
                  fmt::format("{:.0f}", experts), fmt::format("{:.0f}", b / time)});
        out_["decode"].push_back({{"batch", b},
                                  {"context", context},
                                  {"step_seconds", time},
                                  {"device_seconds", busy},
                                  {"idle_share", 1 - busy / time},
                                  {"floor_seconds", floor},
                                  {"times_floor", time / floor},
                                  {"floor_bytes", bytes},
                                  {"experts_hit", experts},
                                  {"tokens_per_second", b / time}});
      }
    }
    fmt::print("{}\n", rows.str());
  }

  // The whole engine, scheduler and all, with short prompts: greedy requests and ones that are drawn, each
  // with and without steps that are queued while the one before runs.
  void generate() {
    const int most = *std::ranges::max_element(options_.batch);
    Table rows({"batch (engine)", "tokens", "queued", "step ms", "device ms", "idle", "tokens/s"});
    for (const bool ahead : {true, false}) {
      EngineOptions engine_options;
      engine_options.num_pages = most * pages(kPrompt + options_.generated + 1);
      engine_options.max_batch_size = most;
      engine_options.max_tokens_per_step = kChunk;
      engine_options.overlap_steps = ahead;
      std::vector<std::unique_ptr<model::Model>> borrowed;
      for (const auto& model : models_) borrowed.push_back(std::make_unique<BorrowedModel>(*model));
      engine::EngineCore core(std::move(borrowed), {}, {}, engine_options);
      for (const bool drawn : {false, true}) {
        for (const int b : options_.batch) {
          for (const bool warm : {false, true}) {
            int finished = 0;
            for (int i = 0; i < b; ++i) {
              Request s;
              s.prompt_token_ids = random_tokens(kPrompt);
              s.sampling.temperature = drawn ? 0.7 : 0;
              s.sampling.top_p = 0.9;
              s.sampling.top_k = 50;
              s.sampling.max_tokens = options_.generated;
              s.sampling.ignore_eos = true;
              core.submit(std::move(s), [&](const GenerationEvent& e) { finished += e.last; });
            }
            core.step();  // the prompts
            const double device_before = model_->device_seconds();
            const Clock::time_point begin = Clock::now();
            int steps = 0;
            while (finished < b && core.step()) ++steps;
            const double time = seconds_since(begin) / steps,
                         busy = (model_->device_seconds() - device_before) / steps;
            if (!warm) continue;
            rows.add({fmt::format("{}", b), drawn ? "drawn" : "greedy", ahead ? "ahead" : "after",
                      fmt::format("{:.3f}", time * 1e3), fmt::format("{:.3f}", busy * 1e3),
                      fmt::format("{:.1f}%", 100 * (1 - busy / time)), fmt::format("{:.0f}", b / time)});
            out_["generation"].push_back({{"batch", b},
                                          {"drawn", drawn},
                                          {"overlap_steps", ahead},
                                          {"prompt_tokens", kPrompt},
                                          {"generated", options_.generated},
                                          {"step_seconds", time},
                                          {"device_seconds", busy},
                                          {"idle_share", 1 - busy / time},
                                          {"tokens_per_second", b / time}});
          }
        }
      }
    }
    fmt::print("{}\n", rows.str());
  }

  void speculation() {
    if (!model_->has_draft_module()) {
      throw Unsupported(
          "--draft-tokens: a model whose layers share indices has no module for multi-token prediction");
    }
    bench_speculation(*model_,
                      {options_.batch, options_.context, options_.draft_tokens, options_.acceptance,
                       options_.steps, options_.generated},
                      pages_per_sequence_, out_);
  }

  const EngineBenchOptions& options_;
  ModelQuantize quantize_;
  checkpoint::ModelConfig config_;
  std::vector<std::unique_ptr<model::Model>> models_;  // of each rank with tokens of its own
  model::Model* model_ = nullptr;                      // the first
  int pages_per_sequence_ = 0;
  std::mt19937 random_{11};
  nlohmann::ordered_json out_;
};

}  // namespace

int run_engine_bench(const EngineBenchOptions& options) { return EngineBench(options).run(); }

}  // namespace flash_mla::bench
