// Tiers under the engine on a GPU: pages that go to the host and come back beside the steps, and how fast.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "checkpoint/config.h"
#include "engine/engine_core.h"
#include "engine_steps.h"
#include "kv/kv_tier.h"
#include "model/model.h"
#include "model/random_checkpoint.h"
#include "model/temporary_directory.h"

namespace flash_mla::model {
namespace {

using Tokens = std::vector<std::int32_t>;

// Kernels on the host take their time.
#ifdef FLASH_MLA_EMULATED
constexpr int kRequests = 12;
#else
constexpr int kRequests = 200;
#endif

struct Case {
  const char* name;
  const char* fields;  // of config.json, besides the common ones
  ModelKvCache cache;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

const Case kCases[] = {
    {"dense",
     R"("model_type": "deepseek_v3", "hidden_size": 64, "intermediate_size": 96, "n_routed_experts": 8,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 1.0, "num_attention_heads": 2,
        "q_lora_rank": 16, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 40)",
     ModelKvCache::kAuto},
#ifndef FLASH_MLA_EMULATED
    {"indexer_fp8",
     R"("model_type": "deepseek_v32", "hidden_size": 256, "intermediate_size": 320, "n_routed_experts": 16,
        "n_shared_experts": 2, "num_experts_per_tok": 4, "moe_intermediate_size": 96, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 1.0, "num_attention_heads": 8,
        "q_lora_rank": 64, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "index_topk": 64, "index_n_heads": 16, "index_head_dim": 128)",
     ModelKvCache::kFp8},
#endif
};

class CudaTiers : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    directory_.write(
        "config.json",
        std::string(R"({"vocab_size": 160, "num_hidden_layers": 2, "max_position_embeddings": 2048, )") +
            GetParam().fields + "}");
    const ModelConfig config = checkpoint::read_config(directory_.path());
    directory_.write("model.safetensors", RandomCheckpoint(config, Stored::kBf16).bytes());
  }

  EngineOptions options(std::vector<std::string> tiers) const {
    EngineOptions o;
    o.num_pages = 48;
    o.max_batch_size = 8;
    o.max_tokens_per_step = 256;
    o.batch_invariant = true;
    o.kv_tiers = std::move(tiers);
    o.kv_tier_wait_seconds = 60;
    return o;
  }
  std::unique_ptr<engine::EngineCore> make(const EngineOptions& o) const {
    ModelOptions options;
    options.device = ModelDevice::kCuda;
    options.kv_cache = GetParam().cache;
    options.cache_pages = o.num_pages;
    return std::make_unique<engine::EngineCore>(load_model(directory_.path(), options),
                                                text::TextDecoderFactory(), Tokens{}, o, nullptr,
                                                weights_digest(directory_.path()));
  }
  static RequestId submit(engine::EngineCore& core, const Tokens& prompt, Tokens& out,
                          Usage* usage = nullptr) {
    Request request;
    request.prompt_token_ids = prompt;
    request.sampling.temperature = 0;
    request.sampling.max_tokens = 8;
    request.sampling.ignore_eos = true;
    return core.submit(std::move(request), [&out, usage](const GenerationEvent& e) {
      EXPECT_EQ(e.error, "");
      out.insert(out.end(), e.token_ids.begin(), e.token_ids.end());
      if (usage != nullptr) *usage = e.usage;
    });
  }
  static void run(engine::EngineCore& core) {
    while (core.step()) {
    }
    EXPECT_EQ(core.stats().pages_used, 0);
  }
  static void wait_until_stored(engine::EngineCore& core, std::int64_t tokens) {
    for (int i = 0; i < 60000 && core.stats().kv_tiers[0].tokens_stored < tokens; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_GE(core.stats().kv_tiers[0].tokens_stored, tokens);
  }

  TemporaryDirectory directory_;
};

INSTANTIATE_TEST_SUITE_P(Models, CudaTiers, testing::ValuesIn(kCases),
                         [](const auto& model) { return std::string(model.param.name); });

