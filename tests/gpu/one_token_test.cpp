// All layers for one token in one kernel, against fp64 sums on the host that round where the kernel does; and for a
// few tokens of a sequence, against the same tokens one by one.

#include "kernels/fused/sm90/one_token.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/moe/cpu/router.h"
#include "model/device/cuda/one_token_config.h"
#include "model_data.h"

namespace flash_mla::gpu_test {
namespace {

using checkpoint::ModelConfig;
using sm90::OneToken;
using sm90::OneTokenLayer;

constexpr int kRank = 512, kRope = 64, kKey = kRank + kRope, kPage = 64, kTokens = sm90::kMaxOneTokens;
using Bits = std::vector<std::uint16_t>;

struct Shape {
  const char* name;
  int hidden, heads, nope, v;
  int experts, chosen, shared, width;  // no experts: every layer is dense
  int intermediate, layers, dense_layers;
  int len;
};

const Shape kShapes[] = {
    {"V2Lite", 2048, 16, 128, 128, 8, 6, 2, 1408, 10944, 3, 1, 1030},
    {"OneKey", 264, 3, 64, 40, 10, 3, 1, 72, 104, 3, 1, 1},
    {"OddSizes", 264, 3, 64, 40, 10, 3, 1, 72, 104, 4, 2, 33},
    {"FewSplits", 1000, 5, 32, 48, 70, 5, 0, 168, 0, 3, 0, 70},
    {"OneHead", 136, 1, 128, 8, 0, 0, 0, 0, 4104, 3, 3, 700},
    {"Groups", 512, 8, 32, 64, 64, 4, 1, 136, 0, 3, 0, 257},
    {"LongContext", 256, 16, 128, 128, 16, 4, 2, 96, 320, 3, 1, 5000},
    {"MostSplits", 256, 13, 64, 64, 16, 12, 4, 8, 320, 2, 1, 8192},
};

ModelConfig configuration(const Shape& s, bool groups) {
  ModelConfig c;
  c.hidden_size = s.hidden;
  c.intermediate_size = s.intermediate;
  c.num_hidden_layers = s.layers;
  c.num_attention_heads = s.heads;
  c.qk_nope_head_dim = s.nope;
  c.v_head_dim = s.v;
  c.n_routed_experts = s.experts;
  c.n_shared_experts = s.shared;
  c.num_experts_per_tok = s.chosen;
  c.moe_intermediate_size = s.width;
  c.first_k_dense_replace = s.dense_layers;
  if (groups) {
    c.n_group = 8;
    c.topk_group = 4;
    c.norm_topk_prob = true;
    c.routed_scaling_factor = 2.5;
    c.scoring_func = ScoringFunc::kSigmoid;
    c.topk_method = TopkMethod::kNoAuxTc;
  }
  return c;
}

float round_bf16(double x) { return from_bf16(to_bf16(static_cast<float>(x))); }

template <class T>
std::vector<T> joined(std::vector<T> a, const std::vector<T>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// A layer's weights on host and device.
struct LayerData {
  LayerData(Random& random, const ModelConfig& c, bool mixture)
      : is_mixture(mixture),
        qkv(weight(random, c.num_attention_heads * (c.qk_nope_head_dim + kRope) + kKey, c.hidden_size)),
        w_uk(weight(random, c.num_attention_heads * kRank, c.qk_nope_head_dim)),
        w_uv(weight(random, c.num_attention_heads * c.v_head_dim, kRank)),
        o(weight(random, c.hidden_size, c.num_attention_heads * c.v_head_dim)),
        gate_up(weight(random, ffns(c) * 2 * width(c), c.hidden_size)),
        down(weight(random, ffns(c) * c.hidden_size, width(c))),
        input_norm(norm(random, c.hidden_size)),
        post_norm(norm(random, c.hidden_size)),
        kv_norm(norm(random, kRank)),
        router(random.fp32(std::size_t(std::max(c.n_routed_experts, 1)) * c.hidden_size,
                           4 / std::sqrt(float(c.hidden_size)))),
        correction(random.fp32(std::size_t(std::max(c.n_routed_experts, 1)), 0.1f)),
        qkv_device(qkv),
        w_uk_device(w_uk),
        w_uv_device(w_uv),
        o_device(o),
        gate_up_device(gate_up),
        down_device(down),
        input_norm_device(input_norm),
        post_norm_device(post_norm),
        kv_norm_device(kv_norm),
        router_device(router),
        correction_device(correction),
        ids(std::size_t(kTokens * (c.num_experts_per_tok + c.n_shared_experts) + 1)) {}

  static Bits weight(Random& random, int rows, int k) {
    return random.bf16(std::size_t(rows) * k, 1 / std::sqrt(float(k)));
  }
  static std::vector<float> norm(Random& random, int n) {
    std::vector<float> v = random.fp32(std::size_t(n), 0.1f);
    for (float& x : v) x += 1;
    return v;
  }
  int ffns(const ModelConfig& c) const { return is_mixture ? c.n_routed_experts + c.n_shared_experts : 1; }
  int width(const ModelConfig& c) const { return is_mixture ? c.moe_intermediate_size : c.intermediate_size; }

  bool is_mixture;
  Bits qkv, w_uk, w_uv, o, gate_up, down;
  std::vector<float> input_norm, post_norm, kv_norm, router, correction;
  OnDevice<std::uint16_t> qkv_device, w_uk_device, w_uv_device, o_device, gate_up_device, down_device;
  OnDevice<float> input_norm_device, post_norm_device, kv_norm_device, router_device, correction_device;
  OnDevice<std::int32_t> ids;
};

using Row = std::vector<double>;

double dot(const std::uint16_t* w, const Row& x, std::size_t first, std::size_t n) {
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += double(from_bf16(w[i])) * x[first + i];
  return sum;
}

Row normalised(const Row& x, std::size_t first, std::size_t n, const std::vector<float>& weight, double eps) {
  double square = 0;
  for (std::size_t i = 0; i < n; ++i) square += x[first + i] * x[first + i];
  const double factor = 1 / std::sqrt(square / double(n) + eps);
  Row out(n);
  for (std::size_t i = 0; i < n; ++i) out[i] = double(round_bf16(x[first + i] * factor * weight[i]));
  return out;
}

class OneTokenTest : public testing::TestWithParam<Shape> {
 protected:
  OneTokenTest()
      : random_(61),
        more_(62),
        config_(configuration(GetParam(), std::string(GetParam().name) == "Groups")),
        pages_((GetParam().len + kTokens - 1 + kPage - 1) / kPage + 3),
        x_before_(joined(random_.bf16(std::size_t(config_.hidden_size), 1.0f),
                         more_.bf16(std::size_t((kTokens - 1) * config_.hidden_size), 1.0f))),
        x_(x_before_),
        cosines_(joined(random_.fp32(kRope / 2, 0.7f), more_.fp32((kTokens - 1) * kRope / 2, 0.7f))),
        sines_(joined(random_.fp32(kRope / 2, 0.7f), more_.fp32((kTokens - 1) * kRope / 2, 0.7f))),
        cosines_device_(cosines_),
        sines_device_(sines_),
        workspace_(sm90::one_token_workspace_size()) {
    const int len = GetParam().len;
    table_.resize(std::size_t(pages_));
    std::iota(table_.begin(), table_.end(), 0);
    for (int i = 0; i < pages_; ++i)
      std::swap(table_[std::size_t(i)], table_[std::size_t(i + random_.below(pages_ - i))]);
    for (int i = 0; i < kTokens; ++i) slots_.push_back(slot_of(len - 1 + i)), lens_.push_back(len + i);
    slot_ = slots_[0];
    for (int i = 0; i < config_.num_hidden_layers; ++i) {
      layers_.push_back(std::make_unique<LayerData>(random_, config_, config_.is_moe_layer(i)));
      // What no key may be read from is NaN: the tokens' own slots, those behind them, other pages.
      Bits cache(std::size_t(pages_) * kPage * kKey, 0x7FC0);
      for (int key = 0; key < len - 1; ++key) {
        const Bits row = random_.bf16(kKey, 1.0f);
        std::copy(row.begin(), row.end(), cache.begin() + slot_of(key) * kKey);
      }
      caches_.push_back(std::make_unique<OnDevice<std::uint16_t>>(cache));
      cache_before_.push_back(std::move(cache));
    }
    // Entries behind the sequence's pages may be anything.
    std::fill(table_.begin() + (len + kTokens - 1 + kPage - 1) / kPage, table_.end(), 2147480000);
    table_device_ = std::make_unique<OnDevice<std::int32_t>>(table_);
    len_device_ = std::make_unique<OnDevice<std::int32_t>>(lens_);
    slot_device_ = std::make_unique<OnDevice<std::int64_t>>(slots_);
    check(cudaMemset(workspace_.get(), 0, sm90::one_token_workspace_size()), "cudaMemset");
  }

  std::int64_t slot_of(int key) const {
    return std::int64_t{table_[std::size_t(key / kPage)]} * kPage + key % kPage;
  }

  /// Of `count` tokens, the first of them the `first`-th.
  OneToken arguments(int first = 0, int count = 1) const {
    OneToken a = model::one_token_of(config_);
    a.num_tokens = count;
    a.softmax_scale = kScale;
    a.cosines = cosines_device_.get() + first * (kRope / 2);
    a.sines = sines_device_.get() + first * (kRope / 2);
    a.slot = slot_device_->get() + first;
    a.len = len_device_->get() + first;
    a.table = table_device_->get();
    a.x = x_.get() + first * config_.hidden_size;
    a.workspace = workspace_.get();
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const LayerData& l = *layers_[i];
      OneTokenLayer& to = a.layers[i];
      to.qkv = l.qkv_device.get();
      to.w_uk = l.w_uk_device.get();
      to.w_uv = l.w_uv_device.get();
      to.o = l.o_device.get();
      to.input_norm = l.input_norm_device.get();
      to.post_attention_norm = l.post_norm_device.get();
      to.kv_norm = l.kv_norm_device.get();
      to.cache = caches_[i]->get();
      to.gate_up = l.gate_up_device.get();
      to.down = l.down_device.get();
      if (!l.is_mixture) continue;
      to.router = l.router_device.get();
      to.correction = config_.topk_method == TopkMethod::kNoAuxTc ? l.correction_device.get() : nullptr;
      to.ids = l.ids.get() + first * width();
    }
    return a;
  }
  int width() const { return config_.num_experts_per_tok + config_.n_shared_experts; }

  Bits run(const OneToken& a) {
    x_.upload(x_before_);
    check(sm90::one_token(a, nullptr), "one_token");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    return x_.host();
  }

  /// What the layer makes of x; the key that it appends and the experts that it takes.
  void layer(std::size_t index, Row& x, Bits& key, std::vector<std::int32_t>& ids) const {
    const LayerData& l = *layers_[index];
    const std::size_t hidden = x.size(), heads = std::size_t(config_.num_attention_heads);
    const std::size_t nope = std::size_t(config_.qk_nope_head_dim), v = std::size_t(config_.v_head_dim);
    const Row h = normalised(x, 0, hidden, l.input_norm, config_.rms_norm_eps);
    Row qkv(heads * (nope + kRope) + kKey);
    for (std::size_t i = 0; i < qkv.size(); ++i)
      qkv[i] = double(round_bf16(dot(&l.qkv[i * hidden], h, 0, hidden)));
    const auto turned = [&](std::size_t first, std::size_t i) {
      const std::size_t pair = i / 2;
      const double a = qkv[first + 2 * pair], b = qkv[first + 2 * pair + 1];
      const double c = double(cosines_[pair]), s = double(sines_[pair]);
      return double(round_bf16(i % 2 == 0 ? a * c - b * s : b * c + a * s));
    };
    const std::size_t kv = heads * (nope + kRope);
    Row own = normalised(qkv, kv, kRank, l.kv_norm, checkpoint::kLatentNormEps);
    for (std::size_t i = 0; i < kRope; ++i) own.push_back(turned(kv + kRank, i));
    key.resize(kKey);
    for (std::size_t i = 0; i < kKey; ++i) key[i] = to_bf16(float(own[i]));

    Row attended(heads * v);
    const int len = GetParam().len;
    for (std::size_t head = 0; head < heads; ++head) {
      const std::size_t first = head * (nope + kRope);
      Row q(kKey);
      for (std::size_t i = 0; i < kRank; ++i) {
        q[i] = double(round_bf16(dot(&l.w_uk[(head * kRank + i) * nope], qkv, first, nope)));
      }
      for (std::size_t i = 0; i < kRope; ++i) q[kRank + i] = turned(first + nope, i);
      Row scores(std::size_t(len), 0.0);
      for (int j = 0; j < len; ++j) {
        const std::uint16_t* k =
            j == len - 1 ? key.data() : &cache_before_[index][std::size_t(slot_of(j)) * kKey];
        scores[std::size_t(j)] = dot(k, q, 0, kKey) * kScale;
      }
      const double highest = *std::max_element(scores.begin(), scores.end());
      Row latent(kRank, 0.0);
      double sum = 0;
      for (int j = 0; j < len; ++j) {
        const double w = std::exp(scores[std::size_t(j)] - highest);
        const std::uint16_t* k =
            j == len - 1 ? key.data() : &cache_before_[index][std::size_t(slot_of(j)) * kKey];
        sum += w;
        for (std::size_t i = 0; i < kRank; ++i) latent[i] += w * double(from_bf16(k[i]));
      }
      for (double& value : latent) value = double(round_bf16(value / sum));
      for (std::size_t i = 0; i < v; ++i) {
        attended[head * v + i] = double(round_bf16(dot(&l.w_uv[(head * v + i) * kRank], latent, 0, kRank)));
      }
    }
    for (std::size_t i = 0; i < hidden; ++i) {
      x[i] = double(round_bf16(x[i] + dot(&l.o[i * heads * v], attended, 0, heads * v)));
    }

    const Row g = normalised(x, 0, hidden, l.post_norm, config_.rms_norm_eps);
    std::vector<float> weights{1.0f};
    ids = {0};
    if (l.is_mixture) {
      const std::size_t experts = std::size_t(config_.n_routed_experts);
      std::vector<float> logits(experts);
      for (std::size_t e = 0; e < experts; ++e) {
        double sum = 0;
        for (std::size_t i = 0; i < hidden; ++i) sum += double(l.router[e * hidden + i]) * g[i];
        logits[e] = float(sum);
      }
      ids.resize(std::size_t(config_.num_experts_per_tok));
      weights.resize(ids.size());
      cpu::choose_experts(config_.routing(), logits.data(),
                          config_.topk_method == TopkMethod::kNoAuxTc ? l.correction.data() : nullptr,
                          ids.data(), weights.data());
      for (int i = 0; i < config_.n_shared_experts; ++i) {
        ids.push_back(config_.n_routed_experts + i);
        weights.push_back(1.0f);
      }
    }
    const std::size_t width = std::size_t(l.width(config_));
    for (std::size_t c = 0; c < ids.size(); ++c) {
      const std::size_t e = std::size_t(ids[c]);
      Row act(width);
      for (std::size_t i = 0; i < width; ++i) {
        const std::uint16_t* gate = &l.gate_up[(e * 2 * width + i) * hidden];
        act[i] = double(round_bf16(silu(dot(gate, g, 0, hidden)) * dot(gate + width * hidden, g, 0, hidden)));
      }
      for (std::size_t i = 0; i < hidden; ++i) {
        x[i] += double(weights[c]) * dot(&l.down[(e * hidden + i) * width], act, 0, width);
      }
    }
    for (double& value : x) value = double(round_bf16(value));
  }

  static constexpr float kScale = 0.07f;
  Random random_, more_;  // of the first token and all else, and of the other tokens
  ModelConfig config_;
  int pages_;
  Bits x_before_;
  OnDevice<std::uint16_t> x_;
  std::vector<float> cosines_, sines_;
  OnDevice<float> cosines_device_, sines_device_;
  OnDevice<std::byte> workspace_;
  std::vector<std::int32_t> table_;
  std::vector<std::int64_t> slots_;
  std::vector<std::int32_t> lens_;
  std::int64_t slot_ = 0;  // of the first token
  std::vector<std::unique_ptr<LayerData>> layers_;
  std::vector<std::unique_ptr<OnDevice<std::uint16_t>>> caches_;
  std::vector<Bits> cache_before_;
  std::unique_ptr<OnDevice<std::int32_t>> table_device_, len_device_;
  std::unique_ptr<OnDevice<std::int64_t>> slot_device_;
};

double distance(const Bits& got, const Row& want) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double v = double(from_bf16(got[i]));
    difference += (v - want[i]) * (v - want[i]);
    size += want[i] * want[i];
  }
  return std::sqrt(difference / size);  // NaN fails every comparison
}

