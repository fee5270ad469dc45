// Tensors that claim to be on a GPU, on machines without that GPU and in builds without CUDA: refused with a
// reason, never followed.

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "flash_mla/c_api.h"
#include "flash_mla/decode.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"

namespace flash_mla {
namespace {

/// What f throws, if that is one of the two public errors.
template <class F>
std::string refusal(F&& f) {
  try {
    f();
  } catch (const InvalidArgument& e) {
    return std::string("InvalidArgument: ") + e.what();
  } catch (const Unsupported& e) {
    return std::string("Unsupported: ") + e.what();
  }
  return "nothing thrown";
}

/// Index 63: no machine has as many. Without any GPU the reason is that, otherwise the index.
void expect_refused(const std::string& message) {
  const std::vector<BackendInfo> all = backends();
  const bool gpu = std::any_of(all.begin(), all.end(), [](const BackendInfo& b) {
    return b.backend == Backend::kSm90 && !b.device.empty();
  });
  if (gpu) {
    EXPECT_NE(message.find("InvalidArgument: CUDA device index is 63"), std::string::npos) << message;
  } else {
    EXPECT_EQ(message.rfind("Unsupported: ", 0), 0u) << message;
    EXPECT_NE(message.find("pass CPU tensors"), std::string::npos) << message;
  }
}

TEST(Device, TensorsOnAMissingGpuAreRefused) {
  const Device missing{DeviceType::kCuda, 63};
  alignas(64) std::byte memory[64] = {};
  const auto tensor = [&](DType dtype, std::initializer_list<std::int64_t> shape) {
    return TensorView::contiguous(memory, dtype, shape, missing);
  };
  const DenseDecodeArgs args{tensor(DType::kBFloat16, {1, 1, 4, 576}),
                             tensor(DType::kBFloat16, {1, 64, 1, 576}), tensor(DType::kInt32, {1, 1}),
                             tensor(DType::kInt32, {1}), tensor(DType::kBFloat16, {1, 1, 4, 512})};
  DecodeScheduleView schedule;
  schedule.parts = tensor(DType::kInt32, {1, 8});
  schedule.num_splits = tensor(DType::kInt32, {2});
  expect_refused(refusal([&] { dense_decode_workspace_size(args, schedule); }));
  expect_refused(refusal([&] { dense_decode(args, schedule, memory, 64); }));
  expect_refused(refusal([&] { build_decode_schedule(args.cache_seqlens, ScheduleOptions{}, schedule); }));
  expect_refused(refusal([&] { cuda_schedule_options(63, 1, 16, 1); }));
}

TEST(Device, ScheduleOptionsAreChecked) {
  EXPECT_EQ(refusal([] { cuda_schedule_options(0, 0, 16, 1); }), "InvalidArgument: s_q is 0, expected >= 1");
  EXPECT_EQ(refusal([] { cuda_schedule_options(0, 1, 16, 1, -1); }),
            "InvalidArgument: batch is -1, expected >= 0");
  EXPECT_EQ(refusal([] { cuda_schedule_options(0, 1, 16, 3); }),
            "InvalidArgument: num_heads_q is 16, expected a positive multiple of num_heads_k");
}

TEST(Device, EveryBackendIsListedWithAReason) {
  const std::vector<BackendInfo> all = backends();
  for (const Backend backend : {Backend::kCpu, Backend::kSm90}) {
    const auto it = std::find_if(all.begin(), all.end(), [&](const auto& b) { return b.backend == backend; });
    ASSERT_NE(it, all.end()) << backend_name(backend);
    EXPECT_FALSE(it->detail.empty()) << backend_name(backend);
  }
}

TEST(Device, PartsOverTheCAbi) {
  std::int32_t parts = 0;
  ASSERT_EQ(flash_mla_num_parts({kDLCPU, 0}, 1, 16, 1, &parts), FLASH_MLA_OK);
  EXPECT_EQ(parts, cpu_schedule_options().num_parts);
  EXPECT_NE(flash_mla_num_parts({kDLCUDA, 63}, 1, 16, 1, &parts), FLASH_MLA_OK);
  EXPECT_EQ(flash_mla_num_parts({kDLCPU, 0}, 1, 16, 1, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_num_parts({kDLMetal, 0}, 1, 16, 1, &parts), FLASH_MLA_INVALID_ARGUMENT);
}

TEST(Device, ScheduleOfViewsIsTheScheduleOfSpans) {
  std::vector<std::int32_t> lengths{20, 140, 4096, 65}, rows(4 * 8), splits(5);
  ScheduleOptions options;
  options.num_parts = 4;
  const DecodeSchedule plan = DecodeSchedule::build(lengths, options);
  const auto view = [](std::vector<std::int32_t>& v, std::initializer_list<std::int64_t> shape) {
    return TensorView::contiguous(v.data(), DType::kInt32, shape);
  };
  DecodeScheduleView schedule;
  schedule.parts = view(rows, {4, 8});
  schedule.num_splits = view(splits, {5});
  build_decode_schedule(view(lengths, {4}), options, schedule);
  EXPECT_TRUE(std::equal(splits.begin(), splits.end(), plan.num_splits().begin()));
  EXPECT_EQ(rows[1], plan.parts()[0].end_req);
  EXPECT_EQ(rows[3 * 8 + 2], plan.parts()[3].begin_block);
  schedule.unit = PartUnit::kTokens;
  build_decode_schedule(view(lengths, {4}), options, schedule);
  EXPECT_EQ(rows, plan.to_token_rows(lengths));
  schedule.block_size = 32;
  EXPECT_NE(refusal([&] {
              build_decode_schedule(view(lengths, {4}), options, schedule);
            }).find("schedule.block_size is 32, expected options.block_size = 64"),
            std::string::npos);
  schedule.block_size = 64;
  schedule.parts.shape[0] = 3;
  EXPECT_NE(refusal([&] {
              build_decode_schedule(view(lengths, {4}), options, schedule);
            }).find("parts.shape[0] is 3, expected num_parts = 4"),
            std::string::npos);
}

}  // namespace
}  // namespace flash_mla
