// The module for multi-token prediction against its formula in float64: a tiny model whose layers are dense, written down
// as plainly as it can be.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "flash_mla/error.h"
#include "model/model.h"
#include "safetensors_file.h"
#include "temporary_directory.h"

namespace flash_mla::model {
namespace {

using Vector = std::vector<double>;
using Vectors = std::vector<Vector>;
using Ids = std::vector<std::int32_t>;

constexpr std::int64_t kVocab = 40, kHidden = 24, kHeads = 3, kNope = 6, kRope = 4, kV = 5, kRank = 16,
                       kQRank = 10, kWide = 20;
constexpr int kLayers = 2;
constexpr const char* kConfig = R"({
  "model_type": "deepseek_v3", "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20,
  "moe_intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "q_lora_rank": 10,
  "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 4,
  "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "norm_topk_prob": true,
  "routed_scaling_factor": 1.5, "first_k_dense_replace": 3, "max_position_embeddings": 256,
  "rope_theta": 10000.0, "rms_norm_eps": 1e-6})";

class Weights {
 public:
  Weights() {
    matrix("model.embed_tokens", kVocab, kHidden);
    matrix("lm_head", kVocab, kHidden);
    norm("model.norm", kHidden);
    for (int i = 0; i <= kLayers; ++i) layer("model.layers." + std::to_string(i));
    const std::string module = "model.layers." + std::to_string(kLayers);
    for (const char* name : {".enorm", ".hnorm", ".shared_head.norm"}) norm(module + name, kHidden);
    matrix(module + ".eh_proj", kHidden, 2 * kHidden);
  }

  const std::vector<float>& at(const std::string& name) const { return values_.at(name + ".weight"); }
  /// `without`: a tensor that is missing; `misshapen`: one that has a row too few.
  std::string bytes(bool with_module, const std::string& without = "",
                    const std::string& misshapen = "") const {
    SafetensorsFile file;
    for (const auto& [name, values] : values_) {
      const bool of_module = name.starts_with("model.layers." + std::to_string(kLayers));
      if ((of_module && !with_module) || name == without) continue;
      std::vector<std::int64_t> shape = shapes_.at(name);
      std::vector<float> kept = values;
      if (name == misshapen) {
        kept.resize(kept.size() / static_cast<std::size_t>(shape[0]) *
                    static_cast<std::size_t>(shape[0] - 1));
        --shape[0];
      }
      file.add(name, "F32", shape, kept);
    }
    return file.bytes();
  }

  // y = W x
  Vector multiply(const std::string& name, const Vector& x) const {
    const std::vector<float>& w = at(name);
    Vector y(w.size() / x.size(), 0.0);
    for (std::size_t i = 0; i < y.size(); ++i) {
      for (std::size_t j = 0; j < x.size(); ++j) y[i] += double{w[i * x.size() + j]} * x[j];
    }
    return y;
  }
  Vector rms_norm(const std::string& name, const Vector& x) const {
    double sum = 0;
    for (const double v : x) sum += v * v;
    Vector y = x;
    for (std::size_t i = 0; i < y.size(); ++i) {
      y[i] *= double{at(name)[i]} / std::sqrt(sum / static_cast<double>(x.size()) + 1e-6);
    }
    return y;
  }

 private:
  void layer(const std::string& name) {
    norm(name + ".input_layernorm", kHidden);
    norm(name + ".post_attention_layernorm", kHidden);
    const std::string a = name + ".self_attn";
    matrix(a + ".q_a_proj", kQRank, kHidden);
    norm(a + ".q_a_layernorm", kQRank);
    matrix(a + ".q_b_proj", kHeads * (kNope + kRope), kQRank);
    matrix(a + ".kv_a_proj_with_mqa", kRank + kRope, kHidden);
    norm(a + ".kv_a_layernorm", kRank);
    matrix(a + ".kv_b_proj", kHeads * (kNope + kV), kRank);
    matrix(a + ".o_proj", kHidden, kHeads * kV);
    matrix(name + ".mlp.gate_proj", kWide, kHidden);
    matrix(name + ".mlp.up_proj", kWide, kHidden);
    matrix(name + ".mlp.down_proj", kHidden, kWide);
  }
  void matrix(const std::string& name, std::int64_t rows, std::int64_t columns) {
    std::normal_distribution<float> normal(0, 2 / std::sqrt(static_cast<float>(columns)));
    add(name, {rows, columns}, [&] { return normal(random_); });
  }
  void norm(const std::string& name, std::int64_t size) {
    std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
    add(name, {size}, [&] { return uniform(random_); });
  }
  template <class F>
  void add(const std::string& name, std::vector<std::int64_t> shape, F value) {
    std::int64_t size = 1;
    for (const std::int64_t n : shape) size *= n;
    std::vector<float>& to = values_[name + ".weight"];
    while (std::ssize(to) < size) to.push_back(value());
    shapes_[name + ".weight"] = std::move(shape);
  }

