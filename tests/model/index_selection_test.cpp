// The tokens that a layer's indexer chooses, against its definition in float64: whole prompts, chunks and single
// tokens, in pages of any order, in float32 and with keys in FP8.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <set>

#include "base/fp8.h"
#include "model/device/cpu/context.h"
#include "model/device/cpu/indexer.h"
#include "model/step.h"

namespace flash_mla::model {
namespace {

constexpr int kHidden = 48, kRank = 40, kHeads = 16, kDim = 64, kTopk = 32, kRope = 16;
constexpr std::int64_t kLength = 300;

ModelConfig config() {
  ModelConfig c;
  c.model_type = "deepseek_v32";
  c.vocab_size = 10;
  c.hidden_size = kHidden;
  c.num_hidden_layers = 1;
  c.num_attention_heads = 2;
  c.q_lora_rank = kRank;
  c.qk_rope_head_dim = kRope;
  c.max_position_embeddings = 1 << 16;
  c.index_topk = kTopk;
  c.index_n_heads = kHeads;
  c.index_head_dim = kDim;
  return c;
}

std::vector<float> normal(std::int64_t count, double deviation, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw(0, static_cast<float>(deviation));
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& x : out) x = draw(random);
  return out;
}

Weight weight(const std::vector<float>& values, std::int64_t columns) {
  Weight out;
  out.rows = std::ssize(values) / columns;
  out.columns = columns;
  out.read = [&values](void* to) { std::memcpy(to, values.data(), values.size() * sizeof(float)); };
  return out;
}

/// An indexer with random weights, and what it reads of a sequence of kLength tokens.
struct Given {
  std::vector<float> q_b = normal(std::int64_t{kHeads} * kDim * kRank, 1 / std::sqrt(double{kRank}), 1);
  std::vector<float> k = normal(std::int64_t{kDim} * kHidden, 1 / std::sqrt(double{kHidden}), 2);
  std::vector<float> norm = std::vector<float>(kDim, 1.25f), bias = normal(kDim, 0.1, 3);
  std::vector<float> heads = normal(std::int64_t{kHeads} * kHidden, 1 / std::sqrt(double{kHidden}), 4);
  std::vector<float> h = normal(kLength * kHidden, 1, 5), q_a = normal(kLength * kRank, 1, 6);

  IndexerWeights weights() const {
    return {weight(q_b, kRank), weight(k, kHidden), norm, bias, weight(heads, kHidden)};
  }
};

// Scores of every pair by the definition.
class Reference {
 public:
  Reference(const Given& g, const Rope& rope) : scores_(kLength * kLength, 0) {
    std::vector<std::vector<double>> keys;
    for (std::int64_t t = 0; t < kLength; ++t) keys.push_back(key(g, rope, t));
    for (std::int64_t t = 0; t < kLength; ++t) {
      std::vector<double> q = multiply(g.q_b, g.q_a.data() + t * kRank, kRank);
      const std::vector<double> w = multiply(g.heads, g.h.data() + t * kHidden, kHidden);
      for (std::size_t head = 0; head < kHeads; ++head) {
        turn(q.data() + head * kDim, rope, t);
        for (std::int64_t j = 0; j <= t; ++j) {
          const double dot = std::inner_product(q.begin() + static_cast<std::ptrdiff_t>(head * kDim),
                                                q.begin() + static_cast<std::ptrdiff_t>((head + 1) * kDim),
                                                keys[static_cast<std::size_t>(j)].begin(), 0.0);
          scores_[at(t, j)] += w[head] / std::sqrt(double{kHeads * kDim}) * std::max(dot, 0.0);
        }
      }
    }
  }

  double score(std::int64_t token, std::int64_t key) const { return scores_[at(token, key)]; }
  /// The kTopk positions of the largest scores, and the smallest of those scores.
  std::pair<std::set<std::int64_t>, double> best(std::int64_t token) const {
    std::vector<std::int64_t> order(static_cast<std::size_t>(token + 1));
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, [&](auto a, auto b) { return score(token, a) > score(token, b); });
    order.resize(kTopk);
    return {{order.begin(), order.end()}, score(token, order.back())};
  }

 private:
  static std::size_t at(std::int64_t t, std::int64_t j) { return static_cast<std::size_t>(t * kLength + j); }
  static std::vector<double> multiply(const std::vector<float>& w, const float* x, std::size_t columns) {
    std::vector<double> out(w.size() / columns);
    for (std::size_t i = 0; i < w.size(); ++i) out[i / columns] += double{w[i]} * double{x[i % columns]};
    return out;
  }
  static void turn(double* x, const Rope& rope, std::int64_t position) {
    for (std::size_t i = 0; i < rope.inv_freq.size(); ++i) {
      const double angle = static_cast<double>(static_cast<float>(position) * rope.inv_freq[i]);
      const double a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * std::cos(angle) - b * std::sin(angle);
      x[2 * i + 1] = b * std::cos(angle) + a * std::sin(angle);
    }
  }
  static std::vector<double> key(const Given& g, const Rope& rope, std::int64_t token) {
    std::vector<double> x = multiply(g.k, g.h.data() + token * kHidden, kHidden);
    const double mean = std::accumulate(x.begin(), x.end(), 0.0) / kDim;
    double squares = 0;
    for (const double v : x) squares += (v - mean) * (v - mean);
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] = (x[i] - mean) / std::sqrt(squares / kDim + 1e-6) * double{g.norm[i]} + double{g.bias[i]};
    }
    turn(x.data(), rope, token);
    return x;
  }

  std::vector<double> scores_;
};

