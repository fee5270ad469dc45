// What the subcommands share: random problems, the comparison with the reference, presets, limits.

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <set>

#include "bench/blas.h"
#include "bench/compare.h"
#include "bench/limits.h"
#include "bench/measure.h"
#include "bench/preset.h"
#include "bench/problem.h"
#include "bench/table.h"
#include "bench/verify_cases.h"
#include "flash_mla/error.h"

namespace flash_mla::bench {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

ProblemSpec small_spec() {
  ProblemSpec spec;
  spec.cache_seqlens = {5, 0, 33};
  spec.s_q = 2;
  spec.h_q = 4;
  spec.h_kv = 2;
  spec.d_v = 8;
  spec.d_rope = 4;
  spec.page_size = 16;
  spec.dtype = DType::kFloat32;
  spec.page_gap = 3;
  spec.head_gap = 1;
  spec.seed = 9;
  return spec;
}

TEST(Random, DistributionsHaveTheirMoments) {
  Random random(1);
  double sum = 0, squares = 0;
  constexpr int kCount = 200000;
  for (int i = 0; i < kCount; ++i) {
    const double x = random.normal();
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / kCount, 0.0, 0.01);
  EXPECT_NEAR(squares / kCount, 1.0, 0.01);
  std::set<std::int64_t> seen;
  for (int i = 0; i < 1000; ++i) seen.insert(random.integer(-2, 2));
  EXPECT_EQ(seen, (std::set<std::int64_t>{-2, -1, 0, 1, 2}));
}

TEST(Problem, PagesAreDistinctAndUnusedPlacesArePoison) {
  const Problem problem(small_spec());
  const DenseDecodeArgs& a = problem.args();
  const ProblemSpec& spec = problem.spec();
  std::set<std::int32_t> pages;
  int used = 0;
  for (std::int64_t r = 0; r < 3; ++r) {
    const int length = spec.cache_seqlens[static_cast<std::size_t>(r)];
    for (std::int64_t n = 0; n < a.block_table.size(1); ++n) {
      const std::int32_t page = a.block_table.ptr<std::int32_t>()[r * a.block_table.stride(0) + n];
      if (n * spec.page_size >= length) {
        EXPECT_TRUE(page == -1 || page == 2147480000) << page;
        continue;
      }
      ++used;
      EXPECT_TRUE(page >= 0 && page < a.k_cache.size(0)) << page;
      pages.insert(page);
      for (std::int64_t t = 0; t < spec.page_size; ++t) {
        const float* token = a.k_cache.ptr<float>() + page * a.k_cache.stride(0) + t * a.k_cache.stride(1);
        for (int d = 0; d < spec.h_kv * spec.d_qk(); ++d) {
          EXPECT_EQ(std::isnan(token[d]), n * spec.page_size + t >= length);
          if (!std::isnan(token[d])) {
            EXPECT_LE(std::abs(token[d]), 1.0f);
          }
        }
      }
    }
  }
  EXPECT_EQ(used, 4);
  EXPECT_EQ(pages.size(), 4u) << "two requests share a page";
  EXPECT_EQ(a.k_cache.size(0), 4 + spec.spare_pages);
  EXPECT_TRUE(std::isnan(a.out.ptr<float>()[0]));
  EXPECT_TRUE(std::isnan(a.q.ptr<float>()[spec.d_qk()])) << "the gap after a head";
}

TEST(Problem, SeedDecidesEverything) {
  const Problem a(small_spec()), b(small_spec());
  ProblemSpec other = small_spec();
  other.seed = 10;
  const Problem c(other);
  EXPECT_EQ(a.args().q.ptr<float>()[0], b.args().q.ptr<float>()[0]);
  EXPECT_NE(a.args().q.ptr<float>()[0], c.args().q.ptr<float>()[0]);
}

TEST(Problem, CountsFlopAndBytesByTheFormula) {
  ProblemSpec spec;
  spec.cache_seqlens = {100, 28};
  spec.h_q = 16;
  spec.s_q = 3;
  EXPECT_DOUBLE_EQ(spec.flop(), 2.0 * 16 * 3 * 128 * (576 + 512));
  EXPECT_DOUBLE_EQ(spec.bytes(), 2.0 * (2 * 3 * 16 * 576 + 128 * 576 + 2 * 3 * 16 * 512));
}

TEST(Problem, VariableLengthsVaryAroundTheirMean) {
  const auto lengths = draw_lengths(4000, 1000, true, 5);
  double sum = 0;
  for (const int length : lengths) {
    EXPECT_GE(length, 1);
    EXPECT_LE(length, 2000);
    sum += length;
  }
  EXPECT_NEAR(sum / 4000, 1000, 30);
  EXPECT_NE(lengths.front(), lengths.back());
  EXPECT_EQ(draw_lengths(3, 7, false, 5), (std::vector<std::int32_t>{7, 7, 7}));
}

TEST(Problem, ASliceIsTheHeadItNames) {
  const Problem problem(small_spec());
  const DenseDecodeArgs& a = problem.args();
  const DenseDecodeArgs s = slice_head(a, 2, 3);
  EXPECT_EQ(s.q.data, a.q.ptr<float>() + 2 * a.q.stride(0) + 3 * a.q.stride(2));
  EXPECT_EQ(s.k_cache.data, a.k_cache.ptr<float>() + 1 * a.k_cache.stride(2));
  EXPECT_EQ(s.lse.data, a.lse.ptr<float>() + 2 * a.lse.stride(0) + 3 * a.lse.stride(1));
  EXPECT_EQ(s.cache_seqlens.ptr<std::int32_t>()[0], 33);
  EXPECT_EQ(s.q.size(2), 1);
}

class CompareTest : public ::testing::Test {
 protected:
  // One row with keys, one without.
  std::vector<float> out_{0.1f, -0.2f, 0.3f, 0.0f, 0.0f, 0.0f};
  std::vector<float> lse_{1.5f, kInf};
  const std::vector<float> ref_out_ = out_;
  const std::vector<float> ref_lse_ = lse_;

