// Drafts on the GPU: the module for multi-token prediction against the CPU's, and text with and without drafts.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/config.h"
#include "engine/engine_core.h"
#include "engine_steps.h"
#include "model/model.h"
#include "model/random_checkpoint.h"
#include "model/temporary_directory.h"

namespace flash_mla::model {
namespace {

using Tokens = std::vector<std::int32_t>;

// Kernels on the host take their time.
#ifdef FLASH_MLA_EMULATED
constexpr int kRequests = 60;
constexpr bool kEmulated = true;
#else
constexpr int kRequests = 1000;
constexpr bool kEmulated = false;
#endif

struct Case {
  std::string name;
  std::string fields;  // of config.json, besides the common ones
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

std::string config_text(const Case& c) {
  return R"({"vocab_size": 160, "num_hidden_layers": 2, "max_position_embeddings": 2048, )" + c.fields + "}";
}

std::vector<Case> cases() {
  const std::string small_heads =
      R"("kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 40)";
  const std::string real_heads =
      R"("kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128)";
  const std::string narrow =
      R"("hidden_size": 64, "intermediate_size": 96, "n_routed_experts": 8, "n_shared_experts": 1,
      "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, )";
  const std::string wide =
      R"("hidden_size": 256, "intermediate_size": 320, "n_routed_experts": 16, "n_shared_experts": 2,
      "num_experts_per_tok": 4, "moe_intermediate_size": 96, "first_k_dense_replace": 1, )";
  const std::string v3 =
      R"("model_type": "deepseek_v3", "n_group": 2, "topk_group": 1, "norm_topk_prob": true,
      "routed_scaling_factor": 1.0, )";
  std::vector<Case> out = {
      // Plain kernels; the module's layer has experts.
      {"small", v3 + narrow + R"("num_attention_heads": 2, "q_lora_rank": 16, )" + small_heads},
      // Dense layers of odd sizes.
      {"dense", R"("model_type": "deepseek_v3", "n_group": 1, "topk_group": 1, "norm_topk_prob": true,
         "routed_scaling_factor": 1.0, "hidden_size": 30, "intermediate_size": 23, "n_routed_experts": 4,
         "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 3,
         "num_attention_heads": 3, "q_lora_rank": 10, )" +
                    small_heads}};
  if (kEmulated) return out;
  // Steps of one token by one kernel; V3's; with an indexer.
  out.push_back(
      {"v2_lite", R"("model_type": "deepseek_v2", "routed_scaling_factor": 1.0, "norm_topk_prob": false,
      "num_attention_heads": 16, "q_lora_rank": null, )" +
                      wide + real_heads});
  out.push_back({"v3", v3 + wide + R"("num_attention_heads": 8, "q_lora_rank": 64, )" + real_heads});
  out.push_back(
      {"v32", R"("model_type": "deepseek_v32", "n_group": 1, "topk_group": 1, "norm_topk_prob": true,
      "routed_scaling_factor": 1.0, "num_attention_heads": 8, "q_lora_rank": 64, "index_topk": 64,
      "index_n_heads": 16, "index_head_dim": 128, )" +
                  wide + real_heads});
  return out;
}

class CudaSpeculation : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    directory_.write("config.json", config_text(GetParam()));
    const ModelConfig config = checkpoint::read_config(directory_.path());
    directory_.write("model.safetensors",
                     RandomCheckpoint(config, Stored::kBf16, /*with_module=*/true).bytes());
  }

  std::unique_ptr<Model> load(ModelDevice device, bool draft_module) const {
    ModelOptions options;
    options.device = device;
    options.precision = device == ModelDevice::kCpu ? ModelPrecision::kFloat32 : ModelPrecision::kBFloat16;
    options.fp8_index_keys = true;
    options.num_threads = 8;
    options.draft_module = draft_module;
    return load_model(directory_.path(), options);
  }

  // A step over tokens [begin, end) of each sequence, then the module over those that follow, with as many drafts behind
  // the last.
  static Tokens step_and_draft(Model& model, const std::vector<Part>& parts, int drafts,
                               std::span<const Draw> draws = {}) {
    forward(model, parts, /*greedy=*/true);
    Tokens next, starts{0}, lengths, table, states;
    std::size_t blocks = 0;
    for (const Part& p : parts) blocks = std::max(blocks, p.sequence->pages.size());
    for (const Part& p : parts) {
      for (int i = p.begin; i < p.end; ++i) {
        states.push_back(static_cast<std::int32_t>(next.size()));
        next.push_back(p.sequence->tokens[static_cast<std::size_t>(i) + 1]);
      }
      starts.push_back(static_cast<std::int32_t>(next.size()));
      lengths.push_back(p.end);
      table.insert(table.end(), p.sequence->pages.begin(), p.sequence->pages.end());
      table.resize(table.size() + blocks - p.sequence->pages.size(), -1);
    }
    const Tokens num_drafts(parts.size(), drafts);
    const std::vector<Draw> greedy(parts.size() * static_cast<std::size_t>(drafts));
    DraftBatch batch;
    batch.tokens.token_ids = next;
    batch.tokens.query_starts = starts;
    batch.tokens.seq_lens = lengths;
    batch.tokens.block_table = table;
    batch.tokens.max_blocks = static_cast<int>(blocks);
    batch.states = states;
    batch.num_drafts = num_drafts;
    batch.draws = draws.empty() ? std::span(greedy) : draws;
    Tokens out(greedy.size(), -7);
    model.draft(batch, out.data());
    return out;
  }

  TemporaryDirectory directory_;
};

