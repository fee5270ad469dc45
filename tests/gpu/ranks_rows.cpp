// Time of a step on one rank, on ParallelModel with one rank, and on several that are streams of one GPU (docs/ranks.md):
//
//   ranks_rows [ROUNDS] > FILE.json
//
// The model is V2-Lite's shape, of 6 layers, with random weights. Steps are timed from launch to the tokens on the host, in
// turns, so that what else the machine does falls on all alike.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/config.h"
#include "model/model.h"
#include "model/parallel/parallel_model.h"

namespace {

using namespace flash_mla;
using namespace flash_mla::model;

constexpr int kContext = 1024, kPagesPerSequence = kContext / kPageSize + 1, kMostTokens = 1024;

constexpr const char* kConfig = R"({"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
  "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 16,
  "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
  "routed_scaling_factor": 1.0, "norm_topk_prob": false, "q_lora_rank": null, "kv_lora_rank": 512,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 4096})";

struct Run {
  std::string name;
  std::unique_ptr<Model> model;
  std::vector<double> seconds;
};

/// `tokens` of each of `sequences`, behind kContext others or, where there are several, at the beginning.
double step(Model& model, int sequences, int tokens) {
  std::vector<std::int32_t> ids, starts{0}, lengths, table, rows;
  for (int s = 0; s < sequences; ++s) {
    for (int i = 0; i < tokens; ++i) ids.push_back((7919 * (s + 1) + 31 * i) % 102400);
    starts.push_back(static_cast<std::int32_t>(ids.size()));
    rows.push_back(static_cast<std::int32_t>(ids.size()) - 1);
    lengths.push_back(tokens == 1 ? kContext : tokens);
    for (int p = 0; p < kPagesPerSequence; ++p) table.push_back(s * kPagesPerSequence + p);
  }
  ForwardBatch batch;
  batch.token_ids = ids;
  batch.query_starts = starts;
  batch.seq_lens = lengths;
  batch.block_table = table;
  batch.max_blocks = kPagesPerSequence;
  batch.greedy_rows = rows;
  std::vector<std::int32_t> out(rows.size());
  const auto begin = std::chrono::steady_clock::now();
  model.launch(batch);
  model.collect(nullptr, out.data());
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  const ModelConfig config = checkpoint::parse_config(kConfig, "ranks_rows");
  const auto make = [&](int tp) {
    ModelOptions options;
    options.device = ModelDevice::kCuda;
    options.tp = tp;
    if (tp > 1) options.devices.assign(static_cast<std::size_t>(tp), 0);
    return make_random_model(config, options);
  };
  std::vector<Run> runs;
  runs.push_back({"one rank", make(1), {}});
  runs.push_back({"ParallelModel of one rank",
                  std::make_unique<ParallelModel>(1, [&](int, comm::Communicator&) { return make(1); }),
                  {}});
  for (const int tp : {2, 4})
    runs.push_back({std::to_string(tp) + " ranks, streams of one GPU", make(tp), {}});
  std::printf("{\"model\": \"V2-Lite's shape, 6 layers\", \"context\": %d, \"rounds\": %d, \"rows\": [",
              kContext, rounds);
  const char* separator = "\n";
  for (Run& run : runs) {
    run.model->allocate_cache(32 * kPagesPerSequence);
    run.model->reserve(kMostTokens, 32);
  }
  for (const auto& [sequences, tokens] :
       {std::pair(1, 1), std::pair(2, 1), std::pair(32, 1), std::pair(1, 1024)}) {
    for (Run& run : runs) run.seconds.clear();
    const int turns = tokens > 1 ? std::max(rounds / 5, 5) : rounds;
    for (int i = -5; i < turns; ++i) {
      for (Run& run : runs) {
        const double seconds = step(*run.model, sequences, tokens);
        if (i >= 0) run.seconds.push_back(seconds);
      }
    }
    for (const Run& run : runs) {
      std::printf("%s  {\"sequences\": %d, \"tokens\": %d, \"run\": \"%s\", \"microseconds\": %.1f}",
                  separator, sequences, tokens, run.name.c_str(), 1e6 * median(run.seconds));
      separator = ",\n";
    }
  }
  std::printf("\n]}\n");
  return 0;
}
