// The weight-streaming product against fp64 sums on the host.

#include "kernels/gemm/sm90/skinny_gemm.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <tuple>

#include "base/fp8.h"
#include "kernels/gemm/sm90/weight_stream.h"
#include "model_data.h"

namespace flash_mla::gpu_test {
namespace {

using sm90::skinny_gemm;
using sm90::SkinnyGemm;

struct Shape {
  int n, k;
};

/// Every array of a product, on host and device.
struct Problem {
  Problem(Random& random, int m, Shape shape, const SkinnyGemm& flags, bool bias, int x_pad, int out_pad,
          std::size_t misalign = 0)
      : args(flags),
        x_host(random.bf16(std::size_t(m) * (shape.k + x_pad), 1.0f)),
        weight_host(random.fp32(std::size_t(shape.n) * shape.k, 1.0f / std::sqrt(float(shape.k)))),
        bias_host(random.fp32(bias ? shape.n : 1, 1.0f)),
        out_width((flags.silu_mul ? shape.n / 2 : shape.n) + out_pad),
        out_before(random.fp32(std::size_t(m) * out_width, 1.0f)),
        x(x_host, misalign),
        weight_fp32(weight_host),
        weight_bf16(narrow(weight_host)),
        bias_device(bias_host),
        out(out_before.size() * (flags.out_fp32 ? 2 : 1)) {
    if (!flags.weight_fp32) {
      for (float& w : weight_host) w = from_bf16(to_bf16(w));
    }
    args.x = x.get();
    args.x_stride = shape.k + x_pad;
    args.weight = flags.weight_fp32 ? static_cast<const void*>(weight_fp32.get()) : weight_bf16.get();
    args.bias = bias ? bias_device.get() : nullptr;
    args.out = out.get();
    args.out_stride = out_width;
    args.m = m;
    args.n = shape.n;
    args.k = shape.k;
    if (!flags.out_fp32) {
      for (float& v : out_before) v = from_bf16(to_bf16(v));
    }
    reset();
  }

  static std::vector<std::uint16_t> narrow(const std::vector<float>& v) {
    std::vector<std::uint16_t> out(v.size());
    std::transform(v.begin(), v.end(), out.begin(), to_bf16);
    return out;
  }

  /// Poison, or what is to be added to; the padding between rows always keeps known values.
  void reset() {
    const int width = static_cast<int>(args.silu_mul ? args.n / 2 : args.n);
    std::vector<float> v = out_before;
    if (!args.accumulate) {
      for (std::int64_t i = 0; i < std::int64_t(v.size()); ++i) {
        if (i % out_width < width) v[std::size_t(i)] = NAN;
      }
    }
    if (args.out_fp32) {
      check(cudaMemcpy(out.get(), v.data(), v.size() * 4, cudaMemcpyHostToDevice), "cudaMemcpy");
    } else {
      out.upload(narrow(v));
    }
  }

  std::vector<float> result() {
    const std::vector<std::uint16_t> raw = out.host();
    std::vector<float> v(out_before.size());
    for (std::size_t i = 0; i < v.size(); ++i) {
      if (args.out_fp32) {
        std::memcpy(&v[i], raw.data() + 2 * i, 4);
      } else {
        v[i] = from_bf16(raw[i]);
      }
    }
    return v;
  }

  double dot(int row, int n) const {
    double sum = 0;
    const std::uint16_t* a = x_host.data() + std::size_t(row) * args.x_stride;
    const float* b = weight_host.data() + std::size_t(n) * args.k;
    for (int i = 0; i < args.k; ++i) sum += double(from_bf16(a[i])) * b[i];
    return sum + (args.bias != nullptr ? double(bias_host[std::size_t(n)]) : 0.0);
  }
  double expected(int row, int n) const {
    double v = dot(row, n);
    if (args.silu_mul) v = silu(v) * dot(row, n + static_cast<int>(args.n / 2));
    return v + (args.accumulate ? double(out_before[std::size_t(row) * out_width + n]) : 0.0);
  }