  std::map<std::string, std::vector<float>> values_;
  std::map<std::string, std::vector<std::int64_t>> shapes_;
  std::mt19937 random_{2};
};

void rotate(double* x, int position) {
  for (std::int64_t i = 0; i < kRope / 2; ++i) {
    const double angle =
                     position * std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(kRope)),
                 c = std::cos(angle), s = std::sin(angle);
    const double a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * c - b * s;
    x[2 * i + 1] = a * s + b * c;
  }
}

// A decoder layer over all of a sequence.
Vectors layer(const Weights& w, const std::string& name, Vectors x) {
  const std::string a = name + ".self_attn";
  const auto count = x.size();
  Vectors q(count), keys(count), kv(count);
  for (std::size_t t = 0; t < count; ++t) {
    const Vector h = w.rms_norm(name + ".input_layernorm", x[t]);
    q[t] = w.multiply(a + ".q_b_proj", w.rms_norm(a + ".q_a_layernorm", w.multiply(a + ".q_a_proj", h)));
    for (int i = 0; i < kHeads; ++i) {
      rotate(q[t].data() + i * (kNope + kRope) + kNope, static_cast<int>(t));
    }
    const Vector latent = w.multiply(a + ".kv_a_proj_with_mqa", h);
    keys[t].assign(latent.begin() + kRank, latent.end());
    rotate(keys[t].data(), static_cast<int>(t));
    kv[t] = w.multiply(a + ".kv_b_proj",
                       w.rms_norm(a + ".kv_a_layernorm", {latent.begin(), latent.begin() + kRank}));
  }
  for (std::size_t t = 0; t < count; ++t) {
    Vector attended(kHeads * kV, 0.0);
    for (int head = 0; head < kHeads; ++head) {
      Vector weights(t + 1);
      double sum = 0;
      for (std::size_t j = 0; j <= t; ++j) {
        double score = 0;
        for (int i = 0; i < kNope; ++i) {
          score += q[t][static_cast<std::size_t>(head * (kNope + kRope) + i)] *
                   kv[j][static_cast<std::size_t>(head * (kNope + kV) + i)];
        }
        for (int i = 0; i < kRope; ++i) {
          score += q[t][static_cast<std::size_t>(head * (kNope + kRope) + kNope + i)] *
                   keys[j][static_cast<std::size_t>(i)];
        }
        sum += weights[j] = std::exp(score / std::sqrt(static_cast<double>(kNope + kRope)));
      }
      for (std::size_t j = 0; j <= t; ++j) {
        for (int i = 0; i < kV; ++i) {
          attended[static_cast<std::size_t>(head * kV + i)] +=
              weights[j] / sum * kv[j][static_cast<std::size_t>(head * (kNope + kV) + kNope + i)];
        }
      }
    }
    const Vector o = w.multiply(a + ".o_proj", attended);
    for (std::size_t i = 0; i < o.size(); ++i) x[t][i] += o[i];
    const Vector h = w.rms_norm(name + ".post_attention_layernorm", x[t]);
    Vector gate = w.multiply(name + ".mlp.gate_proj", h);
    const Vector up = w.multiply(name + ".mlp.up_proj", h);
    for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
    const Vector down = w.multiply(name + ".mlp.down_proj", gate);
    for (std::size_t i = 0; i < down.size(); ++i) x[t][i] += down[i];
  }
  return x;
}

