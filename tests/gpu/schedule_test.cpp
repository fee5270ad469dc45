// The schedule computed on the device: the same plan as the host's, bit for bit, and in time.

#include "flash_mla/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <random>

#include "device.h"
#include "flash_mla/error.h"

namespace flash_mla::gpu_test {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};

/// Lengths and a schedule's buffers on the device.
struct Buffers {
  DeviceMemory lengths, parts, num_splits;
  TensorView lengths_view;
  DecodeScheduleView view;

  Buffers(const std::vector<std::int32_t>& values, const ScheduleOptions& o,
          PartUnit unit = PartUnit::kBlocks)
      : lengths(values.size() * 4),
        parts(static_cast<std::size_t>(o.num_parts) * 32),
        num_splits((values.size() + 1) * 4) {
    lengths.upload(values.data(), values.size() * 4);
    parts.poison();
    num_splits.poison();
    const auto b = static_cast<std::int64_t>(values.size());
    lengths_view = TensorView::contiguous(lengths.as<void>(), DType::kInt32, {b}, kGpu);
    view.parts = TensorView::contiguous(parts.as<void>(), DType::kInt32, {o.num_parts, 8}, kGpu);
    view.num_splits = TensorView::contiguous(num_splits.as<void>(), DType::kInt32, {b + 1}, kGpu);
    view.block_size = o.block_size;
    view.fixed_split_blocks = o.fixed_split_blocks;
    view.unit = unit;
  }
};

void expect_the_hosts(const std::vector<std::int32_t>& lengths, const ScheduleOptions& o) {
  const DecodeSchedule host = DecodeSchedule::build(lengths, o);
  for (const PartUnit unit : {PartUnit::kBlocks, PartUnit::kTokens}) {
    Buffers d(lengths, o, unit);
    build_decode_schedule(d.lengths_view, o, d.view);
    ASSERT_EQ(d.num_splits.download<std::int32_t>(),
              std::vector<std::int32_t>(host.num_splits().begin(), host.num_splits().end()));
    std::vector<std::int32_t> rows;
    if (unit == PartUnit::kTokens) {
      rows = host.to_token_rows(lengths);
    } else {
      const auto* words = reinterpret_cast<const std::int32_t*>(host.parts().data());
      rows.assign(words, words + 8 * host.parts().size());
    }
    ASSERT_EQ(d.parts.download<std::int32_t>(), rows);
  }
}

TEST(DeviceSchedule, IsTheHosts) {
  std::mt19937 rng(1);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  for (int i = 0; i < 1500; ++i) {
    std::vector<std::int32_t> lengths(
        static_cast<std::size_t>(i < 20 ? i % 3 : draw(0, i % 10 == 0 ? 3000 : 150)));
    const int longest = 1 << draw(0, 17), same = draw(0, longest);
    const int kind = draw(0, 3);
    for (std::int32_t& n : lengths) {
      n = kind == 0                      ? same
          : kind == 1 && draw(0, 1) == 0 ? 0
          : kind == 2                    ? same + draw(0, 130)
                                         : draw(0, longest);
    }
    ScheduleOptions o;
    o.num_parts = draw(0, 3) == 0 ? draw(1, 1000) : draw(1, 132);
    o.fixed_overhead_blocks = draw(0, 2) == 0 ? draw(0, 8) : 5;
    o.min_blocks_per_request = draw(0, 1);
    o.fixed_split_blocks = draw(0, 1) == 0 ? 0 : draw(1, 40);
    o.min_blocks_per_part = draw(0, 2) > 0 ? 1 : draw(0, 9) > 0 ? draw(1, 50) : 1 << 16;
    o.whole_requests_percent = draw(0, 1) == 0 ? 0 : draw(0, 9) > 0 ? draw(1, 300) : 0x7FFFFFFF;
    o.block_size = draw(0, 4) == 0 ? draw(1, 100) : 64;
    expect_the_hosts(lengths, o);
    ASSERT_FALSE(::testing::Test::HasFatalFailure())
        << "b " << lengths.size() << " parts " << o.num_parts << " overhead " << o.fixed_overhead_blocks
        << " least " << o.min_blocks_per_request << " of a part " << o.min_blocks_per_part << " whole "
        << o.whole_requests_percent << " split " << o.fixed_split_blocks << " block " << o.block_size;
  }
}