/// The positions that an indexer chooses for every token that sees more than kTopk, its steps `sizes` tokens long.
std::vector<std::set<std::int64_t>> chosen(const Given& g, const std::vector<std::int32_t>& sizes,
                                           std::optional<KvFormat> format = std::nullopt) {
  const ModelConfig model = config();
  ModelOptions options;
  options.num_threads = 2;
  CpuContext context(model, DType::kFloat32, format, options);
  CpuIndexer indexer(context, g.weights());
  const std::vector<std::int32_t> pages = {6, 2, 7, 0, 5};
  std::vector<std::int64_t> position_of(std::size_t{8} * kPageSize, -1);
  for (std::int64_t t = 0; t < kLength; ++t) {
    const std::int64_t page = pages[static_cast<std::size_t>(t / kPageSize)];
    position_of[static_cast<std::size_t>(page * kPageSize + t % kPageSize)] = t;
  }
  indexer.allocate_cache(8);
  std::vector<std::set<std::int64_t>> out(kLength);
  std::int32_t length = 0;
  for (const std::int32_t size : sizes) {
    length += size;
    const std::vector<std::int32_t> ids(static_cast<std::size_t>(size), 1), starts = {0, size},
                                                                            lengths = {length};
    ForwardBatch batch;
    batch.token_ids = ids;
    batch.query_starts = starts;
    batch.seq_lens = lengths;
    batch.block_table = pages;
    batch.max_blocks = static_cast<int>(pages.size());
    const Step step = plan_step(batch, {model.vocab_size, model.max_position_embeddings, 8, 0});
    context.begin_step(step);
    const auto rows = [&](const std::vector<float>& x, std::int64_t columns) {
      auto* first = const_cast<float*>(x.data()) + (length - size) * columns;
      return Matrix{reinterpret_cast<std::byte*>(first), DType::kFloat32, size, columns, columns};
    };
    indexer.append(rows(g.h, kHidden));
    if (!context.selects()) continue;
    indexer.select(rows(g.h, kHidden), rows(g.q_a, kRank));
    for (std::int64_t i = 0; i < size; ++i) {
      if (context.length(i) <= kTopk) continue;
      auto& set = out[static_cast<std::size_t>(length - size + i)];
      for (std::int64_t j = 0; j < kTopk; ++j) {
        const auto slot =
            static_cast<std::size_t>(context.selection[static_cast<std::size_t>(i * kTopk + j)]);
        set.insert(position_of.at(slot));
      }
      EXPECT_EQ(set.size(), std::size_t{kTopk});
      EXPECT_LT(*set.rbegin(), context.length(i));
      EXPECT_GE(*set.begin(), 0);
    }
  }
  return out;
}

const std::vector<std::int32_t> kWhole = {kLength};

TEST(IndexSelection, IsThatOfFloat64UnlessItsScoresAreAsGoodAsEqual) {
  const Given g;
  const Reference reference(g, make_rope(config()));
  const auto sets = chosen(g, kWhole);
  for (std::int64_t t = kTopk; t < kLength; ++t) {
    const auto [best, least] = reference.best(t);
    for (const std::int64_t j : sets[static_cast<std::size_t>(t)]) {
      if (!best.contains(j)) {
        EXPECT_NEAR(reference.score(t, j), least, 1e-6) << "token " << t << " key " << j;
      }
    }
  }
}

TEST(IndexSelection, IsTheSameInChunksAndTokenByToken) {
  const Given g;
  const auto whole = chosen(g, kWhole);
  const Reference reference(g, make_rope(config()));
  std::vector<std::int32_t> single(kLength, 1);
  for (const auto& sizes :
       {std::vector<std::int32_t>{17, 64, 3, 100, 116}, {150, 150}, {40, 16, 244}, single}) {
    const auto parts = chosen(g, sizes);
    for (std::size_t t = kTopk; t < kLength; ++t) {
      if (parts[t] == whole[t]) continue;
      // Products of other shapes may round the other way, where that decides.
      const double least = reference.best(static_cast<std::int64_t>(t)).second;
      for (const std::int64_t j : parts[t]) {
        if (!whole[t].contains(j)) {
          EXPECT_NEAR(reference.score(static_cast<std::int64_t>(t), j), least, 1e-6);
        }
      }
    }
  }
}

// Rounded keys and queries choose nearly the same, and the same in chunks as in the whole.
TEST(IndexSelection, InFp8MostOfItStays) {
  const Given g;
  const auto exact = chosen(g, kWhole), rounded = chosen(g, kWhole, KvFormat::kFp8V32);
  EXPECT_EQ(chosen(g, {17, 64, 3, 100, 116}, KvFormat::kFp8V32), rounded);
  std::size_t common = 0, all = 0;
  for (std::size_t t = kTopk; t < kLength; ++t) {
    all += kTopk;
    for (const std::int64_t j : rounded[t]) common += exact[t].contains(j) ? 1 : 0;
  }
  EXPECT_GT(common, all * 9 / 10);
  EXPECT_LT(common, all);
}

}  // namespace
}  // namespace flash_mla::model
