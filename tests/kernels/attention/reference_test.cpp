#include "flash_mla/reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace flash_mla {
namespace {

struct Tiny {
  std::vector<double> q{1, 0, 2}, cache, out, lse;
  std::vector<std::int32_t> table{0}, lengths;
  DenseDecodeArgs args;
  // Latent width 2, rope 1, one head; keys as given.
  Tiny(std::vector<double> keys, int s_q, int length) : cache(std::move(keys)), lengths{length} {
    const auto rows = static_cast<std::int64_t>(cache.size() / 3);
    q.resize(static_cast<std::size_t>(3 * s_q), 1.0);
    out.assign(static_cast<std::size_t>(2 * s_q), -9);
    lse.assign(static_cast<std::size_t>(s_q), -9);
    args.q = TensorView::contiguous(q.data(), DType::kFloat64, {1, s_q, 1, 3});
    args.k_cache = TensorView::contiguous(cache.data(), DType::kFloat64, {1, rows, 1, 3});
    args.block_table = TensorView::contiguous(table.data(), DType::kInt32, {1, 1});
    args.cache_seqlens = TensorView::contiguous(lengths.data(), DType::kInt32, {1});
    args.out = TensorView::contiguous(out.data(), DType::kFloat64, {1, s_q, 1, 2});
    args.lse = TensorView::contiguous(lse.data(), DType::kFloat64, {1, 1, s_q});
  }
};

TEST(Reference, OneKeyIsReturnedWhole) {
  Tiny t({5, 7, 3}, 1, 1);
  reference::dense_decode(t.args, {.softmax_scale = 0.5f});
  EXPECT_DOUBLE_EQ(t.out[0], 5);
  EXPECT_DOUBLE_EQ(t.out[1], 7);
  EXPECT_DOUBLE_EQ(t.lse[0], 0.5 * (5 + 2 * 3));
}

TEST(Reference, TwoKeysByHand) {
  // q = (1, 0, 2): scores 0 and log 3 with scale 1, so weights 1/4 and 3/4.
  Tiny t({0, 8, 0, 0, 4, std::log(3.0) / 2}, 1, 2);
  reference::dense_decode(t.args, {.softmax_scale = 1.0f});
  EXPECT_NEAR(t.out[1], 8 * 0.25 + 4 * 0.75, 1e-14);
  EXPECT_NEAR(t.lse[0], std::log(4.0), 1e-14);
}

TEST(Reference, NoKeys) {
  Tiny t({1, 1, 1}, 1, 0);
  reference::dense_decode(t.args, {});
  EXPECT_EQ(t.out[0], 0);
  EXPECT_EQ(t.lse[0], std::numeric_limits<double>::infinity());
}

TEST(Reference, CausalIsBottomRightAligned) {
  // Two queries, two keys: query 0 sees key 0 only, query 1 both; with one key query 0 sees none.
  Tiny t({10, 0, 0, 20, 0, 0}, 2, 2);
  reference::dense_decode(t.args, {.softmax_scale = 1e-9f, .causal = true});
  EXPECT_NEAR(t.out[0], 10, 1e-6);
  EXPECT_NEAR(t.out[2], 15, 1e-6);
  Tiny u({10, 0, 0}, 2, 1);
  reference::dense_decode(u.args, {.softmax_scale = 1e-9f, .causal = true});
  EXPECT_EQ(u.out[0], 0);
  EXPECT_EQ(u.lse[0], std::numeric_limits<double>::infinity());
  EXPECT_NEAR(u.out[2], 10, 1e-6);
}

}  // namespace
}  // namespace flash_mla
