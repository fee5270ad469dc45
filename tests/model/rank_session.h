#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "kernels/sampling/cpu/draw.h"
#include "model/model.h"
#include "random_checkpoint.h"

// Models of every architecture in which nothing divides evenly but the heads, and what they say of three sequences: for
// comparing one on several ranks with the same on one.

namespace flash_mla::model {

using Ids = std::vector<std::int32_t>;
using Logits = std::vector<float>;

inline constexpr int kVocab = 131, kPages = 3;

struct Kind {
  const char* name;
  const char* fields;
  Stored stored = Stored::kBf16;
};
inline const Kind kKinds[] = {
    // V2-Lite: queries without a low-rank step, softmax over all experts.
    {"V2", R"("model_type": "deepseek_v2", "q_lora_rank": null, "n_group": 1, "topk_group": 1,
              "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": false)"},
    {"V3",
     R"("model_type": "deepseek_v3", "q_lora_rank": 40, "n_group": 2, "topk_group": 1, "norm_topk_prob": true,
              "attention_bias": true)"},
    {"V32",
     R"("model_type": "deepseek_v32", "q_lora_rank": 40, "n_group": 2, "topk_group": 1, "norm_topk_prob": true,
               "index_n_heads": 4, "index_head_dim": 64, "index_topk": 24)"},
    // Stored in blocks of 128 x 128, of which shares cut whole ones where there are enough.
    {"Fp8",
     R"("model_type": "deepseek_v3", "q_lora_rank": 128, "n_group": 2, "topk_group": 1, "norm_topk_prob": true,
        "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "v_head_dim": 64,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]})",
     Stored::kFp8},
};

inline std::string config(const Kind& kind) {
  std::string out = std::string("{") + kind.fields;
  const auto unless = [&](const std::string& name, int value) {
    const std::string key = '"' + name + "\": ";
    if (out.find(key) == std::string::npos) out += ", " + key + std::to_string(value);
  };
  unless("vocab_size", kVocab);
  unless("hidden_size", 96);
  unless("intermediate_size", 100);
  unless("moe_intermediate_size", 41);
  unless("v_head_dim", 12);
  return out +
         R"(, "num_hidden_layers": 3, "num_attention_heads": 12, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "n_routed_experts": 10, "n_shared_experts": 1, "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "max_position_embeddings": 512, "rope_theta": 10000.0})";
}

/// By sequence.
struct Said {
  std::array<Logits, 3> logits;
  std::array<Ids, 3> tokens;
  bool operator==(const Said&) const = default;
};

/// Runs prompts, then steps of one token, then one of many, then drafts, then copies and choices, of those of the three
/// sequences that are `own`: another rank has the others.
class Session {
 public:
  Session(Model& model, bool batch_invariant, std::vector<std::size_t> own = {0, 1, 2})
      : model_(model), batch_invariant_(batch_invariant), own_(std::move(own)) {
    model_.allocate_cache(4 * kPages);
    step({33, 5, 20});
    step({1, 18, 1});
    for (int i = 0; i < 2; ++i) step({1, 1, 1});
    step({0, 0, 25});
    if (model_.has_draft_module() && has(2)) draft();
    model_.copy_page(0, 3 * kPages);
    choose(/*masked=*/false);
    choose(/*masked=*/true);
  }
  Said said;

 private:
  bool has(std::size_t s) const { return std::ranges::find(own_, s) != own_.end(); }
  std::vector<std::int32_t> pages(std::size_t s) const {
    Ids out;
    for (int p = 0; p < kPages; ++p) out.push_back(static_cast<std::int32_t>(s) * kPages + p);
    return out;
  }

  // counts[s] more tokens of sequence s, logits of all.
  void step(const std::array<int, 3>& counts) {
    Ids ids, starts{0}, lengths, table, rows;
    for (const std::size_t s : own_) {
      if (counts[s] == 0) continue;
      for (int i = 0; i < counts[s]; ++i) {
        const std::int32_t t = lengths_[s]++ + static_cast<std::int32_t>(7 * s);
        rows.push_back(static_cast<std::int32_t>(ids.size()));
        ids.push_back((t * t + 3 * t) % kVocab);
      }
      starts.push_back(static_cast<std::int32_t>(ids.size()));
      lengths.push_back(lengths_[s]);
      std::ranges::copy(pages(s), std::back_inserter(table));
    }
    if (!ids.empty()) {
      ForwardBatch batch;
      batch.token_ids = ids;
      batch.query_starts = starts;
      batch.seq_lens = lengths;
      batch.block_table = table;
      batch.max_blocks = kPages;
      batch.logit_rows = rows;
      batch.batch_invariant = batch_invariant_;
      Logits out(rows.size() * kVocab);
      model_.forward(batch, out.data(), nullptr);
      auto from = out.begin();
      for (const std::size_t s : own_) {
        const auto end = from + counts[s] * kVocab;
        said.logits[s].insert(said.logits[s].end(), from, end);
        from = end;
      }
    }
    model_.end_step();
  }

