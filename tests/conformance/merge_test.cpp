// merge_states (include/flash_mla/merge.h) on every backend, against float64.

#include "flash_mla/merge.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "base/element.h"
#include "guarded.h"

namespace flash_mla::conformance {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct MergeShape {
  std::int64_t b, s_q, h_q, d;
  std::int64_t gap = 0;      ///< elements between rows
  bool tokens_last = false;  ///< lse (b, s_q, h_q) in memory, as FlashInfer has it
};

/// The outputs and log-sum-exps of one side, on the host, and a copy in the backend's memory.
class State {
 public:
  State(BackendUnderTest& backend, const MergeShape& s, DType dtype) : shape_(s), dtype_(dtype) {
    const std::int64_t row = s.d + s.gap, rows = s.b * s.s_q * s.h_q;
    out_bytes_.resize(static_cast<std::size_t>(rows * row) * dtype_size(dtype), 0xFF);
    lse_.resize(static_cast<std::size_t>(rows), kNan);
    out = TensorView::contiguous(nullptr, dtype, {s.b, s.s_q, s.h_q, s.d});
    for (int i = 0; i < 3; ++i) out.strides[i] = out.strides[i] / std::max<std::int64_t>(s.d, 1) * row;
    lse = TensorView::contiguous(nullptr, DType::kFloat32, {s.b, s.h_q, s.s_q});
    if (s.tokens_last) lse.strides[1] = 1, lse.strides[2] = s.h_q;
    d_out_ = std::make_unique<Guarded>(backend, out_bytes_.size());
    d_lse_ = std::make_unique<Guarded>(backend, lse_.size() * sizeof(float));
    out.data = d_out_->data();
    lse.data = d_lse_->data();
    out.device = lse.device = backend.device();
  }
  void set(std::int64_t row, std::int64_t i, double x) {
    visit_float_type(dtype_, [&](auto element) {
      const auto value = from_double<decltype(element)>(x);
      std::memcpy(&out_bytes_[at(row, i) * sizeof(value)], &value, sizeof(value));
    });
  }
  double get(std::int64_t row, std::int64_t i) const {
    return visit_float_type(dtype_, [&](auto element) {
      std::memcpy(&element, &out_bytes_[at(row, i) * sizeof(element)], sizeof(element));
      return static_cast<double>(to_float(element));
    });
  }
  /// Of row (b, i, h) in the order of `out`.
  float& lse_of(std::int64_t row) {
    const std::int64_t h = row % shape_.h_q, i = row / shape_.h_q % shape_.s_q,
                       b = row / shape_.h_q / shape_.s_q;
    return lse_[static_cast<std::size_t>(b * lse.strides[0] + h * lse.strides[1] + i * lse.strides[2])];
  }
  void upload() {
    d_out_->upload(out_bytes_.data());
    d_lse_->upload(lse_.data());
  }
  void download() {
    out_bytes_ = d_out_->download();
    const std::vector<std::uint8_t> bytes = d_lse_->download();
    std::memcpy(lse_.data(), bytes.data(), bytes.size());
  }
  /// Whether the elements between rows are as they were.
  bool gaps_are_whole() const {
    const auto element = dtype_size(dtype_);
    for (std::int64_t row = 0; row < static_cast<std::int64_t>(lse_.size()); ++row) {
      for (std::size_t i = at(row, shape_.d) * element; i < at(row + 1, 0) * element; ++i) {
        if (out_bytes_[i] != 0xFF) return false;
      }
    }
    return true;
  }

  TensorView out, lse;

 private:
  std::size_t at(std::int64_t row, std::int64_t i) const {
    return static_cast<std::size_t>(row * (shape_.d + shape_.gap) + i);
  }

