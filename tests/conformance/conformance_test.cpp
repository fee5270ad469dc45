// The ten contracts of docs/architecture.md, on every backend.

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "base/element.h"
#include "flash_mla/reference.h"
#include "problem.h"

namespace flash_mla::conformance {
namespace {

class Conformance : public ::testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {
 protected:
  BackendUnderTest& backend() { return *GetParam(); }

  void expect_matches(const Shape& shape, const RunOptions& how = {}) {
    if (!backend().supports(shape.dtype, shape.d_v + shape.rope, shape.d_v, shape.page_size)) return;
    const Problem p(shape);
    EXPECT_EQ(difference(p.run(backend(), how), p.reference(), shape.dtype), "")
        << "s_q " << shape.s_q << " h_q " << shape.h_q << " h_kv " << shape.h_kv << " page_size "
        << shape.page_size << " d_v " << shape.d_v << " rope " << shape.rope << " " << dtype_name(shape.dtype)
        << " parts " << how.num_parts << " seed " << shape.seed;
  }
};

INSTANTIATE_TEST_SUITE_P(Backends, Conformance, ::testing::ValuesIn(backends_under_test()),
                         [](const auto& b) { return b.param->name(); });

TEST_P(Conformance, NumericsOverShapes) {
  unsigned seed = 1;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const int s_q : {1, 2, 5}) {
      for (const auto& [h_q, h_kv] : {std::pair{1, 1}, {3, 1}, {16, 1}, {63, 1}, {128, 1}, {6, 3}, {16, 8}}) {
        Shape s{
            .lengths = {20, 140, 0, 1}, .s_q = s_q, .h_q = h_q, .h_kv = h_kv, .dtype = dtype, .seed = seed++};
        expect_matches(s);
      }
    }
  }
}

TEST_P(Conformance, NumericsOverPageSizesAndWidths) {
  for (const int page_size : {1, 2, 7, 16, 32, 64, 100, 128, 256}) {
    expect_matches({.lengths = {300, 5}, .page_size = page_size});
  }
  for (const auto& [d_v, rope] :
       {std::pair{512, 0}, {1, 0}, {1, 1}, {16, 128}, {31, 2}, {100, 33}, {1024, 128}, {48, 5}}) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
      expect_matches({.lengths = {150, 3}, .h_q = 5, .d_v = d_v, .rope = rope, .dtype = dtype});
    }
  }
}

TEST_P(Conformance, NumericsOverSplits) {
  for (const int parts : {1, 2, 7, 66, 132}) {
    for (const int threads : {1, 2, 3}) {
      expect_matches({.lengths = {2000, 64, 0, 700}, .h_q = 9}, {.num_parts = parts, .num_threads = threads});
    }
  }
}

TEST_P(Conformance, NumericsWithScaleAndWithoutLse) {
  expect_matches({.lengths = {100}, .scale = 0.1352338f});
  expect_matches({.lengths = {100}, .scale = 20.0f});  // scores spread far: most weights vanish
  expect_matches({.lengths = {100, 700}, .lse = false});
}

TEST_P(Conformance, RandomShapes) {
  std::mt19937 rng(11);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  for (unsigned i = 0; i < 60; ++i) {
    Shape s;
    s.lengths.resize(static_cast<std::size_t>(draw(1, 5)));
    for (std::int32_t& n : s.lengths) n = draw(0, 3) == 0 ? draw(0, 3) : draw(0, 400);
    s.h_kv = draw(1, 3);
    s.h_q = s.h_kv * draw(1, 20);
    s.s_q = draw(0, 9) == 0 ? 64 : draw(1, 4);
    s.page_size = draw(1, 80);
    s.causal = draw(0, 1) == 1;
    s.strided = draw(0, 1) == 1;
    s.page_gap = draw(0, 1) * 40;
    s.dtype =
        std::array{DType::kBFloat16, DType::kFloat16, DType::kFloat32}[static_cast<std::size_t>(draw(0, 2))];
    if (draw(0, 1) == 1) {
      s.d_v = draw(1, 200);
      s.rope = draw(0, 128);
    }
    s.seed = i;
    expect_matches(s, {.num_parts = draw(1, 9), .num_threads = draw(1, 3)});
  }
}