// Whole prompts, chunks behind them, few tokens at once, single tokens; alone and beside others. A token where rounding
// decides between two takes the drafts behind it along.
TEST_P(CudaSpeculation, TheModuleDraftsWhatItDraftsOnTheCpu) {
  constexpr int kSequences = 5, kDrafts = 3;
  const auto gpu = load(ModelDevice::kCuda, true), cpu = load(ModelDevice::kCpu, true);
  for (Model* model : {gpu.get(), cpu.get()}) {
    ASSERT_TRUE(model->has_draft_module());
    model->reserve(512, 64);
    model->allocate_cache(40);
  }
  EXPECT_GT(gpu->bytes_per_page(), load(ModelDevice::kCuda, false)->bytes_per_page());
  std::vector<Sequence> sequences;
  for (int i = 0; i < kSequences; ++i) {
    sequences.push_back(
        {random_tokens(200, 80 + static_cast<unsigned>(i)), {4 * i + 3, 4 * i + 1, 4 * i + 2, 4 * i}});
  }
  int same = 0, firsts = 0, all = 0;
  const auto compare = [&](const std::vector<Part>& parts) {
    const Tokens a = step_and_draft(*gpu, parts, kDrafts), b = step_and_draft(*cpu, parts, kDrafts);
    EXPECT_EQ(a, step_and_draft(*gpu, parts, kDrafts)) << "a replayed step";
    for (std::size_t i = 0; i < a.size(); ++i) {
      EXPECT_TRUE(a[i] >= 0 && a[i] < kVocab) << a[i];
      if (i % kDrafts == 0) firsts += a[i] == b[i];
      same += a[i] == b[i];
    }
    all += static_cast<int>(a.size());
  };
  for (const auto& [begin, end] :
       std::vector<std::pair<int, int>>{{0, 70}, {70, 103}, {103, 105}, {105, 108}, {108, 112}}) {
    for (const Sequence& s : sequences) compare({{&s, begin, end}});
  }
  for (int i = 112; i < 128; ++i) {
    std::vector<Part> parts;  // of one to three tokens each
    for (int s = 0; s < kSequences; ++s) {
      const Part part{&sequences[static_cast<std::size_t>(s)], i, i + 1};
      if (i % 2 == 0) {
        parts.push_back(part);
      } else {
        compare({part});
      }
    }
    if (!parts.empty()) compare(parts);
  }
  std::printf("%s: %d of %d first drafts agree, %d of %d of all\n", GetParam().name.c_str(), firsts,
              all / kDrafts, same, all);
  // One that is not the CPU's on purpose would agree once in 160 times.
  EXPECT_GE(firsts, 0.6 * all / kDrafts);
  EXPECT_GE(same, 0.4 * all);
}

// As many drafts as each sequence asks for, none of them another's, whatever the others ask for.
TEST_P(CudaSpeculation, DraftsDoNotDependOnHowManyAreWanted) {
  const auto gpu = load(ModelDevice::kCuda, true);
  gpu->reserve(512, 64);
  gpu->allocate_cache(40);
  const Sequence s{random_tokens(90, 5), {7, 3}};
  const Tokens four = step_and_draft(*gpu, {{&s, 0, 60}}, 4);
  for (int drafts = 1; drafts < 4; ++drafts) {
    const Tokens fewer = step_and_draft(*gpu, {{&s, 0, 60}}, drafts);
    EXPECT_EQ(fewer, Tokens(four.begin(), four.begin() + drafts));
  }
}

