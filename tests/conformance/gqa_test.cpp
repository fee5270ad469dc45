// gqa_attention (include/flash_mla/gqa.h) on every backend, against its definition in float64.

#include <gtest/gtest.h>

#include "flash_mla/error.h"
#include "gqa_problem.h"

namespace flash_mla::conformance {
namespace {

using Layout = KeyLayout;

class Gqa : public testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {
 protected:
  bool on_gpu() const { return GetParam()->device().type == DeviceType::kCuda; }
  void expect_right(const GqaShape& shape) {
    if (on_gpu() && shape.dtype == DType::kFloat32) return;
    GqaProblem problem(shape);
    EXPECT_EQ(problem.difference(problem.run(*GetParam())), "") << shape.text();
  }
};

const std::vector<GqaLengths> kDecodes{{1, 1}, {1, 63}, {1, 300}, {1, 0}, {1, 64}, {1, 129}, {1, 1000}};
const std::vector<GqaLengths> kMixed{{1, 200}, {70, 70}, {5, 133}, {0, 50},
                                     {30, 20}, {3, 0},   {1, 17},  {40, 300}};

TEST_P(Gqa, NumericsOfDecodeOverGroups) {
  unsigned seed = 1;
  for (const int group : {1, 2, 4, 5, 8, 16, 24}) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
      expect_right(
          {.seqs = kDecodes, .h_q = 2 * group, .h_kv = 2, .dtype = dtype, .uniform = true, .seed = seed++});
    }
  }
}

TEST_P(Gqa, NumericsOfHeadDimensions) {
  unsigned seed = 30;
  for (const auto& [d_qk, d_v] : {std::pair{64, 64}, std::pair{96, 96}, std::pair{128, 128},
                                  std::pair{192, 128}, std::pair{192, 192}, std::pair{256, 256}}) {
    for (const int parts : {0, 3}) {
      expect_right({.seqs = kMixed,
                    .d_qk = d_qk,
                    .d_v = d_v,
                    .num_parts = parts,
                    .options = {.causal = true},
                    .seed = seed++});
    }
  }
}

TEST_P(Gqa, LayoutsAndPageSizes) {
  unsigned seed = 60;
  for (const Layout layout : {Layout::kRagged, Layout::kStretch, Layout::kTable, Layout::kCsr}) {
    for (const bool hnd : {false, true}) {
      for (const int page : {1, 5, 16, 64, 100, 256}) {
        if (layout == Layout::kRagged && hnd) continue;
        if ((layout == Layout::kRagged || layout == Layout::kStretch) && page != 16) continue;
        expect_right({.seqs = kMixed,
                      .layout = layout,
                      .page_size = page,
                      .hnd = hnd,
                      .options = {.causal = true},
                      .seed = seed++});
        expect_right({.seqs = kDecodes,
                      .layout = layout,
                      .page_size = page,
                      .hnd = hnd,
                      .uniform = true,
                      .num_parts = 5,
                      .seed = seed++});
      }
    }
  }
}

TEST_P(Gqa, WindowsAreCausalNumerics) {
  unsigned seed = 100;
  for (const int left : {-1, 0, 1, 17, 64, 128}) {
    for (const int right : {-1, 0, 9}) {
      for (const int parts : {0, 4}) {
        expect_right({.seqs = kMixed,
                      .num_parts = parts,
                      .options = {.window_left = left, .window_right = right},
                      .seed = seed++});
      }
    }
    expect_right({.seqs = kDecodes, .options = {.causal = true, .window_left = left}, .seed = seed++});
  }
}

TEST_P(Gqa, CapSinksAlibiAndMask) {
  unsigned seed = 200;
  for (const int parts : {0, 4}) {
    for (const auto& seqs : {kMixed, kDecodes}) {
      expect_right({.seqs = seqs, .num_parts = parts, .options = {.soft_cap = 5.0f}, .seed = seed++});
      expect_right(
          {.seqs = seqs, .sinks = true, .num_parts = parts, .options = {.causal = true}, .seed = seed++});
      expect_right(
          {.seqs = seqs, .alibi = true, .num_parts = parts, .options = {.causal = true}, .seed = seed++});
      expect_right({.seqs = seqs, .mask = true, .num_parts = parts, .seed = seed++});
      expect_right({.seqs = seqs,
                    .layout = Layout::kRagged,
                    .sinks = true,
                    .alibi = true,
                    .mask = true,
                    .num_parts = parts,
                    .options = {.softmax_scale = 0.2f, .causal = true, .window_left = 40, .soft_cap = 20.0f},
                    .seed = seed++});
    }
  }
}