Vector embedding(const Weights& w, std::int32_t token) {
  const auto begin = w.at("model.embed_tokens").begin() + std::ptrdiff_t{token} * kHidden;
  return {begin, begin + kHidden};
}

struct Draft {
  std::int32_t token;
  double margin;  // to the second likeliest
};

// What the module drafts behind tokens [0, n], of which the model has seen all but the last.
std::vector<Draft> reference(const Weights& w, const Ids& tokens, int drafts) {
  const std::string module = "model.layers." + std::to_string(kLayers);
  Vectors states;
  for (std::size_t i = 0; i + 1 < tokens.size(); ++i) states.push_back(embedding(w, tokens[i]));
  for (int i = 0; i < kLayers; ++i) states = layer(w, "model.layers." + std::to_string(i), states);
  for (Vector& h : states) h = w.rms_norm("model.norm", h);
  Ids all = tokens;
  std::vector<Draft> out;
  for (int d = 0; d < drafts; ++d) {
    Vectors x;
    for (std::size_t i = 0; i < states.size(); ++i) {
      Vector joined = w.rms_norm(module + ".enorm", embedding(w, all[i + 1]));
      const Vector state = w.rms_norm(module + ".hnorm", states[i]);
      joined.insert(joined.end(), state.begin(), state.end());
      x.push_back(w.multiply(module + ".eh_proj", joined));
    }
    const Vector own = w.rms_norm(module + ".shared_head.norm", layer(w, module, x).back());
    const Vector logits = w.multiply("lm_head", own);
    const auto best = std::ranges::max_element(logits);
    double second = -1e30;
    for (auto it = logits.begin(); it != logits.end(); ++it)
      second = it == best ? second : std::max(second, *it);
    out.push_back({static_cast<std::int32_t>(best - logits.begin()), *best - second});
    all.push_back(out.back().token);
    states.push_back(own);
  }
  return out;
}

class Mtp : public testing::Test {
 protected:
  std::unique_ptr<Model> load(bool with_module, bool wanted = true) {
    return load(weights_.bytes(with_module), wanted);
  }
  std::unique_ptr<Model> load(const std::string& bytes, bool wanted) {
    directory_.write("config.json", kConfig);
    directory_.write("model.safetensors", bytes);
    ModelOptions options;
    options.device = ModelDevice::kCpu;
    options.precision = ModelPrecision::kFloat32;
    options.num_threads = 2;
    options.draft_module = wanted;
    auto model = load_model(directory_.path(), options);
    model->allocate_cache(8);
    return model;
  }

  // One step over tokens [begin, size - 1) of a sequence, then drafts behind the last.
  static Ids step(Model& model, const Ids& tokens, std::size_t begin, const Ids& pages, int drafts) {
    const Ids ids(tokens.begin() + static_cast<std::ptrdiff_t>(begin), tokens.end() - 1);
    const Ids next(tokens.begin() + static_cast<std::ptrdiff_t>(begin) + 1, tokens.end());
    const auto count = static_cast<std::int32_t>(ids.size());
    const Ids starts = {0, count}, lengths = {static_cast<std::int32_t>(tokens.size()) - 1},
              rows = {count - 1};
    ForwardBatch batch;
    batch.token_ids = ids;
    batch.query_starts = starts;
    batch.seq_lens = lengths;
    batch.block_table = pages;
    batch.max_blocks = static_cast<int>(pages.size());
    batch.greedy_rows = rows;
    std::int32_t token = 0;
    model.forward(batch, nullptr, &token);
    DraftBatch draft;
    draft.tokens = batch;
    draft.tokens.token_ids = next;
    Ids states;
    for (std::int32_t i = 0; i < count; ++i) states.push_back(i);
    const Ids num_drafts = {drafts};
    const std::vector<Draw> draws(static_cast<std::size_t>(drafts));
    draft.states = states;
    draft.num_drafts = num_drafts;
    draft.draws = draws;
    Ids out(draws.size());
    model.draft(draft, out.data());
    return out;
  }

  TemporaryDirectory directory_;
  Weights weights_;
};