  /// Every output is finite, no padding was touched, and the columns at both ends and some between are right.
  void verify(Random& random, const std::string& name) {
    const std::vector<float> got = result();
    const int width = static_cast<int>(args.silu_mul ? args.n / 2 : args.n);
    std::set<int> columns;
    for (int i = 0; i < std::min(width, 6); ++i) columns.insert({i, width - 1 - i});
    for (int i = 0; i < 24; ++i) columns.insert(random.below(width));
    int bad = 0;
    for (int row = 0; row < args.m && bad < 5; ++row) {
      for (int n = 0; n < out_width; ++n) {
        const float v = got[std::size_t(row) * out_width + n];
        if (n >= width) {
          if (v != out_before[std::size_t(row) * out_width + n]) {
            ADD_FAILURE() << name << ": padding at (" << row << ", " << n << ") is " << v;
            ++bad;
          }
          continue;
        }
        if (!std::isfinite(v)) {
          ADD_FAILURE() << name << ": out(" << row << ", " << n << ") is " << v;
          if (++bad >= 5) break;
        }
      }
      for (const int n : columns) {
        const double want = expected(row, n), v = got[std::size_t(row) * out_width + n];
        const double bound = args.out_fp32 ? 1e-5 * (1 + std::abs(want)) + (args.silu_mul ? 1e-5 : 0)
                                           : 1e-4 + std::abs(want) / 250;
        if (!(std::abs(v - want) <= bound)) {
          ADD_FAILURE() << name << ": out(" << row << ", " << n << ") is " << v << ", expected " << want;
          if (++bad >= 5) break;
        }
      }
    }
  }

  SkinnyGemm args;
  std::vector<std::uint16_t> x_host;
  std::vector<float> weight_host;
  std::vector<float> bias_host;
  int out_width;
  std::vector<float> out_before;
  OnDevice<std::uint16_t> x;
  OnDevice<float> weight_fp32;
  OnDevice<std::uint16_t> weight_bf16;
  OnDevice<float> bias_device;
  OnDevice<std::uint16_t> out;
};

/// Turns a problem's weights into e4m3 with scales of 2^-24 to 2^-11 for every 8 rows and 128 columns, every code but NaN
/// among them; its host copy holds what they mean.
struct E4m3Weights {
  E4m3Weights(Random& random, Problem& p) : codes(make_codes(random, p)), scales(make_scales(random, p)) {
    p.args.weight = codes.get();
    p.args.weight_scales = scales.get();
  }

  std::vector<std::uint8_t> make_codes(Random& random, Problem& p) {
    std::vector<std::uint8_t> out(p.weight_host.size());
    for (std::uint8_t& c : out) c = static_cast<std::uint8_t>(random.below(127) + 128 * random.below(2));
    for (std::size_t i = 0; i < out.size(); ++i) p.weight_host[i] = to_float(E4m3{out[i]});
    return out;
  }
  std::vector<float> make_scales(Random& random, Problem& p) {
    const std::int64_t columns = (p.args.k + 127) / 128;
    std::vector<float> out(static_cast<std::size_t>((p.args.n + 7) / 8 * columns));
    for (float& s : out) s = std::ldexp(1.0f + float(random.below(1000)) / 1000, random.below(13) - 24);
    for (std::int64_t n = 0; n < p.args.n; ++n) {
      for (std::int64_t k = 0; k < p.args.k; ++k) {
        p.weight_host[std::size_t(n * p.args.k + k)] *= out[std::size_t(n / 8 * columns + k / 128)];
      }
    }
    return out;
  }