TEST_P(Gqa, LongPromptsOverManyBlocksOfRows) {
  unsigned seed = 300;
  for (const int group : {1, 4, 7}) {
    for (const bool causal : {true, false}) {
      expect_right({.seqs = {{200, 260}, {130, 130}, {1, 400}, {33, 300}},
                    .h_q = group,
                    .h_kv = 1,
                    .d_qk = 64,
                    .d_v = 64,
                    .layout = Layout::kRagged,
                    .options = {.causal = causal},
                    .seed = seed++});
    }
  }
}

TEST_P(Gqa, OnePlanAndOneCallForDecodesAndPrompts) {
  unsigned seed = 800;
  // Decoding sequences, a verified draft, an empty one; then prompts, and chunks of prompts behind what is cached.
  const std::vector<GqaLengths> mixed{{1, 700}, {1, 30},   {3, 400}, {1, 0},
                                      {70, 70}, {40, 300}, {0, 9},   {130, 130}};
  const std::vector<GqaLengths> decodes{{1, 900}, {1, 5}, {1, 64}, {1, 300}};
  for (const Layout layout : {Layout::kRagged, Layout::kStretch, Layout::kTable, Layout::kCsr}) {
    for (const int scheduled : {0, 1, 4, 8}) {
      for (const int fixed : {0, 2}) {
        if (fixed > 0 && layout != Layout::kTable) continue;
        expect_right({.seqs = mixed,
                      .layout = layout,
                      .sinks = true,
                      .mask = layout == Layout::kCsr,
                      .num_parts = 5,
                      .fixed_split_blocks = fixed,
                      .num_scheduled = scheduled,
                      .options = {.causal = true},
                      .seed = seed++});
      }
    }
    expect_right({.seqs = decodes,
                  .layout = layout,
                  .uniform = true,
                  .num_parts = 5,
                  .num_scheduled = 2,
                  .options = {.window_left = 40},
                  .seed = seed++});
  }
}

// A prompt among the unscheduled sequences costs no room for its partial results.
TEST_P(Gqa, RoomIsForTheScheduledSequencesAlone) {
  if (on_gpu()) return;
  const auto bytes = [](int queries, int scheduled) {
    GqaProblem p({.seqs = {{1, 500}, {queries, queries}}, .num_parts = 5, .num_scheduled = scheduled});
    GqaArgs a = p.host_args();
    std::vector<std::uint8_t> out(p.q.size());
    a.out = TensorView::contiguous(out.data(), DType::kBFloat16, {p.total_q, 8, 128});
    GqaOptions options;
    options.num_threads = 1;
    options.num_scheduled = scheduled;
    return gqa_workspace_size(a, p.schedule.view(), options);
  };
  EXPECT_EQ(bytes(300, 1), bytes(30, 1));
  EXPECT_GT(bytes(300, 2), bytes(30, 2));
}

TEST_P(Gqa, FixedSplitsAreBatchInvariant) {
  GqaShape shape{.seqs = kDecodes, .uniform = true, .num_parts = 6, .fixed_split_blocks = 2, .seed = 400};
  expect_right(shape);
  GqaProblem all(shape);
  const GqaResult together = all.run(*GetParam());
  shape.num_parts = 3;
  GqaProblem others(shape);
  EXPECT_EQ(others.run(*GetParam()).bits, together.bits);
}

TEST_P(Gqa, SameBitsEveryTime) {
  for (const int parts : {0, 5}) {
    GqaProblem problem({.seqs = kMixed, .num_parts = parts, .options = {.causal = true}, .seed = 500});
    const GqaResult first = problem.run(*GetParam(), 1);
    for (const int threads : {1, 2, 3})
      EXPECT_EQ(problem.run(*GetParam(), threads).bits, first.bits) << threads;
  }
}

TEST_P(Gqa, NothingToDoAndNoLse) {
  expect_right({.seqs = {}, .seed = 600});
  expect_right({.seqs = {{0, 0}, {0, 9}}, .seed = 601});
  expect_right({.seqs = kMixed, .with_lse = false, .num_parts = 2, .seed = 602});
}