TEST(DeviceSchedule, NumbersNearTheLimit) {
  ScheduleOptions o;
  o.num_parts = 400;
  o.fixed_overhead_blocks = 10'000'000;
  expect_the_hosts(std::vector<std::int32_t>(200, 64), o);
  o.num_parts = 600;
  o.fixed_overhead_blocks = 7'150'000;
  expect_the_hosts(std::vector<std::int32_t>(300, 64), o);
  o = {};
  o.num_parts = 2;
  o.block_size = 1;
  o.fixed_split_blocks = 1'100'000'000;
  expect_the_hosts({1'500'000'000}, o);
  o.fixed_split_blocks = 0x7FFFFFFF;
  o.block_size = 64;
  expect_the_hosts({1'500'000'000, 64}, o);
  expect_the_hosts({0x7FFFFFFF}, o);
  o.fixed_split_blocks = 0;
  expect_the_hosts({0x7FFFFFFF}, o);
}

TEST(DeviceSchedule, LargestBatch) {
  ScheduleOptions o;
  o.num_parts = 132;
  std::vector<std::int32_t> lengths(static_cast<std::size_t>(11430 - 3 * 132), 1000);
  expect_the_hosts(lengths, o);
  lengths.push_back(1);
  Buffers d(lengths, o);
  EXPECT_THROW(build_decode_schedule(d.lengths_view, o, d.view), Unsupported);
}

/// Microseconds per call, of 20 calls in a captured graph.
double microseconds(const Buffers& d, const ScheduleOptions& o) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  for (int i = 0; i < 20; ++i) build_decode_schedule(d.lengths_view, o, d.view, stream);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  // Long enough for the clocks to rise.
  for (int i = 0; i < 200; ++i) check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
  std::vector<float> times;
  for (int i = 0; i < 30; ++i) {
    check(cudaEventRecord(begin, stream), "cudaEventRecord");
    check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
    check(cudaEventRecord(end, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  return times[times.size() / 2] / 20 * 1000;
}

TEST(DeviceSchedule, TakesAtMostTenMicrosecondsFor128Requests) {
  std::mt19937 rng(2);
  // As the options are by default, as cuda_schedule_options chooses them for large batches (but for
  // num_parts), and with fixed split points.
  ScheduleOptions chosen, fixed;
  chosen.fixed_overhead_blocks = 4;
  chosen.whole_requests_percent = 5;
  fixed.fixed_split_blocks = 16;
  for (const auto& [name, options] : {std::pair{"default options", ScheduleOptions{}},
                                      {"chosen options", chosen},
                                      {"fixed splits", fixed}}) {
    for (const auto& [b, mean] : {std::pair{1, 4096},
                                  {32, 4096},
                                  {128, 1024},
                                  {128, 4096},
                                  {128, 32768},
                                  {256, 4096},
                                  {1024, 4096},
                                  {8192, 4096}}) {
      for (const int parts : {66, 132}) {
        std::vector<std::int32_t> lengths(static_cast<std::size_t>(b));
        std::normal_distribution<double> normal(mean, mean / 2.0);
        for (std::int32_t& n : lengths) n = std::max(static_cast<int>(normal(rng)), 1);
        ScheduleOptions o = options;
        o.num_parts = parts;
        const Buffers d(lengths, o);
        const double us = microseconds(d, o);
        std::printf("schedule: b %d, mean length %d, %d parts, %s: %.2f us\n", b, mean, parts, name, us);
        if (b <= 128) {
          EXPECT_LE(us, 10.0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace flash_mla::gpu_test