TEST_F(Mtp, DraftsWhatItsFormulaSays) {
  const auto model = load(/*with_module=*/true);
  ASSERT_TRUE(model->has_draft_module());
  std::mt19937 random(3);
  int compared = 0;
  for (int round = 0; round < 40; ++round) {
    const std::size_t length = 2 + random() % 70;
    Ids tokens;
    while (tokens.size() < length) tokens.push_back(static_cast<std::int32_t>(random() % kVocab));
    const Ids pages = {static_cast<std::int32_t>(random() % 4), 4 + static_cast<std::int32_t>(random() % 4)};
    // Whole, or cut in two: the module's cache then has the first part already.
    const std::size_t cut = round % 2 == 0 ? 0 : random() % (length - 1);
    if (cut > 0)
      step(*model, {tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(cut) + 1}, 0, pages, 2);
    const Ids drafts = step(*model, tokens, cut, pages, 4);
    const std::vector<Draft> expected = reference(weights_, tokens, 4);
    for (std::size_t i = 0; i < 4 && expected[i].margin > 1e-3; ++i, ++compared) {
      ASSERT_EQ(drafts[i], expected[i].token) << "length " << length << ", cut at " << cut << ", draft " << i;
    }
  }
  EXPECT_GT(compared, 140);
}

TEST_F(Mtp, ACheckpointWithoutAModuleWorksAsBefore) {
  const auto without = load(/*with_module=*/false);
  EXPECT_FALSE(without->has_draft_module());
  EXPECT_THROW(without->draft({}, nullptr), std::logic_error);
  const std::size_t bytes = without->bytes_per_page();
  EXPECT_FALSE(load(/*with_module=*/true, /*wanted=*/false)->has_draft_module());
  EXPECT_EQ(load(true)->bytes_per_page(), bytes / kLayers * (kLayers + 1));
}

TEST_F(Mtp, NamesTensorsThatAreMissingOrMisshapen) {
  const std::string module = "model.layers." + std::to_string(kLayers);
  for (const char* part : {".enorm", ".hnorm", ".shared_head.norm", ".input_layernorm",
                           ".self_attn.kv_b_proj", ".mlp.up_proj", ".eh_proj"}) {
    const std::string name = module + part + ".weight";
    if (name != module + ".eh_proj.weight") {  // without it there is no module
      const std::string missing =
          message_of<InvalidArgument>([&] { load(weights_.bytes(true, name), /*wanted=*/true); });
      EXPECT_NE(missing.find(name), std::string::npos) << missing;
    }
    const std::string misshapen =
        message_of<InvalidArgument>([&] { load(weights_.bytes(true, "", name), /*wanted=*/true); });
    EXPECT_NE(misshapen.find(name), std::string::npos) << misshapen;
    load(weights_.bytes(true, "", name), /*wanted=*/false);  // nobody reads it
  }
}

TEST_F(Mtp, RefusesWhatIsOutOfRange) {
  const auto model = load(/*with_module=*/true);
  const Ids tokens = {1, 2, 3, 4}, pages = {0};
  step(*model, tokens, 0, pages, 1);
  const Ids ids = {2}, starts = {0, 1}, lengths = {1}, states = {3}, one = {1}, negative = {-1};
  DraftBatch draft;
  draft.tokens.token_ids = ids;
  draft.tokens.query_starts = starts;
  draft.tokens.seq_lens = lengths;
  draft.tokens.block_table = pages;
  draft.tokens.max_blocks = 1;
  draft.states = states;  // the step had three tokens
  draft.num_drafts = one;
  const std::vector<Draw> draws(1);
  draft.draws = draws;
  std::int32_t out = 0;
  EXPECT_THROW(model->draft(draft, &out), InvalidArgument);
  const Ids good = {0};
  draft.states = good;
  model->draft(draft, &out);
  draft.num_drafts = negative;
  EXPECT_THROW(model->draft(draft, &out), InvalidArgument);
  draft.num_drafts = {};
  EXPECT_THROW(model->draft(draft, &out), InvalidArgument);
  draft.num_drafts = one;
  draft.draws = {};
  EXPECT_THROW(model->draft(draft, &out), InvalidArgument);
}

}  // namespace
}  // namespace flash_mla::model