TEST_P(OneTokenTest, MatchesFp64Sums) {
  ASSERT_TRUE(model::fits_one_token(config_));
  const Bits got = run(arguments());
  Row x;
  for (int i = 0; i < config_.hidden_size; ++i) x.push_back(double(from_bf16(x_before_[std::size_t(i)])));
  EXPECT_TRUE(
      std::equal(got.begin() + config_.hidden_size, got.end(), x_before_.begin() + config_.hidden_size))
      << "x of other tokens";
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    Bits key;
    std::vector<std::int32_t> ids;
    layer(i, x, key, ids);
    // The appended key, and nothing else of the cache.
    const Bits cache = caches_[i]->host();
    Row want;
    for (const std::uint16_t bits : key) want.push_back(double(from_bf16(bits)));
    const auto own = cache.begin() + slot_ * kKey;
    EXPECT_LT(distance(Bits(own, own + kKey), want), 0.01) << "key of layer " << i;
    Bits expected = cache_before_[i];
    std::copy(own, own + kKey, expected.begin() + slot_ * kKey);
    EXPECT_EQ(cache, expected) << "cache of layer " << i;
    if (!layers_[i]->is_mixture) continue;
    std::vector<std::int32_t> got_ids = layers_[i]->ids.host();
    for (std::size_t k = ids.size(); k < got_ids.size(); ++k)
      EXPECT_EQ(got_ids[k], -1) << "written past the end";
    got_ids.resize(ids.size());
    EXPECT_EQ(got_ids, ids) << "layer " << i;
  }
  EXPECT_LT(distance(got, x), 0.01);
}