  Comparison compare(DType tolerance = DType::kBFloat16) const {
    const auto view = [](const std::vector<float>& v, std::initializer_list<std::int64_t> shape) {
      return TensorView::contiguous(const_cast<float*>(v.data()), DType::kFloat32, shape);
    };
    return compare_outputs(view(out_, {2, 1, 1, 3}), view(lse_, {2, 1, 1}), view(ref_out_, {2, 1, 1, 3}),
                           view(ref_lse_, {2, 1, 1}), tolerance_for(tolerance));
  }
};

TEST_F(CompareTest, AcceptsEqualAndSlightlyDifferent) {
  EXPECT_TRUE(compare().ok);
  out_[0] += 7e-4f;
  EXPECT_TRUE(compare().ok) << compare().failure;
  EXPECT_NEAR(compare().out_max_abs, 7e-4, 1e-6);
  EXPECT_FALSE(compare(DType::kFloat32).ok);
}

TEST_F(CompareTest, NamesTheElementThatIsWrong) {
  out_[1] = -0.21f;
  EXPECT_FALSE(compare().ok);
  EXPECT_NE(compare().failure.find("out[request 0, query 0, head 0, 1]"), std::string::npos)
      << compare().failure;
}

TEST_F(CompareTest, RefusesNaNAnywhere) {
  out_[2] = kNaN;
  EXPECT_FALSE(compare().ok);
  out_ = ref_out_;
  lse_[0] = kNaN;
  EXPECT_FALSE(compare().ok);
}

TEST_F(CompareTest, RefusesSmallErrorsEverywhere) {
  for (int d = 0; d < 3; ++d) out_[static_cast<std::size_t>(d)] += (d % 2 == 0 ? 7.9e-4f : -7.9e-4f) * 1.0f;
  EXPECT_FALSE(compare().ok);  // each element passes, the cosine does not
  EXPECT_NE(compare().failure.find("cosine"), std::string::npos) << compare().failure;
}

TEST_F(CompareTest, EmptyRowsMustBeExact) {
  out_[4] = 1e-6f;
  EXPECT_FALSE(compare().ok);
  out_ = ref_out_;
  lse_[1] = -kInf;
  EXPECT_FALSE(compare().ok);
  lse_[1] = 100.0f;
  EXPECT_FALSE(compare().ok);
}

TEST_F(CompareTest, LseHasItsOwnTolerance) {
  lse_[0] = 1.5001f;
  EXPECT_TRUE(compare().ok);
  lse_[0] = 1.501f;
  EXPECT_FALSE(compare().ok);
  EXPECT_NE(compare().failure.find("lse[request 0"), std::string::npos);
}

TEST(Verify, CasesAreAFunctionOfSeedAndIndex) {
  EXPECT_EQ(describe(make_verify_case(3, 7)), describe(make_verify_case(3, 7)));
  EXPECT_EQ(make_verify_case(3, 7).problem.seed, make_verify_case(3, 7).problem.seed);
  EXPECT_NE(describe(make_verify_case(3, 7)), describe(make_verify_case(3, 8)));
  EXPECT_NE(describe(make_verify_case(3, 7)), describe(make_verify_case(4, 7)));
}

TEST(Verify, CasesCoverWhatTheLibraryOffers) {
  std::set<DType> dtypes;
  bool causal = false, empty_batch = false, empty_request = false, many_kv = false, wide = false, odd = false,
       gap = false, invariant = false;
  for (int k = 0; k < 500; ++k) {
    const VerifyCase c = make_verify_case(0, k);
    const ProblemSpec& p = c.problem;
    EXPECT_EQ(p.h_q % p.h_kv, 0);
    dtypes.insert(p.dtype);
    causal |= p.causal && p.s_q > 1;
    empty_batch |= p.batch() == 0;
    for (const int length : p.cache_seqlens) empty_request |= length == 0;
    many_kv |= p.h_kv > 1;
    wide |= p.d_v > 512;
    odd |= p.d_qk() % 2 == 1;
    gap |= p.page_gap > 0;
    invariant |= c.fixed_split_blocks > 0;
  }
  EXPECT_EQ(dtypes.size(), 3u);
  EXPECT_TRUE(causal && empty_batch && empty_request && many_kv && wide && odd && gap && invariant);
}

VerifyOptions few_cases() {
  VerifyOptions options;
  options.cases = 15;
  options.quiet = true;
  return options;
}

TEST(Verify, TheLibraryPasses) { EXPECT_EQ(run_verify(few_cases(), library_decode), 0); }

TEST(Verify, FindsAPlantedErrorAndPrintsTheCommandThatRepeatsIt) {
  // One element of the last row is off by 1%, in problems that have one.
  const auto wrong = [](const VerifyCase& c, const Problem& problem) {
    library_decode(c, problem);
    const TensorView& lse = problem.args().lse;
    if (lse.numel() > 0) lse.ptr<float>()[lse.numel() - 1] += 0.1f;
  };
  ::testing::internal::CaptureStdout();
  const std::int64_t failures = run_verify(few_cases(), wrong);
  const std::string printed = ::testing::internal::GetCapturedStdout();
  EXPECT_GT(failures, 8);
  EXPECT_NE(printed.find("FAILED: flash-mla verify --seed 0 --case "), std::string::npos) << printed;
}

TEST(Verify, AnExceptionIsAFailureOfItsCase) {
  const auto throws = [](const VerifyCase&, const Problem&) { throw InvalidArgument("q is odd"); };
  VerifyOptions options = few_cases();
  options.only_case = 4;
  ::testing::internal::CaptureStdout();
  EXPECT_EQ(run_verify(options, throws), 1);
  EXPECT_NE(::testing::internal::GetCapturedStdout().find("q is odd"), std::string::npos);
}

TEST(Limits, ATimeIsTheLongerOfArithmeticAndMemory) {
  const Limits limits{2, 10.0, 100.0, 200.0};
  EXPECT_DOUBLE_EQ(limits.seconds(DType::kBFloat16, 2e11, 1.0), 1.0);
  EXPECT_DOUBLE_EQ(limits.seconds(DType::kFloat32, 2e11, 1.0), 2.0);
  EXPECT_DOUBLE_EQ(limits.seconds(DType::kFloat32, 1.0, 1e10), 1.0);
}

TEST(Limits, MeasuresSomethingPlausible) {
  const Limits limits = measure_limits(1, 0.01);
  EXPECT_GT(limits.fp32_gflops, 0.1);
  EXPECT_GT(limits.read_gbps, 0.1);
  EXPECT_LT(limits.read_gbps, 2000);
}

TEST(Blas, SaysWhyThereIsNone) {
  std::string why;
  EXPECT_FALSE(Blas::load("libno-such-blas.so", "", why).has_value());
  EXPECT_NE(why.find("libno-such-blas.so"), std::string::npos) << why;
}

std::string preset_error(const std::string& text) {
  const std::string path = ::testing::TempDir() + "preset_test.json";
  std::ofstream(path) << text;
  try {
    read_preset(path);
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "";
}

TEST(Preset, TheRepositorysAreValid) {
  const Preset house = read_preset(FLASH_MLA_PRESETS "/cpu-house.json");
  EXPECT_EQ(house.threads, (std::vector<int>{2, 1}));
  ASSERT_GE(house.shapes.size(), 3u);
  EXPECT_EQ(house.shapes[2].s_k, 32768);
  EXPECT_FALSE(read_preset(FLASH_MLA_PRESETS "/smoke.json").shapes.empty());
}

TEST(Preset, IsBuiltIntoTheProgramByName) {
  for (const char* name : {"cpu-house", "h200-dense", "smoke"}) {
    const Preset built_in = read_preset(name);
    const Preset file = read_preset(std::string(FLASH_MLA_PRESETS "/") + name + ".json");
    EXPECT_EQ(built_in.shapes.size(), file.shapes.size()) << name;
    EXPECT_EQ(built_in.device, file.device) << name;
  }
  try {
    read_preset("h200");
    FAIL() << "read a preset that does not exist";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(
                  "built-in presets are cpu-house, h200-dense, h200-shelf, h200-sparse, smoke"),
              std::string::npos)
        << e.what();
  }
}

TEST(Preset, TheGpusSaysWhatToCompareWith) {
  const Preset preset = read_preset("h200-dense");
  EXPECT_EQ(preset.device, "cuda");
  ASSERT_EQ(preset.shapes.size(), 68u);
  for (const Shape& s : preset.shapes) {
    ASSERT_TRUE(s.best_ms && s.floor_ms);
    EXPECT_GT(*s.best_ms, *s.floor_ms);
    ASSERT_FALSE(s.peers_ms.empty());
    double least = 1e9;
    for (const auto& [peer, ms] : s.peers_ms) least = std::min(least, ms);
    EXPECT_EQ(*s.best_ms, least);
  }
  EXPECT_EQ(preset.shapes[0].peers_ms.at("FlashMLA"), 0.07072);
  EXPECT_FALSE(read_preset("smoke").shapes[0].best_ms.has_value());
}

TEST(Preset, ErrorsNameTheShapeAndTheKey) {
  EXPECT_NE(preset_error("{").find("not JSON"), std::string::npos);
  EXPECT_NE(preset_error("{}").find("\"shapes\""), std::string::npos);
  EXPECT_NE(preset_error(R"({"shapes": [{}, {"b": 0}]})").find("shapes[1]: \"b\" is 0"), std::string::npos);
  EXPECT_NE(preset_error(R"({"shapes": [{"heads": 1}]})").find("unknown key \"heads\""), std::string::npos);
  EXPECT_NE(preset_error(R"({"shapes": [{"dtype": "int8"}]})").find("int8"), std::string::npos);
  EXPECT_NE(preset_error(R"({"shapes": [{"h_q": 3, "h_kv": 2}]})").find("h_q is 3"), std::string::npos);
  EXPECT_NE(preset_error(R"({"shapes": [{}], "threads": [0]})").find("threads"), std::string::npos);
  EXPECT_NE(
      preset_error(R"({"shapes": [{}], "device": "tpu"})").find("\"device\" is \"tpu\", expected \"cpu\" or"),
      std::string::npos);
  EXPECT_NE(preset_error(R"({"shapes": [{"best_ms": 0}]})").find("\"best_ms\" is 0, expected a positive"),
            std::string::npos);
  EXPECT_NE(preset_error(R"({"shapes": [{"floor_ms": "1"}]})").find("\"floor_ms\" is \"1\""),
            std::string::npos);
  EXPECT_NE(preset_error(R"({"shapes": [{"peers_ms": 1}]})").find("\"peers_ms\" is 1, expected an object"),
            std::string::npos);
  EXPECT_NE(preset_error(R"({"shapes": [{"peers_ms": {"a": -1}}]})").find("\"peers_ms.a\" is -1"),
            std::string::npos);
}

TEST(Table, AlignsItsColumns) {
  Table table({"a", "value"});
  table.add({"long", "1"});
  EXPECT_EQ(table.str(), "a     value\nlong      1\n");
}

}  // namespace
}  // namespace flash_mla::bench
