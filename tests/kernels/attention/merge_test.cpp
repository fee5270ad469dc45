#include "flash_mla/merge.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "base/element.h"
#include "flash_mla/error.h"

namespace flash_mla {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct State {
  std::vector<float> out, lse;
  TensorView out_view, lse_view;
  State(std::vector<float> o, std::vector<float> l) : out(std::move(o)), lse(std::move(l)) {
    const auto rows = static_cast<std::int64_t>(lse.size());
    const auto d = static_cast<std::int64_t>(out.size()) / rows;
    out_view = TensorView::contiguous(out.data(), DType::kFloat32, {rows, 1, 1, d});
    lse_view = TensorView::contiguous(lse.data(), DType::kFloat32, {rows, 1, 1});
  }
};

void merge(const State& a, const State& b, const State& to, LseBase base = LseBase::kE) {
  merge_states(a.out_view, a.lse_view, b.out_view, b.lse_view, to.out_view, to.lse_view, base);
}

TEST(Merge, ByHand) {
  // Sums 1 and 3: weights 1/4 and 3/4.
  State a({8, 0}, {0}), b({4, 4}, {std::log(3.0f)}), to({kNan, kNan}, {kNan});
  merge(a, b, to);
  EXPECT_FLOAT_EQ(to.out[0], 5);
  EXPECT_FLOAT_EQ(to.out[1], 3);
  EXPECT_FLOAT_EQ(to.lse[0], std::log(4.0f));
  State a2({8, 0}, {0}), b2({4, 4}, {std::log2(3.0f)});
  merge(a2, b2, to, LseBase::kTwo);
  EXPECT_FLOAT_EQ(to.out[0], 5);
  EXPECT_FLOAT_EQ(to.lse[0], 2);
}

TEST(Merge, EmptyStatesContributeNothing) {
  for (const float empty : {kInf, -kInf}) {
    State a({kNan, kNan}, {empty}), b({4, 2}, {700}), to({9, 9}, {9});
    merge(a, b, to);
    EXPECT_EQ(to.out, b.out);
    EXPECT_EQ(to.lse[0], 700);
    merge(b, a, to);
    EXPECT_EQ(to.out, b.out);
    merge(a, a, to);
    EXPECT_EQ(to.out, (std::vector<float>{0, 0}));
    EXPECT_EQ(to.lse[0], kInf);
  }
}

TEST(Merge, NanStaysNan) {
  const float others[] = {0.0f, kInf, -kInf};
  for (const float other : others) {
    State a({1, 2}, {kNan}), b({4, 2}, {other}), to({9, 9}, {9});
    for (const bool swap : {false, true}) {
      merge(swap ? b : a, swap ? a : b, to);
      EXPECT_TRUE(std::isnan(to.out[0]) && std::isnan(to.out[1]) && std::isnan(to.lse[0])) << other << swap;
    }
  }
}

TEST(Merge, InPlaceAndAssociative) {
  std::mt19937 rng(3);
  std::normal_distribution<float> n;
  const auto draw = [&] {
    State s(std::vector<float>(64), std::vector<float>(8));
    for (float& x : s.out) x = n(rng);
    for (float& x : s.lse) x = 5 * n(rng);
    return s;
  };
  const State a = draw(), b = draw(), c = draw();
  State left = draw(), right = draw();
  merge(a, b, left);
  merge(left, c, left);
  merge(b, c, right);
  merge(a, right, right);
  for (std::size_t i = 0; i < left.out.size(); ++i) EXPECT_NEAR(left.out[i], right.out[i], 2e-6);
  for (std::size_t i = 0; i < left.lse.size(); ++i) EXPECT_NEAR(left.lse[i], right.lse[i], 4e-6);
}

TEST(Merge, HalfTypesAndOtherLayouts) {
  // (tokens, heads) order for out and a transposed lse.
  std::vector<Bf16> a(2 * 3 * 4), b(a.size()), out(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    a[i] = to_bf16(static_cast<float>(i));
    b[i] = to_bf16(static_cast<float>(i) + 2);
  }
  std::vector<float> lse_a(6, 1.0f), lse_b(6, 1.0f), lse(6);
  const auto out_view = [](std::vector<Bf16>& x) {
    TensorView v = TensorView::contiguous(x.data(), DType::kBFloat16, {1, 2, 3, 4});
    v.strides = {24, 4, 8, 1};  // heads outermost
    return v;
  };
  const auto lse_view = [](std::vector<float>& x) {
    TensorView v = TensorView::contiguous(x.data(), DType::kFloat32, {1, 3, 2});
    v.strides = {6, 1, 3};
    return v;
  };
  merge_states(out_view(a), lse_view(lse_a), out_view(b), lse_view(lse_b), out_view(out), lse_view(lse));
  for (std::size_t i = 0; i < out.size(); ++i) EXPECT_EQ(to_float(out[i]), static_cast<float>(i) + 1);
  for (const float x : lse) EXPECT_FLOAT_EQ(x, 1 + std::log(2.0f));
}

TEST(Merge, BadInputIsNamedAndNothingIsWritten) {
  State a({1, 2}, {0}), b({1, 2, 3}, {0}), to({9, 9}, {9});
  try {
    merge(a, b, to);
    FAIL();
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("out_b.shape[3] is 3"), std::string::npos) << e.what();
  }
  EXPECT_EQ(to.out, (std::vector<float>{9, 9}));
}

}  // namespace
}  // namespace flash_mla