TEST_P(OneTokenTest, SameBitsEveryTimeAndInAGraph) {
  const OneToken args = arguments();
  const Bits first = run(args);
  for (int i = 0; i < 20; ++i) ASSERT_EQ(run(args), first) << "launch " << i;

  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  check(sm90::one_token(args, stream), "one_token");
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  cudaGraphExec_t exec = nullptr;
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  for (int i = 0; i < 20; ++i) {
    x_.upload(x_before_);
    check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    ASSERT_EQ(x_.host(), first) << "replay " << i;
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

// Two to four tokens at once: the bits of the same tokens one by one. Numbers of tokens take turns with one workspace,
// and every launch begins with NaN where keys, and -1 where experts go.
TEST_P(OneTokenTest, SeveralTokensHaveTheBitsOfEachAlone) {
  ASSERT_TRUE(model::fits_one_token(config_));
  struct Outcome {
    Bits x;
    std::vector<Bits> caches;
    std::vector<std::vector<std::int32_t>> ids;
  };
  const auto outcome_of = [&](int count, bool together) {
    x_.upload(x_before_);
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      caches_[i]->upload(cache_before_[i]);
      layers_[i]->ids.upload(std::vector<std::int32_t>(layers_[i]->ids.host().size(), -1));
    }
    if (together) {
      check(sm90::one_token(arguments(0, count), nullptr), "one_token");
    } else {
      for (int t = 0; t < count; ++t) check(sm90::one_token(arguments(t), nullptr), "one_token");
    }
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    Outcome out{x_.host(), {}, {}};
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      out.caches.push_back(caches_[i]->host());
      out.ids.push_back(layers_[i]->ids.host());
    }
    return out;
  };
  for (const int count : {2, 3, 4, 2, 4, 3}) {
    SCOPED_TRACE(std::to_string(count) + " tokens");
    const Outcome alone = outcome_of(count, false), together = outcome_of(count, true);
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      EXPECT_EQ(alone.ids[i], together.ids[i]) << "experts of layer " << i;
      EXPECT_TRUE(alone.caches[i] == together.caches[i]) << "cache of layer " << i;
    }
    const std::size_t hidden = std::size_t(config_.hidden_size);
    for (int t = 0; t < kTokens; ++t) {
      const auto begin = std::ptrdiff_t(t) * std::ptrdiff_t(hidden), end = begin + std::ptrdiff_t(hidden);
      const Bits a(alone.x.begin() + begin, alone.x.begin() + end);
      const Bits b(together.x.begin() + begin, together.x.begin() + end);
      Row want;
      for (const std::uint16_t bits : a) want.push_back(double(from_bf16(bits)));
      EXPECT_TRUE(a == b) << "x of token " << t << " is off by " << distance(b, want);
      EXPECT_LT(distance(b, want), 0.01);
    }
    if (HasFailure()) break;
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, OneTokenTest, testing::ValuesIn(kShapes),
                         [](const auto& shape) { return std::string(shape.param.name); });