TEST_P(Gqa, AScoreOfMinusInfinityEverywhereIsNan) {
  GqaProblem problem({.seqs = {{1, 5}}, .h_q = 1, .h_kv = 1, .layout = Layout::kRagged, .seed = 700});
  // The query's first element is 1, that of all keys -inf.
  const std::uint16_t one = 0x3F80, minus_infinity = 0xFF80;
  std::memcpy(problem.q.data(), &one, 2);
  for (std::size_t at = 0; at + 2 <= problem.k.size(); at += std::size_t{2} * (128 + 8)) {
    if (problem.k[at + 2] != 0xFF) std::memcpy(&problem.k[at], &minus_infinity, 2);
  }
  const GqaResult r = problem.run(*GetParam());
  EXPECT_TRUE(std::isnan(r.out[0]));
  EXPECT_TRUE(std::isnan(r.lse[0]));
}

TEST_P(Gqa, BadInputIsNamed) {
  GqaProblem problem({.seqs = {{1, 20}, {1, 9}}, .uniform = true});
  const auto message = [&](const auto& change) -> std::string {
    GqaArgs a = problem.host_args();
    std::vector<std::uint8_t> out(std::size_t{2} * 8 * 128 * 2);
    a.out = TensorView::contiguous(out.data(), DType::kBFloat16, {2, 8, 128});
    GqaOptions options;
    DecodeScheduleView schedule;
    change(a, options, schedule);
    options.backend = Backend::kCpu;
    try {
      std::vector<std::uint8_t> workspace(gqa_workspace_size(a, schedule, options) + 64);
      auto at = reinterpret_cast<std::uintptr_t>(workspace.data());
      gqa_attention(a, schedule, workspace.data() + (64 - at % 64) % 64, workspace.size() - 64, options);
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "accepted";
  };
  using A = GqaArgs&;
  using O = GqaOptions&;
  using S = DecodeScheduleView&;
  EXPECT_EQ(message([](A, O, S) {}), "accepted");
  EXPECT_NE(message([](A a, O, S) { a.q.rank = 2; }).find("q is "), std::string::npos);
  EXPECT_NE(message([](A a, O, S) { a.k.shape[2] = 3; }).find("v.shape[2] is 2"), std::string::npos);
  EXPECT_NE(message([](A a, O, S) { a.seqlens_k = {}; }).find("seqlens_k is not given"), std::string::npos);
  EXPECT_NE(message([](A a, O, S) {
              a.page_indices = a.seqlens_k;
            }).find("page_indices and block_table are both given"),
            std::string::npos);
  EXPECT_NE(message([](A a, O, S) { a.mask = a.q; }).find("mask_indptr is not given"), std::string::npos);
  EXPECT_NE(message([](A, O o, S) { o.window_left = -2; }).find("window_left is -2"), std::string::npos);
  EXPECT_NE(message([](A, O o, S) { o.soft_cap = -1; }).find("soft_cap is -1"), std::string::npos);
  EXPECT_NE(message([](A, O o, S) { o.softmax_scale = 0; }).find("softmax_scale is 0"), std::string::npos);
  EXPECT_NE(message([](A, O o, S) { o.num_scheduled = -2; }).find("num_scheduled is -2"), std::string::npos);
  EXPECT_NE(message([](A, O o, S) { o.max_scheduled_q = -1; }).find("max_scheduled_q is -1"),
            std::string::npos);
  const DecodeSchedule of_two = DecodeSchedule::build(problem.lengths, {}),
                       of_other = DecodeSchedule::build(std::vector<std::int32_t>{300}, {});
  EXPECT_NE(message([&](A, O o, S s) {
              s = of_two.view();
              o.num_scheduled = 3;
            }).find("num_scheduled is 3, expected up to b = 2"),
            std::string::npos);
  EXPECT_NE(message([&](A, O o, S s) {
              s = of_two.view();
              o.num_scheduled = 1;
            }).find("schedule.num_splits.shape[0] is 3"),
            std::string::npos);
  EXPECT_NE(message([&](A, O o, S s) {
              s = of_other.view();
              o.num_scheduled = 1;
            }).find("is the schedule from other lengths?"),
            std::string::npos);
  EXPECT_NE(message([&](A, O, S s) {
              s = DecodeSchedule::build(std::vector<std::int32_t>{20}, {}).view();
            }).find("schedule.num_splits.shape[0] is 2"),
            std::string::npos);
  const std::int32_t page = std::exchange(problem.table[1], -7);
  EXPECT_NE(message([](A, O, S) {}).find("block_table of sequence 0, page 1, is -7"), std::string::npos);
  problem.table[1] = page;
  problem.lengths[1] = 1000;
  EXPECT_NE(message([](A, O, S) {}).find("seqlens_k[1] is 1000"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Backends, Gqa, testing::ValuesIn(backends_under_test()),
                         [](const auto& backend) { return backend.param->name(); });

}  // namespace
}  // namespace flash_mla::conformance