TEST_P(CudaTiers, APromptOfOneEngineIsLoadedByTheNext) {
  const EngineOptions o = options({"file:" + (directory_.path() / "tier").string() + ",1GiB"});
  const Tokens prompt = random_tokens(600, 3);
  Tokens first, second;
  {
    const auto core = make(o);
    submit(*core, prompt, first);
    run(*core);
    wait_until_stored(*core, 512);
  }
  const auto core = make(o);
  Usage usage;
  submit(*core, prompt, second, &usage);
  run(*core);
  EXPECT_EQ(usage.cached_tokens, 512);
  EXPECT_EQ(second, first);
}

TEST_P(CudaTiers, ManyRequestsHaveTheSameTokens) {
  std::mt19937 random(5);
  std::vector<Tokens> prompts;
  for (int i = 0; i < kRequests; ++i) {
    Tokens prompt = random_tokens(900, random() % 3);
    prompt.resize(1 + random() % 900);
    const Tokens own = random_tokens(1 + static_cast<int>(random() % 200), 100 + static_cast<unsigned>(i));
    prompt.insert(prompt.end(), own.begin(), own.end());
    prompts.push_back(prompt);
  }
  std::vector<std::vector<Tokens>> results;
  for (const bool with_tier : {false, true}) {
    EngineOptions o = options(with_tier ? std::vector<std::string>{"ram:64MiB"} : std::vector<std::string>{});
    o.num_pages = 24;  // so that the pool forgets
    const auto core = make(o);
    std::vector<Tokens>& out = results.emplace_back(prompts.size());
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      submit(*core, prompts[i], out[i]);
      if (i % 4 == 3) run(*core);
    }
    run(*core);
    if (!with_tier) continue;
    const KvTierStats tier = core->stats().kv_tiers[0];
    std::printf("%lld tokens loaded, %lld stored\n", static_cast<long long>(tier.tokens_loaded),
                static_cast<long long>(tier.tokens_stored));
    EXPECT_GT(tier.tokens_stored, 0);
  }
  EXPECT_EQ(results[1], results[0]);
}

#ifndef FLASH_MLA_EMULATED
double seconds_since(std::chrono::steady_clock::time_point t) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
}

// Pages of the size of V2-Lite's, 8 MB a chunk, beside one copy of the same size within page-locked memory.
TEST(CudaTierRate, CopiesComeNearTheLink) {
  constexpr int kLayers = 27, kChunks = 64, kPages = kChunks * kv::kChunkPages;
  const ModelConfig config = checkpoint::parse_config(
      R"({"model_type": "deepseek_v2", "vocab_size": 160, "hidden_size": 256, "intermediate_size": 256,
          "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": null, "kv_lora_rank": 512,
          "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": null,
          "max_position_embeddings": 32768, "rope_theta": 10000.0})",
      "test");
  ModelOptions options;
  options.device = ModelDevice::kCuda;
  options.cache_pages = kPages;
  const std::unique_ptr<Model> model = make_random_model(config, options);
  model->allocate_cache(kPages);
  const std::size_t chunk = model->bytes_per_page() * kv::kChunkPages;
  EXPECT_EQ(chunk, std::size_t{kLayers} * kv::kChunkTokens * 1152);
  std::vector<Buffer> host;
  host.reserve(kChunks);
  for (int i = 0; i < kChunks; ++i) host.push_back(model->allocate_host(chunk));
  std::vector<std::int32_t> pages(kPages);  // in no order, as a pool has them
  for (int i = 0; i < kPages; ++i) pages[static_cast<std::size_t>(i)] = i * 37 % kPages;

  void* device = nullptr;
  ASSERT_EQ(cudaMalloc(&device, chunk), cudaSuccess);
  for (const bool up : {true, false}) {
    double link = 0, ours = 0;
    const std::unique_ptr<PageCopies> copies = model->make_page_copies();
    for (int repeat = 0; repeat < 5; ++repeat) {
      auto begin = std::chrono::steady_clock::now();
      for (const Buffer& buffer : host) {
        const cudaError_t error =
            up ? cudaMemcpyAsync(device, buffer.data(), chunk, cudaMemcpyHostToDevice, nullptr)
               : cudaMemcpyAsync(buffer.data(), device, chunk, cudaMemcpyDeviceToHost, nullptr);
        ASSERT_EQ(error, cudaSuccess);
      }
      ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
      const double gigabytes = 1e-9 * static_cast<double>(chunk) * kChunks;
      link = std::max(link, gigabytes / seconds_since(begin));
      begin = std::chrono::steady_clock::now();
      for (int i = 0; i < kChunks; ++i) {
        const auto own =
            std::span(pages).subspan(static_cast<std::size_t>(i) * kv::kChunkPages, kv::kChunkPages);
        std::byte* const data = host[static_cast<std::size_t>(i)].data();
        up ? copies->upload(own, data) : copies->download(own, data);
      }
      copies->mark()->wait();
      ours = std::max(ours, gigabytes / seconds_since(begin));
    }
    std::printf("%s: pages %.1f GB/s, one copy %.1f GB/s: %.2f\n", up ? "to the device" : "to the host", ours,
                link, ours / link);
    EXPECT_GE(ours, 0.8 * link);
  }
  cudaFree(device);
}