TEST_P(Conformance, CausalIsBottomRightAligned) {
  // Shorter than s_q too: the first queries see nothing.
  for (const int s_q : {1, 2, 16, 64}) {
    for (const int parts : {1, 5}) {
      expect_matches({.lengths = {200, 1, 0, 17, 63, 65}, .s_q = s_q, .h_q = 3, .causal = true},
                     {.num_parts = parts});
    }
  }
}

TEST_P(Conformance, StridedPoolsAndOtherLayouts) {
  expect_matches({.lengths = {300, 70}, .h_q = 8, .page_gap = 576 * 3});
  expect_matches({.lengths = {300, 70}, .s_q = 3, .h_q = 8, .causal = true, .strided = true});
  expect_matches({.lengths = {300, 70}, .h_q = 8, .h_kv = 2, .page_gap = 64, .strided = true});
}

TEST_P(Conformance, QueriesInTwoParts) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int h_q : {1, 16, 128}) {
      for (const int s_q : {1, 3}) {
        const Shape shape{.lengths = {300, 0, 70},
                          .s_q = s_q,
                          .h_q = h_q,
                          .dtype = dtype,
                          .causal = true,
                          .rope_apart = true};
        expect_matches(shape);
        // The copy alone is another: not a bit of the result is.
        Shape whole = shape;
        whole.rope_apart = false;
        EXPECT_EQ(Problem(shape).run(backend()).out_bits, Problem(whole).run(backend()).out_bits);
      }
    }
  }
}

TEST_P(Conformance, ARowWithoutKeysIsZeroAndInfinite) {
  const Problem p({.lengths = {0, 5, 0}, .s_q = 2, .h_q = 3});
  const Result r = p.run(backend());
  for (std::size_t i = 0; i < r.out.size() / 3; ++i) ASSERT_EQ(r.out[i], 0.0f);
  for (std::size_t i = 0; i < 6; ++i) ASSERT_EQ(r.lse[i], std::numeric_limits<float>::infinity());
}

// Sets one element of a bf16, fp16 or fp32 vector of bytes.
void set_element(std::vector<std::uint8_t>& bytes, DType dtype, std::size_t index, float value) {
  visit_float_type(dtype, [&](auto element) {
    const auto x = from_double<decltype(element)>(value);
    std::memcpy(&bytes[index * sizeof(x)], &x, sizeof(x));
  });
}

TEST_P(Conformance, NumericsOfNanAndInfinityAreTheReferences) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr std::size_t kHeads = 5, kWidth = 576;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    if (!backend().supports(dtype, 576, 512, 64)) continue;
    for (const int parts : {1, 5}) {
      Problem p({.lengths = {300, 0, 70}, .s_q = 2, .h_q = kHeads, .dtype = dtype, .causal = true});
      const auto set_query = [&](std::size_t request, std::size_t token, std::size_t head, float value) {
        set_element(p.q, dtype, ((request * 2 + token) * kHeads + head) * kWidth + 575, value);
      };
      set_query(0, 0, 1, kNan);
      set_query(0, 1, 3, kNan);
      set_query(0, 1, 4, kInf);  // scores of both signs
      set_query(1, 0, 0, kNan);  // sees no key
      set_query(2, 1, 2, -kNan);
      const Result got = p.run(backend(), {.num_parts = parts}), expected = p.reference();
      EXPECT_EQ(difference(got, expected, dtype), "") << dtype_name(dtype) << " parts " << parts;
      const auto row = [&](std::size_t request, std::size_t token, std::size_t head) {
        return got.out[((request * 2 + token) * kHeads + head) * 512];
      };
      EXPECT_TRUE(std::isnan(row(0, 0, 1)) && std::isnan(row(0, 1, 3)) && std::isnan(row(0, 1, 4)));
      EXPECT_TRUE(std::isnan(got.lse[1 * 2]) && std::isnan(got.lse[3 * 2 + 1]));
      EXPECT_TRUE(std::isnan(row(2, 1, 2)) && !std::isnan(row(2, 0, 2)));
      EXPECT_EQ(row(1, 0, 0), 0.0f);
      EXPECT_EQ(got.lse[2 * kHeads], kInf);
    }
  }
}