using engine::Continuation;
using engine::Drafter;
using engine::EngineCore;
using Speculative = EngineOptions::Speculative;

struct Letters : text::TextDecoder {
  std::string push(std::int32_t token) override {
    return {static_cast<char>('a' + token / 26 % 26), static_cast<char>('a' + token % 26)};
  }
  std::string flush() override { return {}; }
};

struct Text {
  Tokens tokens;
  std::string text, error;
  FinishReason finish = FinishReason::kNone;
  std::vector<float> logprobs;
  Usage usage;
};
using Texts = std::map<std::pair<RequestId, int>, Text>;

// Knows every text: says how it goes on, or something else.
class Oracle : public Drafter {
 public:
  Oracle(const Texts& texts, bool truth) : texts_(texts), truth_(truth) {}
  std::vector<std::int32_t> draft(const Continuation& c, int count) override {
    const Tokens& text = texts_.at({c.request->id, c.index}).tokens;
    Tokens out;
    for (auto i = static_cast<std::size_t>(c.num_generated); i < text.size() && std::ssize(out) < count;
         ++i) {
      out.push_back(truth_ ? text[i] : (text[i] + 1) % kVocab);
    }
    return out;
  }

 private:
  const Texts& texts_;
  bool truth_;
};

std::vector<Request> requests() {
  std::mt19937 random(17);
  const auto one_in = [&](unsigned n) { return random() % n == 0; };
  std::vector<Request> out;
  for (int i = 0; i < kRequests; ++i) {
    Request& r = out.emplace_back();
    r.prompt_token_ids =
        random_tokens(1 + static_cast<int>(random() % 90), random() % 8);  // some share beginnings
    if (one_in(2)) {                                                       // what n-grams find again
      const Tokens again = random_tokens(6, random());
      for (int k = 0; k < 3; ++k)
        r.prompt_token_ids.insert(r.prompt_token_ids.end(), again.begin(), again.end());
    }
    SamplingParams& p = r.sampling;
    p.max_tokens = 1 + static_cast<int>(random() % (one_in(3) ? 180 : 30));
    p.temperature = std::vector<double>{0, 0, 0.05, 1}[random() % 4];
    p.seed = random();
    p.ignore_eos = true;
    if (one_in(3)) p.top_p = 0.9;
    if (one_in(4)) p.top_k = 20;
    if (one_in(5)) p.min_p = 0.02;
    if (one_in(6)) p.repetition_penalty = 1.1;
    if (one_in(6)) p.frequency_penalty = 0.4;
    if (one_in(6)) p.presence_penalty = 0.4;
    if (one_in(5)) p.stop = {"a", "cb"};
    if (one_in(6)) p.stop_token_ids = {static_cast<std::int32_t>(random() % kVocab), 9};
    if (one_in(6)) p.logprobs = 2;
    if (one_in(8)) p.prompt_logprobs = 1;
    if (one_in(6)) p.min_tokens = p.max_tokens / 2;
    if (one_in(8)) p.logit_bias = {{static_cast<std::int32_t>(random() % kVocab), 4}};
    if (one_in(8)) p.bad_token_ids = {{3, 5}, {8}};
    if (one_in(8)) p.n = 2;
  }
  return out;
}

struct Outcome {
  Texts texts;
  EngineStats stats;
};

bool is_cancelled(RequestId id) { return id % 13 == 5; }

// All requests, one more of them with every step. Some are cancelled after a few tokens.
Outcome run(std::unique_ptr<Model> model, const EngineOptions& options,
            std::unique_ptr<Drafter> drafter = nullptr) {
  EngineCore core(
      std::move(model), [] { return std::make_unique<Letters>(); }, {0}, options, std::move(drafter));
  Outcome out;
  std::size_t next = 0;
  const std::vector<Request> all = requests();
  const auto take = [&](const GenerationEvent& e) {
    Text& t = out.texts[{e.request, e.index}];
    t.tokens.insert(t.tokens.end(), e.token_ids.begin(), e.token_ids.end());
    for (const TokenLogprobs& l : e.logprobs) t.logprobs.push_back(static_cast<float>(l.chosen.logprob));
    t.text += e.text;
    t.finish = e.finish;
    t.error = e.error;
    t.usage = e.usage;
    if (is_cancelled(e.request) && t.tokens.size() > 4) core.cancel(e.request);
  };
  for (bool busy = true; busy || next < all.size();) {
    if (next < all.size()) core.submit(all[next++], take);
    busy = core.step();
  }
  out.stats = core.stats();
  return out;
}