// What a load of a long prompt costs the steps that run meanwhile.
TEST(CudaTierRate, ALoadIsHiddenUnderSteps) {
  const TemporaryDirectory directory;
  const ModelConfig config = checkpoint::parse_config(
      R"({"model_type": "deepseek_v2", "vocab_size": 1000, "hidden_size": 2048, "intermediate_size": 8192,
          "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": null, "kv_lora_rank": 512,
          "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": null,
          "max_position_embeddings": 32768, "rope_theta": 10000.0})",
      "test");
  EngineOptions o;
  o.num_pages = 2048;
  o.kv_tiers = {"ram:8GiB"};
  o.kv_tier_wait_seconds = 60;
  ModelOptions options;
  options.device = ModelDevice::kCuda;
  options.cache_pages = o.num_pages;
  engine::EngineCore core(make_random_model(config, options), text::TextDecoderFactory(), Tokens{}, o,
                          nullptr, "test");
  std::mt19937 random(3);
  const auto submit = [&](int length, int max_tokens, std::uint32_t seed) {
    random.seed(seed);
    Request request;
    for (int i = 0; i < length; ++i)
      request.prompt_token_ids.push_back(static_cast<std::int32_t>(random() % 1000));
    request.sampling.temperature = 0;
    request.sampling.max_tokens = max_tokens;
    request.sampling.ignore_eos = true;
    return core.submit(std::move(request), {});
  };
  const auto run = [&] {
    while (core.step()) {
    }
  };
  submit(24000, 1, 1);
  run();
  for (std::uint32_t i = 0; i < 6; ++i) submit(24000, 1, 50 + i);  // what the first had in the pool is gone
  run();
  double seconds[2] = {};
  for (const int round : {0, 1, 0, 1}) {
    for (std::uint32_t i = 0; i < 16; ++i) submit(512, 400, 100 + i);
    for (int i = 0; i < 50; ++i) core.step();  // all of them decode
    const std::int64_t loaded = core.stats().kv_tiers[0].tokens_loaded;
    if (round == 1) submit(24000, 1, 1);
    const auto begin = std::chrono::steady_clock::now();
    int steps = 0;
    // Until it has been loaded, or for as many steps as that is likely to take.
    while (round == 1 ? core.stats().kv_tiers[0].tokens_loaded - loaded < 23500 && steps < 300 : steps < 30) {
      core.step();
      ++steps;
    }
    seconds[round] = seconds_since(begin) / steps;
    std::printf("%s: %d steps of %.3f ms\n", round == 1 ? "beside a load of 24,000 tokens" : "alone", steps,
                1e3 * seconds[round]);
    run();
    for (std::uint32_t i = 0; i < 6; ++i) submit(24000, 1, 50 + i);
    run();
  }
  EXPECT_LE(seconds[1], 1.05 * seconds[0]);
}
#endif

}  // namespace
}  // namespace flash_mla::model