TEST_P(Conformance, NumericsOfScoresThatAreMinusInfinity) {
  constexpr std::size_t kWidth = 576;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    if (!backend().supports(dtype, 576, 512, 64)) continue;
    for (const int parts : {1, 5}) {
      // The last column of the keys (no part of V) is -inf and the queries' is 1: a score of -inf.
      Problem p({.lengths = {300, 40}, .h_q = 3, .dtype = dtype});
      const auto key = [&](std::size_t request, std::size_t token) {
        const auto page =
            static_cast<std::size_t>(p.table[request * static_cast<std::size_t>(p.max_blocks) + token / 64]);
        return (page * 64 + token % 64) * kWidth;
      };
      for (std::size_t row = 0; row < 6; ++row) set_element(p.q, dtype, row * kWidth + 575, 1.0f);
      constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
      // Part of one request's keys, and all of another's.
      for (std::size_t t = 0; t < 130; ++t) set_element(p.cache, dtype, key(0, t) + 575, kMinusInf);
      for (std::size_t t = 0; t < 40; ++t) set_element(p.cache, dtype, key(1, t) + 575, kMinusInf);
      const Result got = p.run(backend(), {.num_parts = parts});
      EXPECT_EQ(difference(got, p.reference(), dtype), "") << dtype_name(dtype) << " parts " << parts;
      EXPECT_FALSE(std::isnan(got.out[0]));
      EXPECT_TRUE(std::isnan(got.out[3 * 512]) && std::isnan(got.lse[3]));
    }
  }
}

TEST_P(Conformance, EmptyBatch) {
  const Problem p({.lengths = {}});
  EXPECT_TRUE(p.run(backend()).out.empty());
}

TEST_P(Conformance, BatchRepeatsAreBitEqual) {
  const Problem p({.lengths = {3000, 100, 0, 777}, .h_q = 20});
  const Result first = p.run(backend());
  for (int i = 0; i < 5; ++i) {
    // The thread count changes nothing: bits come from the schedule.
    const Result again = p.run(backend(), {.num_threads = 1 + i % 3});
    ASSERT_EQ(again.out_bits, first.out_bits);
    ASSERT_EQ(again.lse, first.lse);
  }
}

TEST_P(Conformance, BatchInvariantModeGivesARequestTheSameBitsInAnyCompany) {
  if (!backend().batch_invariant()) GTEST_SKIP() << "no batch-invariant mode in this backend";
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    if (!backend().supports(dtype, 576, 512, 64)) continue;
    const Problem p(
        {.lengths = {3000, 100, 0, 777, 64}, .s_q = 2, .h_q = 10, .dtype = dtype, .causal = true});
    const std::size_t row = static_cast<std::size_t>(2 * 10 * 512) * dtype_size(dtype);
    const Result all = p.run(backend(), {.num_parts = 4, .fixed_split_blocks = 3});
    EXPECT_EQ(difference(all, p.reference(), dtype), "");
    const auto expect_same = [&](const std::vector<std::size_t>& requests, const RunOptions& how) {
      const Result some = p.selected(requests).run(backend(), how);
      for (std::size_t i = 0; i < requests.size(); ++i) {
        ASSERT_EQ(std::memcmp(&some.out_bits[i * row], &all.out_bits[requests[i] * row], row), 0)
            << "request " << requests[i];
        ASSERT_TRUE(std::equal(some.lse.begin() + static_cast<std::ptrdiff_t>(i * 20),
                               some.lse.begin() + static_cast<std::ptrdiff_t>(i * 20 + 20),
                               all.lse.begin() + static_cast<std::ptrdiff_t>(requests[i] * 20)));
      }
    };
    expect_same({0}, {.num_parts = 1, .num_threads = 1, .fixed_split_blocks = 3});
    expect_same({4, 3, 2, 1, 0}, {.num_parts = 7, .num_threads = 3, .fixed_split_blocks = 3});
    expect_same({3, 0}, {.num_parts = 132, .num_threads = 2, .fixed_split_blocks = 3});
    expect_same({2, 1}, {.num_parts = 2, .num_threads = 1, .fixed_split_blocks = 3});
  }
}