  MergeShape shape_;
  DType dtype_;
  std::vector<std::uint8_t> out_bytes_;
  std::vector<float> lse_;
  std::unique_ptr<Guarded> d_out_, d_lse_;
};

class Merge : public ::testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {};

INSTANTIATE_TEST_SUITE_P(Backends, Merge, ::testing::ValuesIn(backends_under_test()),
                         [](const auto& b) { return b.param->name(); });

/// Random rows; some of one side or of both are empty and hold NaN.
void draw(State& a, State& b, const MergeShape& s, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<double> normal;
  for (std::int64_t row = 0; row < s.b * s.s_q * s.h_q; ++row) {
    for (State* state : {&a, &b}) {
      const bool empty = rng() % 7 == 0;
      const double infinity = rng() % 2 == 0 ? kInf : -kInf;
      state->lse_of(row) = static_cast<float>(empty ? infinity : 3 * normal(rng) + 50);
      for (std::int64_t i = 0; i < s.d; ++i) state->set(row, i, empty ? double{kNan} : normal(rng));
    }
  }
}

/// What merge.h says, in float64, beside `got`: one row.
void expect_row(State& a, State& b, State& got, std::int64_t row, const MergeShape& s, DType dtype,
                LseBase base) {
  const double unit = base == LseBase::kE ? 1.0 : std::log(2.0);
  const auto power = [&](State& state) {
    const double lse = double{state.lse_of(row)};
    return std::isinf(lse) ? 0.0 : std::exp((lse - 50) * unit);
  };
  const double p = power(a), q = power(b), sum = p + q;
  const double rounding = dtype == DType::kFloat32 ? 1e-6 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  if (sum == 0) {
    EXPECT_EQ(double{got.lse_of(row)}, kInf);
  } else {
    EXPECT_NEAR(double{got.lse_of(row)}, 50 + std::log(sum) / unit, 2e-5) << "row " << row;
  }
  for (std::int64_t i = 0; i < s.d; ++i) {
    const double want =
        sum == 0 ? 0.0 : ((p > 0 ? p * a.get(row, i) : 0) + (q > 0 ? q * b.get(row, i) : 0)) / sum;
    ASSERT_NEAR(got.get(row, i), want, rounding * std::abs(want) + 2e-6) << "row " << row << " element " << i;
  }
}

TEST_P(Merge, NumericsOfEveryDtypeBaseAndLayout) {
  const MergeShape shapes[] = {{3, 2, 5, 512},          {2, 1, 128, 512, 8}, {1, 70, 16, 512, 0, true},
                               {2, 3, 2, 64, 3},        {1, 2, 9, 7},        {4, 1, 1, 1200, 40},
                               {2, 2, 3, 513, 0, true}, {70000, 1, 1, 8}};
  unsigned seed = 1;
  for (const MergeShape& s : shapes) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
      for (const LseBase base : {LseBase::kE, LseBase::kTwo}) {
        State a(*GetParam(), s, dtype), b(*GetParam(), s, dtype), to(*GetParam(), s, dtype);
        draw(a, b, s, ++seed);
        for (State* state : {&a, &b, &to}) state->upload();
        merge_states(a.out, a.lse, b.out, b.lse, to.out, to.lse, base);
        to.download();
        EXPECT_TRUE(to.gaps_are_whole());
        for (std::int64_t row = 0; row < s.b * s.s_q * s.h_q; ++row) {
          expect_row(a, b, to, row, s, dtype, base);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(Merge, InPlaceHasTheSameBits) {
  const MergeShape s{5, 2, 16, 512};
  State a(*GetParam(), s, DType::kBFloat16), b(*GetParam(), s, DType::kBFloat16),
      to(*GetParam(), s, DType::kBFloat16);
  draw(a, b, s, 9);
  for (State* state : {&a, &b, &to}) state->upload();
  merge_states(a.out, a.lse, b.out, b.lse, to.out, to.lse);
  for (State* into : {&a, &b}) {
    merge_states(a.out, a.lse, b.out, b.lse, into->out, into->lse);
    into->download();
    to.download();
    for (std::int64_t row = 0; row < s.b * s.s_q * s.h_q; ++row) {
      EXPECT_EQ(into->lse_of(row), to.lse_of(row));
      for (std::int64_t i = 0; i < s.d; ++i) EXPECT_EQ(into->get(row, i), to.get(row, i));
    }
    draw(a, b, s, 10);
    a.upload(), b.upload();
    merge_states(a.out, a.lse, b.out, b.lse, to.out, to.lse);
  }
}

TEST_P(Merge, NanStaysNan) {
  const MergeShape s{1, 1, 4, 8};
  for (const float other : {0.0f, float{INFINITY}, -float{INFINITY}}) {
    State a(*GetParam(), s, DType::kFloat32), b(*GetParam(), s, DType::kFloat32),
        to(*GetParam(), s, DType::kFloat32);
    draw(a, b, s, 3);
    for (std::int64_t row = 0; row < 4; ++row) {
      a.lse_of(row) = row < 2 ? kNan : other;
      b.lse_of(row) = row < 2 ? other : kNan;
      for (std::int64_t i = 0; i < s.d; ++i) a.set(row, i, 1), b.set(row, i, 2);
    }
    for (State* state : {&a, &b, &to}) state->upload();
    merge_states(a.out, a.lse, b.out, b.lse, to.out, to.lse);
    to.download();
    for (std::int64_t row = 0; row < 4; ++row) {
      EXPECT_TRUE(std::isnan(to.lse_of(row)) && std::isnan(to.get(row, 5))) << other << " row " << row;
    }
  }
}

}  // namespace
}  // namespace flash_mla::conformance
