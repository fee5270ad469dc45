// Dense decode on the GPU over the shapes it has to serve, against the reference.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>

#include "case.h"
#include "flash_mla/reference.h"
#include "reference.h"

namespace flash_mla::gpu_test {
namespace {

std::vector<std::int32_t> varied(int b, int mean, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<double> normal(mean, mean / 2.0);
  std::vector<std::int32_t> lengths;
  for (int i = 0; i < b; ++i) lengths.push_back(std::max(static_cast<int>(normal(rng)), 0));
  return lengths;
}

// The device reference against the CPU's, which is the definition.
TEST(Reference, AgreesWithTheCpuReference) {
  unsigned seed = 1;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const bool causal : {false, true}) {
      Case c({.lengths = {150, 0, 1, 64},
              .s_q = 3,
              .h_q = 6,
              .h_kv = 2,
              .page_size = 16,
              .dtype = dtype,
              .causal = causal,
              .scale = 1.0f,
              .seed = seed++});
      const DenseDecodeArgs& d = c.args();
      std::vector<std::uint16_t> q = c.q_bits(), pool = c.pool_bits();
      std::vector<std::int32_t> table = c.table(), lengths = c.shape().lengths;
      const std::size_t rows = 4 * 3 * 6;
      std::vector<float> out(rows * 512), lse(rows);
      DenseDecodeArgs h = d;
      for (TensorView* v : {&h.q, &h.k_cache, &h.block_table, &h.cache_seqlens, &h.out, &h.lse})
        v->device = {};
      h.q.data = q.data();
      h.k_cache.data = pool.data();
      h.block_table.data = table.data();
      h.cache_seqlens.data = lengths.data();
      h.out = TensorView::contiguous(out.data(), DType::kFloat32, {4, 3, 6, 512});
      h.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {4, 6, 3});
      reference::dense_decode(h, c.options());
      DeviceMemory scores(rows * 150 * 4), d_out(rows * 512 * 4), d_lse(rows * 4);
      attention(d, 1.0f, causal, 150, scores.as<float>(), d_out.as<float>(), d_lse.as<float>());
      const auto got_out = d_out.download<float>();
      const auto got_lse = d_lse.download<float>();
      for (std::size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(got_out[i], out[i], 2e-6) << i;
      for (std::size_t i = 0; i < lse.size(); ++i) {
        if (std::isinf(lse[i])) {
          ASSERT_EQ(got_lse[i], lse[i]);
        } else {
          ASSERT_NEAR(got_lse[i], lse[i], 1e-5);
        }
      }
    }
  }
}

// A comparison that cannot fail proves nothing.
TEST(Reference, AWrongResultIsSeen) {
  Case c({.lengths = {300, 70}, .h_q = 8});
  c.run();
  EXPECT_EQ(c.difference(), "");
  c.poison();
  EXPECT_NE(c.difference(), "");
  c.run();
  c.set_lengths({300, 69});
  EXPECT_NE(c.difference(), "");
}

class Grid : public ::testing::TestWithParam<std::tuple<int, int>> {};

INSTANTIATE_TEST_SUITE_P(Sizes, Grid,
                         ::testing::Combine(::testing::Values(1, 2, 6, 64), ::testing::Values(20, 140, 4096)),
                         [](const auto& p) {
                           return std::string("b")
                               .append(std::to_string(std::get<0>(p.param)))
                               .append("_k")
                               .append(std::to_string(std::get<1>(p.param)));
                         });

TEST_P(Grid, AgreesWithTheReference) {
  const auto [b, s_k] = GetParam();
  constexpr std::array kPages{64, 16, 32, 128};
  constexpr std::array kScales{0.1352338f, 0.0416667f, 1.0f};
  unsigned n = 0;
  int failures = 0;
  for (const int s_q : {1, 2, 4}) {
    for (const int h_q : {1, 3, 9, 16, 63, 64, 126, 128}) {
      for (const int h_kv : {1, 2, 3, 8}) {
        if (h_q % h_kv != 0) continue;
        for (const bool varlen : {false, true}) {
          for (const bool causal : {false, true}) {
            for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
              ++n;
              Case c({.lengths = varlen ? varied(b, s_k, n)
                                        : std::vector<std::int32_t>(static_cast<std::size_t>(b), s_k),
                      .s_q = s_q,
                      .h_q = h_q,
                      .h_kv = h_kv,
                      .page_size = kPages[n / 8 % 4],
                      .dtype = dtype,
                      .causal = causal,
                      .scale = kScales[n % 3],
                      .seed = n});
              c.run();
              const std::string difference = c.difference();
              EXPECT_EQ(difference, "");
              if (!difference.empty() && ++failures == 5) FAIL() << "five cases failed, the rest is not run";
            }
          }
        }
      }
    }
  }
}

TEST(Decode, EveryQueryLengthAndPageSize) {
  for (const int h_q : {1, 5, 16, 40, 128}) {
    for (int s_q = 1; s_q <= 16; ++s_q) {
      for (const int page_size : {16, 32, 64, 128, 256}) {
        Case c({.lengths = {0, 1, 15, 16, 17, 63, 64, 65, 129, 400},
                .s_q = s_q,
                .h_q = h_q,
                .page_size = page_size,
                .causal = true,
                .seed = static_cast<unsigned>(s_q)});
        c.run();
        ASSERT_EQ(c.difference(), "");
      }
    }
  }
}