void expect_same(const Texts& expected, const Texts& out) {
  ASSERT_EQ(expected.size(), out.size());
  for (const auto& [key, a] : expected) {
    SCOPED_TRACE("request " + std::to_string(key.first) + ", continuation " + std::to_string(key.second));
    const Text& b = out.at(key);
    if (is_cancelled(key.first)) {  // when the news comes is a matter of time
      const std::size_t both = std::min(a.tokens.size(), b.tokens.size());
      EXPECT_TRUE(std::equal(a.tokens.begin(), a.tokens.begin() + static_cast<std::ptrdiff_t>(both),
                             b.tokens.begin()));
      continue;
    }
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_EQ(a.text, b.text);
    EXPECT_EQ(a.finish, b.finish);
    EXPECT_EQ(a.error, b.error);
    EXPECT_EQ(a.logprobs, b.logprobs);
    EXPECT_EQ(a.usage.prompt_tokens, b.usage.prompt_tokens);
    EXPECT_EQ(a.usage.completion_tokens, b.usage.completion_tokens);
  }
}

void expect_nothing_left(const EngineStats& stats) {
  EXPECT_EQ(stats.pages_used, 0);
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_EQ(stats.failed, 0);
}

EngineOptions options_of(Speculative speculative, int draft_tokens) {
  EngineOptions o;
  o.device = EngineOptions::Device::kCuda;
  o.num_pages = 12;  // too few for as many as there is room for otherwise
  o.max_batch_size = 12;
  o.max_tokens_per_step = 64;
  o.batch_invariant = true;
  o.speculative = speculative;
  o.draft_tokens = draft_tokens;
  return o;
}

TEST_P(CudaSpeculation, DraftsChangeNoText) {
  const Outcome off = run(load(ModelDevice::kCuda, false), options_of(Speculative::kOff, 3));
  expect_nothing_left(off.stats);
  EXPECT_EQ(off.stats.ngram_drafts.steps + off.stats.mtp_drafts.steps, 0);
  const auto compare = [&](const char* what, Speculative speculative, int draft_tokens,
                           std::unique_ptr<Drafter> drafter = nullptr) {
    SCOPED_TRACE(what);
    const bool with_module = speculative != Speculative::kNgram;
    const Outcome on =
        run(load(ModelDevice::kCuda, with_module), options_of(speculative, draft_tokens), std::move(drafter));
    expect_same(off.texts, on.texts);
    expect_nothing_left(on.stats);
    const DraftStats &n = on.stats.ngram_drafts, &m = on.stats.mtp_drafts;
    std::printf("%s %s: n-grams %lld of %lld accepted, module %lld of %lld, %lld steps against %lld\n",
                GetParam().name.c_str(), what, static_cast<long long>(n.accepted),
                static_cast<long long>(n.drafted), static_cast<long long>(m.accepted),
                static_cast<long long>(m.drafted), static_cast<long long>(on.stats.steps),
                static_cast<long long>(off.stats.steps));
    return on.stats;
  };
  EXPECT_GT(compare("n-grams", Speculative::kNgram, 4).ngram_drafts.drafted, 0);
  EXPECT_GT(compare("module", Speculative::kMtp, 3).mtp_drafts.drafted, 0);
  compare("auto", Speculative::kAuto, 2);
  const DraftStats truth =
      compare("truth", Speculative::kNgram, 3, std::make_unique<Oracle>(off.texts, true)).ngram_drafts;
  EXPECT_GT(truth.drafted, 0);
  EXPECT_EQ(truth.accepted, truth.drafted);
  const DraftStats lies =
      compare("lies", Speculative::kNgram, 3, std::make_unique<Oracle>(off.texts, false)).ngram_drafts;
  EXPECT_GT(lies.drafted, truth.drafted);
  EXPECT_EQ(lies.accepted, 0);
}

INSTANTIATE_TEST_SUITE_P(Models, CudaSpeculation, testing::ValuesIn(cases()),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace flash_mla::model