  // A drawn token of sequence 0, whose first page is a copy, and a greedy one of sequence 1, which may be among those of a
  // mask.
  void choose(bool masked) {
    Ids ids, starts{0}, lengths, table, drawn, greedy;
    std::vector<Draw> draws;
    if (has(0)) {
      drawn = {0};
      draws = {cpu::make_draw(0.6, 2.0, 0, 0.9, 0)};
    }
    if (has(1)) greedy = {has(0) ? 1 : 0};
    const std::vector<std::uint32_t> mask = {0x55555555, 0x33333333, 0x77777777, 0x11111111, 3};
    std::vector<TokenRule> rules;
    for (const std::size_t s : own_) {
      if (s == 2) continue;
      ids.push_back(s == 0 ? 3 : 5);
      starts.push_back(static_cast<std::int32_t>(ids.size()));
      lengths.push_back(lengths_[s] + 1);
      std::ranges::copy(pages(s), std::back_inserter(table));
      if (s == 0) table[0] = 3 * kPages;
      rules.push_back(s == 0 ? TokenRule() : TokenRule{mask.data(), {}});
    }
    if (!ids.empty()) {
      ForwardBatch batch;
      batch.token_ids = ids;
      batch.query_starts = starts;
      batch.seq_lens = lengths;
      batch.block_table = table;
      batch.max_blocks = kPages;
      batch.drawn_rows = drawn;
      batch.draws = draws;
      batch.greedy_rows = greedy;
      batch.batch_invariant = batch_invariant_;
      batch.masked = masked;
      Ids out(ids.size());
      model_.launch(batch);
      if (masked) model_.choose(rules);
      model_.collect(nullptr, out.data());
      auto token = out.begin();
      for (const std::size_t s : own_) {
        if (s != 2) said.tokens[s].push_back(*token++);
      }
    }
    model_.end_step();
  }

  // Behind the last step, which was of 25 tokens of sequence 2; before the next.
  void draft() {
    Ids ids, states;
    for (std::int32_t i = 0; i < 25; ++i) {
      ids.push_back((i * 11 + 2) % kVocab);
      states.push_back(i);
    }
    const Ids starts = {0, 25}, lengths = {lengths_[2]}, table = pages(2), num_drafts = {3};
    const std::vector<Draw> draws(3);
    DraftBatch batch;
    batch.tokens.token_ids = ids;
    batch.tokens.query_starts = starts;
    batch.tokens.seq_lens = lengths;
    batch.tokens.block_table = table;
    batch.tokens.max_blocks = kPages;
    batch.tokens.batch_invariant = batch_invariant_;
    batch.states = states;
    batch.num_drafts = num_drafts;
    batch.draws = draws;
    said.tokens[2].resize(3);
    model_.draft(batch, said.tokens[2].data());
  }

  Model& model_;
  bool batch_invariant_;
  std::vector<std::size_t> own_;
  std::int32_t lengths_[3] = {0, 0, 0};
};

inline double largest_difference(const Said& a, const Said& b) {
  double largest = 0;
  for (std::size_t s = 0; s < 3; ++s) {
    if (a.logits[s].size() != b.logits[s].size()) return INFINITY;
    for (std::size_t i = 0; i < a.logits[s].size(); ++i) {
      const double difference = std::abs(double{a.logits[s][i]} - b.logits[s][i]);
      if (!std::isfinite(difference)) return INFINITY;
      largest = std::max(largest, difference);
    }
  }
  return largest;
}

/// A placement file's text for 10 experts in layers 1 to 3 on 4 ranks: one expert everywhere, rank 3 with no other.
inline std::string uneven_placement() {
  std::string layers;
  for (int layer = 1; layer <= 3; ++layer) {
    layers += (layer > 1 ? ", \"" : "\"") + std::to_string(layer) + "\": [";
    for (int e = 0; e < 10; ++e) {
      layers += e == 0 ? "" : ", ";
      layers += e == layer ? "[3, 1, 0, 2]" : e % 4 == 1 ? "[0, 2]" : "[" + std::to_string(e % 3) + "]";
    }
    layers += "]";
  }
  return "{\"layers\": {" + layers + "}}";
}

}  // namespace flash_mla::model