TEST_P(Conformance, OffsetsBeyondTwoToThe31) {
  if (backend().device().type != DeviceType::kCpu) GTEST_SKIP() << "covered by the GPU suite";
  // A pool of 3 x 2^31 elements of which three pages are touched.
  constexpr std::int64_t kPage = 64 * 576, kPages = 3 * (std::int64_t{1} << 31) / kPage;
  const std::size_t bytes = static_cast<std::size_t>(kPages * kPage) * 2;
  void* pool =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(pool, MAP_FAILED);
  Problem p({.lengths = {150}});
  auto* elements = static_cast<std::uint16_t*>(pool);
  std::vector<std::int32_t> pages{static_cast<std::int32_t>(kPages - 1), 0,
                                  static_cast<std::int32_t>(kPages / 2)};
  for (std::size_t j = 0; j < 3; ++j) {
    std::memcpy(elements + pages[j] * kPage, &p.cache[static_cast<std::size_t>(p.table[j]) * kPage * 2],
                kPage * 2);
  }
  std::vector<std::uint8_t> out;
  std::vector<float> lse;
  DenseDecodeArgs a = p.host_args(out, lse);
  a.k_cache = TensorView::contiguous(pool, DType::kBFloat16, {kPages, 64, 1, 576});
  a.block_table = TensorView::contiguous(pages.data(), DType::kInt32, {1, 3});
  const auto schedule = DecodeSchedule::build(p.shape().lengths, cpu_schedule_options(2));
  std::vector<std::uint8_t> workspace(dense_decode_workspace_size(a, schedule.view()) + 64);
  auto* aligned = workspace.data() + (64 - reinterpret_cast<std::uintptr_t>(workspace.data()) % 64);
  dense_decode(a, schedule.view(), aligned, workspace.size() - 64);
  munmap(pool, bytes);
  const Result expected = p.reference();
  // `out` is dense here.
  Result got;
  got.lse = lse;
  for (std::size_t i = 0; i < out.size(); i += sizeof(Bf16)) {
    Bf16 x;
    std::memcpy(&x, &out[i], sizeof(x));
    got.out.push_back(to_float(x));
  }
  EXPECT_EQ(difference(got, expected, DType::kBFloat16), "");
}

TEST_P(Conformance, WorkspaceIsBoundedByWorkersNotTokens) {
  if (backend().device().type != DeviceType::kCpu) GTEST_SKIP() << "covered by the GPU suite";
  const auto bytes = [&](std::int32_t length) {
    const Problem p({.lengths = {length}, .page_size = 256, .d_v = 8, .rope = 0});
    std::vector<std::uint8_t> out;
    std::vector<float> lse;
    const auto schedule = DecodeSchedule::build(p.shape().lengths, cpu_schedule_options(2));
    return dense_decode_workspace_size(p.host_args(out, lse), schedule.view(), {.num_threads = 2});
  };
  EXPECT_EQ(bytes(10), bytes(100000));
}