TEST(Decode, EveryHeadCount) {
  for (int h_q = 1; h_q <= 128; ++h_q) {
    Case c({.lengths = {70, 0, 200}, .s_q = 1 + h_q % 3, .h_q = h_q, .causal = true});
    c.run();
    ASSERT_EQ(c.difference(), "");
  }
}

TEST(Decode, ZeroLengthMixes) {
  std::mt19937 rng(3);
  for (int i = 0; i < 12; ++i) {
    std::vector<std::int32_t> lengths(128);
    for (std::int32_t& n : lengths) {
      n = rng() % 3 == 0 ? 0 : rng() % 4 == 0 ? static_cast<int>(rng() % 5) : static_cast<int>(rng() % 3000);
    }
    if (i == 0) std::fill(lengths.begin(), lengths.end(), 0);
    if (i == 1) std::fill(lengths.begin(), lengths.end() - 1, 0);
    if (i == 2) std::fill(lengths.begin() + 1, lengths.end(), 0);
    Case c({.lengths = lengths, .s_q = 1 + i % 3, .h_q = i % 2 == 0 ? 16 : 128, .causal = true});
    c.run();
    ASSERT_EQ(c.difference(), "") << i;
  }
}

TEST(Decode, ForcedSplits) {
  for (const int splits : {1, 2, 7, 66, 132}) {
    for (const int h_q : {16, 128}) {
      Case c({.lengths = {splits * 3 * 64 - 10}, .s_q = 2, .h_q = h_q, .causal = true});
      Plan plan(c.args(), splits);
      plan.options.fixed_overhead_blocks = 0;
      plan.build(c.args());
      ASSERT_EQ(plan.num_splits.download<std::int32_t>(), (std::vector<std::int32_t>{0, splits}));
      const std::size_t bytes = dense_decode_workspace_size(c.args(), plan.view, c.options());
      DeviceMemory workspace(bytes);
      workspace.poison();
      dense_decode(c.args(), plan.view, workspace.as<void>(), bytes, c.options());
      ASSERT_EQ(c.difference(), "") << splits;
      // Many requests over the same number of parts: splits of two in the middle of a batch.
      Case many({.lengths = varied(40, 900, 5), .s_q = 2, .h_q = h_q, .causal = true});
      many.run(splits);
      ASSERT_EQ(many.difference(), "") << splits;
      // Rows in tokens, as FlashMLA wrote until September 2025.
      const auto bits = many.out_bits();
      many.run(splits, 0, PartUnit::kTokens);
      ASSERT_EQ(many.difference(), "") << splits;
      ASSERT_EQ(many.out_bits(), bits);
    }
  }
}

TEST(Decode, LongContext) {
  for (const auto& [lengths, h_q] :
       {std::pair{std::vector<std::int32_t>{131072}, 128}, {{131072}, 16}, {{131072, 5, 99999}, 128}}) {
    Case c({.lengths = lengths, .h_q = h_q});
    c.run();
    EXPECT_EQ(c.difference(), "");
  }
}

TEST(Decode, PoolBeyondFourGiB) {
  // 9 GiB: offsets in elements pass 2^32 as well.
  Case c({.lengths = {3000, 64, 777}, .h_q = 128, .min_pages = (9ll << 30) / (64 * 576 * 2)});
  c.run();
  EXPECT_EQ(c.difference(), "");
}

TEST(Decode, RepeatsAreBitEqual) {
  Case c({.lengths = varied(24, 2000, 9), .s_q = 2, .h_q = 128, .causal = true});
  c.run();
  ASSERT_EQ(c.difference(), "");
  const auto out = c.out_bits();
  const auto lse = c.lse_bits();
  for (int i = 0; i < 20; ++i) {
    c.run();
    ASSERT_EQ(c.out_bits(), out) << i;
    ASSERT_EQ(c.lse_bits(), lse) << i;
  }
}

TEST(Decode, BatchInvariantMode) {
  for (const int h_q : {16, 128}) {
    for (const int blocks : {1, 4, 16}) {
      Case all({.lengths = {5000, 100, 0, 777, 64, 1024, 9000, 3}, .s_q = 2, .h_q = h_q, .causal = true});
      all.run(0, blocks);
      ASSERT_EQ(all.difference(), "");
      const auto out = all.out_bits();
      const auto lse = all.lse_bits();
      const std::size_t out_row = out.size() / 8, lse_row = lse.size() / 8;
      for (const auto& [which, parts] : {std::pair{std::vector<std::size_t>{0}, 1},
                                         {{0}, 132},
                                         {{7, 6, 5, 4, 3, 2, 1, 0}, 7},
                                         {{3, 6}, 0},
                                         {{2, 1, 7}, 3}}) {
        Case some = all.selected(which);
        some.run(parts, blocks);
        const auto some_out = some.out_bits();
        const auto some_lse = some.lse_bits();
        for (std::size_t i = 0; i < which.size(); ++i) {
          ASSERT_EQ(std::memcmp(&some_out[i * out_row], &out[which[i] * out_row], out_row), 0)
              << "request " << which[i] << " parts " << parts << " split " << blocks;
          ASSERT_EQ(std::memcmp(&some_lse[i * lse_row], &lse[which[i] * lse_row], lse_row * 4), 0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace flash_mla::gpu_test