  OnDevice<std::uint8_t> codes;
  OnDevice<float> scales;
};

void run(const SkinnyGemm& args) {
  check(skinny_gemm(args, nullptr), "skinny_gemm");
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

const Shape kShapes[] = {{576, 2048}, {2, 8},     {48, 64},  {64, 48},     {34, 1408},
                         {1000, 72},  {130, 520}, {6, 4096}, {2816, 1024}, {4096, 512}};

class Rows : public testing::TestWithParam<int> {};

TEST_P(Rows, MatchFp64Sums) {
  const int m = GetParam();
  Random random(1000 + std::uint64_t(m));
  for (const Shape shape : kShapes) {
    for (int variant = 0; variant < 8; ++variant) {
      SkinnyGemm flags;
      flags.silu_mul = variant == 2 || variant == 5;
      flags.weight_fp32 = variant == 4;
      flags.out_fp32 = variant == 1 || variant == 4 || variant == 5;
      flags.accumulate = variant == 3 || variant == 6;
      flags.batch_invariant = variant == 6;
      flags.programmatic_launch = random.coin();
      Problem p(random, m, shape, flags, variant % 3 == 0, variant == 7 ? 24 : 0, variant % 4);
      run(p.args);
      p.verify(random, (testing::Message()
                        << "m" << m << " n" << shape.n << " k" << shape.k << " variant " << variant)
                           .GetString());
      if (HasFailure()) return;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(SkinnyGemm, Rows, testing::Values(1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 130));

TEST(SkinnyGemm, E4m3WeightsMatchFp64Sums) {
  for (const int m : {1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 130}) {
    Random random(2000 + std::uint64_t(m));
    // The last two are not for the fast path: rows of no 16 bytes, and halves of no 8 rows.
    for (const Shape shape : {Shape{576, 2048}, Shape{8, 16}, Shape{16, 144}, Shape{1000, 400},
                              Shape{2816, 1024}, Shape{4096, 512}, Shape{40, 72}, Shape{36, 256}}) {
      for (int variant = 0; variant < 6; ++variant) {
        SkinnyGemm flags;
        flags.silu_mul = variant == 2 || variant == 5;
        flags.out_fp32 = variant != 3;
        flags.accumulate = variant == 3 || variant == 4;
        flags.batch_invariant = variant == 4;
        flags.programmatic_launch = random.coin();
        Problem p(random, m, shape, flags, variant % 3 == 0, variant == 5 ? 24 : 0, 4 * (variant % 2));
        const E4m3Weights weights(random, p);
        run(p.args);
        p.verify(random, (testing::Message()
                          << "e4m3 m" << m << " n" << shape.n << " k" << shape.k << " variant " << variant)
                             .GetString());
        if (HasFailure()) return;
      }
    }
  }
}

TEST(SkinnyGemm, E4m3WeightsOfEveryRowCount) {
  for (int m = 1; m <= 300; ++m) {
    Random random(3000 + std::uint64_t(m));
    SkinnyGemm flags;
    flags.out_fp32 = true;
    flags.silu_mul = m % 2 == 0;
    flags.batch_invariant = m % 3 == 0;
    Problem p(random, m, {272, 400}, flags, m % 5 == 0, 0, 0);
    const E4m3Weights weights(random, p);
    run(p.args);
    p.verify(random, (testing::Message() << "e4m3 m" << m).GetString());
    if (HasFailure()) return;
  }
}

TEST(SkinnyGemm, EveryDivisionOfE4m3) {
  Random random(6);
  for (const bool silu : {false, true}) {
    for (const int m : {1, 13, 27, 60, 100}) {
      SkinnyGemm flags;
      flags.silu_mul = silu;
      flags.out_fp32 = true;
      Problem p(random, m, {silu ? 1200 : 616, 2128}, flags, true, 8, 4);
      const E4m3Weights weights(random, p);
      sm90::WeightStream s;
      s.weight = p.args.weight;
      s.scales = p.args.weight_scales;
      s.bias = p.args.bias;
      s.x = p.args.x;
      s.out = p.args.out;
      s.x_stride = p.args.x_stride;
      s.out_stride = p.args.out_stride;
      s.n = p.args.n;
      s.k = p.args.k;
      s.m = m;
      s.out_fp32 = true;
      s.silu_mul = silu;
      const std::vector<sm90::StreamPlan> plans = sm90::stream_plans(s, 132);
      ASSERT_GE(plans.size(), 4u);
      for (const sm90::StreamPlan& plan : plans) {
        p.reset();
        check(sm90::launch_stream(s, plan, nullptr), "launch_stream");
        check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
        p.verify(random, (testing::Message() << "m" << m << " silu " << silu << " tiles " << plan.tiles
                                             << " warps_n " << plan.warps_n << " cluster " << plan.cluster
                                             << " width " << plan.width << " x" << plan.ctas_per_sm)
                             .GetString());
        if (HasFailure()) return;
      }
    }
  }
}

TEST(SkinnyGemm, BatchInvariantRowsOfE4m3) {
  Random random(14);
  for (const Shape shape : {Shape{576, 2048}, Shape{4096, 2048}, Shape{2048, 1408}}) {
    SkinnyGemm flags;
    flags.out_fp32 = true;
    flags.batch_invariant = true;
    Problem all(random, 100, shape, flags, true, 0, 0);
    const E4m3Weights weights(random, all);
    run(all.args);
    const std::vector<float> want = all.result();
    for (const int m : {1, 3, 8, 9, 16, 20, 32, 40, 64, 70}) {
      const int first = random.below(100 - m + 1);
      SkinnyGemm part = all.args;
      part.m = m;
      part.x = all.x.get() + std::int64_t(first) * part.x_stride;
      all.reset();
      run(part);
      EXPECT_EQ(std::memcmp(all.result().data(), want.data() + std::size_t(first) * shape.n,
                            std::size_t(m) * shape.n * 4),
                0)
          << "m " << m << " n " << shape.n;
    }
  }
}

TEST(SkinnyGemm, EveryDivisionOfTheWork) {
  Random random(5);
  for (const int kind : {0, 1, 2}) {
    for (const int m : {1, 13, 27, 60, 100}) {
      SkinnyGemm flags;
      flags.silu_mul = kind == 1;
      flags.weight_fp32 = flags.out_fp32 = kind == 2;
      Problem p(random, m, {kind == 1 ? 1208 : 612, 2120}, flags, true, 8, 4);
      sm90::WeightStream s;
      s.weight = p.args.weight;
      s.bias = p.args.bias;
      s.x = p.args.x;
      s.out = p.args.out;
      s.x_stride = p.args.x_stride;
      s.out_stride = p.args.out_stride;
      s.n = p.args.n;
      s.k = p.args.k;
      s.m = m;
      s.out_fp32 = flags.out_fp32;
      s.weight_fp32 = flags.weight_fp32;
      s.silu_mul = flags.silu_mul;
      const std::vector<sm90::StreamPlan> plans = sm90::stream_plans(s, 132);
      ASSERT_GE(plans.size(), 8u);
      for (const sm90::StreamPlan& plan : plans) {
        p.reset();
        check(sm90::launch_stream(s, plan, nullptr), "launch_stream");
        check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
        p.verify(random, (testing::Message() << "m" << m << " kind " << kind << " tiles " << plan.tiles
                                             << " warps_n " << plan.warps_n << " cluster " << plan.cluster
                                             << " width " << plan.width << " x" << plan.ctas_per_sm)
                             .GetString());
        if (HasFailure()) return;
      }
    }
  }
}

TEST(SkinnyGemm, WhatTheFastPathDoesNotTake) {
  Random random(7);
  for (const auto& [k, pad, misalign] :
       {std::tuple{50, 0, 0}, std::tuple{64, 3, 0}, std::tuple{64, 0, 2}, std::tuple{1, 0, 0}}) {
    for (const bool silu : {false, true}) {
      SkinnyGemm flags;
      flags.silu_mul = silu;
      flags.weight_fp32 = random.coin();
      flags.accumulate = random.coin();
      Problem p(random, 5, {38, k}, flags, true, pad, 1, std::size_t(misalign));
      run(p.args);
      p.verify(random, (testing::Message() << "k" << k << " pad" << pad).GetString());
    }
  }
}

TEST(SkinnyGemm, SameBitsEveryTime) {
  Random random(11);
  for (const int m : {1, 5, 12, 30, 64}) {
    SkinnyGemm flags;
    flags.out_fp32 = true;
    Problem p(random, m, {1536, 4096}, flags, true, 0, 0);
    run(p.args);
    const std::vector<float> first = p.result();
    for (int i = 0; i < 5; ++i) {
      p.reset();
      run(p.args);
      EXPECT_EQ(std::memcmp(first.data(), p.result().data(), first.size() * 4), 0) << "m " << m;
    }
  }
}

TEST(SkinnyGemm, BatchInvariantRows) {
  Random random(13);
  for (const Shape shape : {Shape{576, 2048}, Shape{4096, 2048}, Shape{24576, 1536}, Shape{2048, 1408}}) {
    for (const bool fp32 : {false, true}) {
      SkinnyGemm flags;
      flags.out_fp32 = true;
      flags.batch_invariant = true;
      flags.weight_fp32 = fp32;
      Problem all(random, 100, shape, flags, true, 0, 0);
      run(all.args);
      const std::vector<float> want = all.result();
      for (const int m : {1, 3, 8, 9, 16, 20, 32, 40, 64, 70}) {
        const int first = random.below(100 - m + 1);
        SkinnyGemm part = all.args;
        part.m = m;
        part.x = all.x.get() + std::int64_t(first) * part.x_stride;
        all.reset();
        run(part);
        EXPECT_EQ(std::memcmp(all.result().data(), want.data() + std::size_t(first) * shape.n,
                              std::size_t(m) * shape.n * 4),
                  0)
            << "m " << m << " n " << shape.n;
      }
    }
  }
}

TEST(SkinnyGemm, ChainWithEarlyLaunchesInAGraph) {
  // Every product reads what the one before wrote; the early ones must wait for it.
  Random random(17);
  constexpr int kWidth = 1024, kSteps = 24, kRows = 4;
  const OnDevice<std::uint16_t> weights(
      random.bf16(std::size_t(kSteps) * kWidth * kWidth, 1.0f / std::sqrt(float(kWidth))));
  const OnDevice<std::uint16_t> x(random.bf16(kRows * kWidth, 1.0f));
  OnDevice<std::uint16_t> rows(std::size_t(kSteps) * kRows * kWidth);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  const auto queue = [&](bool early) {
    for (int i = 0; i < kSteps; ++i) {
      SkinnyGemm a;
      a.x = i == 0 ? x.get() : rows.get() + std::int64_t(i - 1) * kRows * kWidth;
      a.weight = weights.get() + std::int64_t(i) * kWidth * kWidth;
      a.out = rows.get() + std::int64_t(i) * kRows * kWidth;
      a.x_stride = a.out_stride = a.n = a.k = kWidth;
      a.m = kRows;
      a.programmatic_launch = early;
      check(skinny_gemm(a, stream), "skinny_gemm");
    }
  };
  queue(false);
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  const std::vector<std::uint16_t> want = rows.host();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  queue(true);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  for (int i = 0; i < 20; ++i) {
    rows.poison();
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    ASSERT_EQ(rows.host(), want) << "replay " << i;
  }
  check(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
  check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

TEST(SkinnyGemm, RefusesWhatMakesNoSense) {
  float dummy[4];
  SkinnyGemm a;
  EXPECT_EQ(skinny_gemm(a, nullptr), cudaSuccess);  // nothing to do
  a.m = 1;
  a.n = 3;
  a.k = 8;
  EXPECT_EQ(skinny_gemm(a, nullptr), cudaErrorInvalidValue);  // no pointers
  a.x = a.weight = dummy;
  a.out = dummy;
  a.silu_mul = true;
  EXPECT_EQ(skinny_gemm(a, nullptr), cudaErrorInvalidValue);  // odd n
  a.silu_mul = false;
  a.m = 2;
  EXPECT_EQ(skinny_gemm(a, nullptr), cudaErrorInvalidValue);  // strides
}

}  // namespace
}  // namespace flash_mla::gpu_test