TEST_P(Conformance, AForkedChildDecodes) {
  if (backend().device().type != DeviceType::kCpu) GTEST_SKIP() << "a CUDA context does not survive a fork";
  const Problem p({.lengths = {3000, 500}, .h_q = 16});
  const Result before = p.run(backend());  // starts OpenMP's threads
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);  // a child that waits for threads that are not there dies of it
    _exit(p.run(backend()).out_bits == before.out_bits ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

// Latent keys expanded by random W_UK and W_UV and plain multi-head attention over them: no code in common
// with the absorbed form.
TEST(Reference, AgreesWithTheUnabsorbedFormulation) {
  constexpr int kHeads = 3, kNope = 32, kRope = 16, kLatent = 48, kValue = 24, kKeys = 50;
  std::mt19937 rng(5);
  std::normal_distribution<double> normal;
  const auto draw = [&](std::size_t n) {
    std::vector<double> v(n);
    for (double& x : v) x = normal(rng);
    return v;
  };
  const auto w_uk = draw(kHeads * kNope * kLatent), w_uv = draw(kHeads * kValue * kLatent);
  const auto q_nope = draw(kHeads * kNope), q_rope = draw(kHeads * kRope);
  auto cache = draw(kKeys * (kLatent + kRope));
  const float scale = 0.0625f;
  std::vector<double> q(kHeads * (kLatent + kRope)), out(kHeads * kLatent), lse(kHeads);
  for (int h = 0; h < kHeads; ++h) {
    for (int l = 0; l < kLatent; ++l) {
      double x = 0;
      for (int n = 0; n < kNope; ++n)
        x += q_nope[static_cast<std::size_t>(h * kNope + n)] *
             w_uk[static_cast<std::size_t>((h * kNope + n) * kLatent + l)];
      q[static_cast<std::size_t>(h * (kLatent + kRope) + l)] = x;
    }
    for (int r = 0; r < kRope; ++r)
      q[static_cast<std::size_t>(h * (kLatent + kRope) + kLatent + r)] =
          q_rope[static_cast<std::size_t>(h * kRope + r)];
  }
  std::vector<std::int32_t> table{0}, lengths{kKeys};
  DenseDecodeArgs a;
  a.q = TensorView::contiguous(q.data(), DType::kFloat64, {1, 1, kHeads, kLatent + kRope});
  a.k_cache = TensorView::contiguous(cache.data(), DType::kFloat64, {1, kKeys, 1, kLatent + kRope});
  a.block_table = TensorView::contiguous(table.data(), DType::kInt32, {1, 1});
  a.cache_seqlens = TensorView::contiguous(lengths.data(), DType::kInt32, {1});
  a.out = TensorView::contiguous(out.data(), DType::kFloat64, {1, 1, kHeads, kLatent});
  a.lse = TensorView::contiguous(lse.data(), DType::kFloat64, {1, kHeads, 1});
  reference::dense_decode(a, {.softmax_scale = scale});

  const auto latent = [&](int t, int l) {
    return cache[static_cast<std::size_t>(t * (kLatent + kRope) + l)];
  };
  for (int h = 0; h < kHeads; ++h) {
    std::vector<double> weight(kKeys), expected(kValue);
    double sum = 0;
    for (int t = 0; t < kKeys; ++t) {
      double score = 0;
      for (int n = 0; n < kNope; ++n) {
        double key = 0;
        for (int l = 0; l < kLatent; ++l)
          key += w_uk[static_cast<std::size_t>((h * kNope + n) * kLatent + l)] * latent(t, l);
        score += q_nope[static_cast<std::size_t>(h * kNope + n)] * key;
      }
      for (int r = 0; r < kRope; ++r)
        score += q_rope[static_cast<std::size_t>(h * kRope + r)] * latent(t, kLatent + r);
      weight[static_cast<std::size_t>(t)] = std::exp(score * double{scale});
      sum += weight[static_cast<std::size_t>(t)];
    }
    for (int v = 0; v < kValue; ++v) {
      double x = 0, absorbed = 0;
      for (int t = 0; t < kKeys; ++t) {
        double value = 0;
        for (int l = 0; l < kLatent; ++l)
          value += w_uv[static_cast<std::size_t>((h * kValue + v) * kLatent + l)] * latent(t, l);
        x += weight[static_cast<std::size_t>(t)] / sum * value;
      }
      for (int l = 0; l < kLatent; ++l)
        absorbed += w_uv[static_cast<std::size_t>((h * kValue + v) * kLatent + l)] *
                    out[static_cast<std::size_t>(h * kLatent + l)];
      EXPECT_NEAR(absorbed, x, 1e-10);
    }
    EXPECT_NEAR(lse[static_cast<std::size_t>(h)], std::log(sum), 1e-10);
  }
}

}  // namespace
}  // namespace flash_mla::conformance