TEST(OneToken, RefusesOtherModels) {
  const ModelConfig fits = configuration(kShapes[0], false);
  ASSERT_TRUE(model::fits_one_token(fits));
  const auto refused = [&](auto&& change) {
    ModelConfig c = fits;
    change(c);
    return !model::fits_one_token(c);
  };
  EXPECT_TRUE(refused([](ModelConfig& c) { c.q_lora_rank = 1536; }));
  EXPECT_TRUE(refused([](ModelConfig& c) { c.attention_bias = true; }));
  EXPECT_TRUE(refused([](ModelConfig& c) { c.kv_lora_rank = 256; }));
  EXPECT_TRUE(refused([](ModelConfig& c) { c.qk_rope_head_dim = 32; }));
  EXPECT_TRUE(refused([](ModelConfig& c) { c.qk_nope_head_dim = 48; }));
  EXPECT_TRUE(refused([](ModelConfig& c) { c.num_attention_heads = 17; }));
  EXPECT_TRUE(refused([](ModelConfig& c) { c.hidden_size = 2056; }));
  EXPECT_TRUE(refused([](ModelConfig& c) { c.hidden_size = 252; }));
  EXPECT_TRUE(refused([](ModelConfig& c) { c.hidden_size = 64; }));  // fewer columns than multiprocessors
  EXPECT_TRUE(refused([](ModelConfig& c) { c.moe_intermediate_size = 2056; }));
  EXPECT_TRUE(refused([](ModelConfig& c) { c.intermediate_size = 10946; }));
  EXPECT_TRUE(refused([](ModelConfig& c) { c.num_experts_per_tok = 15; }));
  EXPECT_TRUE(refused([](ModelConfig& c) { c.num_hidden_layers = 65; }));
  EXPECT_EQ(sm90::one_token(OneToken(), nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace flash_mla::gpu_test
