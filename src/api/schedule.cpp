#include "flash_mla/schedule.h"

#include <algorithm>

#include "api/checks.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "schedule/options.h"

namespace flash_mla {
namespace {

void check(const TensorView& lengths, const ScheduleOptions& options, const DecodeScheduleView& s) {
  check_schedule_options(options);
  api::check_tensor(lengths, "cache_seqlens", 1, {DType::kInt32});
  api::check_tensor(s.parts, "parts", 2, {DType::kInt32});
  api::check_tensor(s.num_splits, "num_splits", 1, {DType::kInt32});
  api::check_last_dim_contiguous(lengths, "cache_seqlens");
  api::check_last_dim_contiguous(s.num_splits, "num_splits");
  api::check_last_dim_contiguous(s.parts, "parts");
  api::check_size(s.parts, "parts", 0, options.num_parts, "num_parts");
  api::check_size(s.parts, "parts", 1, 8, "the row width");
  api::check_size(s.num_splits, "num_splits", 0, lengths.size(0) + 1, "b + 1");
  if (s.parts.size(0) > 1 && s.parts.stride(0) != 8) {
    api::invalid("parts.stride[0] is {}, expected 8 (contiguous)", s.parts.stride(0));
  }
  api::check_same_device(s.parts, "parts", lengths, "cache_seqlens");
  api::check_same_device(s.num_splits, "num_splits", lengths, "cache_seqlens");
  if (s.block_size != options.block_size) {
    api::invalid("schedule.block_size is {}, expected options.block_size = {}", s.block_size,
                 options.block_size);
  }
  if (s.fixed_split_blocks != options.fixed_split_blocks) {
    api::invalid("schedule.fixed_split_blocks is {}, expected options.fixed_split_blocks = {}",
                 s.fixed_split_blocks, options.fixed_split_blocks);
  }
}

}  // namespace

void build_decode_schedule(const TensorView& cache_seqlens, const ScheduleOptions& options,
                           const DecodeScheduleView& schedule, void* stream) {
  check(cache_seqlens, options, schedule);
  if (cache_seqlens.device.type == DeviceType::kCuda) {
    sm90::build_schedule(cache_seqlens, options, schedule, stream);
    return;
  }
  const std::span lengths(cache_seqlens.ptr<const std::int32_t>(),
                          static_cast<std::size_t>(cache_seqlens.size(0)));
  const std::span splits(schedule.num_splits.ptr<std::int32_t>(), lengths.size() + 1);
  if (schedule.unit == PartUnit::kBlocks) {
    build_decode_schedule(
        lengths, options,
        {schedule.parts.ptr<DecodePart>(), static_cast<std::size_t>(schedule.parts.size(0))}, splits);
    return;
  }
  const DecodeSchedule plan = DecodeSchedule::build(lengths, options);
  const std::vector<std::int32_t> rows = plan.to_token_rows(lengths);
  std::copy(rows.begin(), rows.end(), schedule.parts.ptr<std::int32_t>());
  std::copy(plan.num_splits().begin(), plan.num_splits().end(), splits.begin());
}

ScheduleOptions cpu_schedule_options(int num_threads) {
  if (num_threads < 0) api::invalid("num_threads is {}, expected >= 0", num_threads);
  ScheduleOptions options;
  options.num_parts = num_threads > 0 ? num_threads : cpu::default_num_threads();
  options.fixed_overhead_blocks = 1;  // a request costs a CPU worker little beside its tokens
  return options;
}

ScheduleOptions cuda_schedule_options(int device_index, int s_q, int num_heads_q, int num_heads_k,
                                      int batch) {
  const auto require = [](bool ok, const char* name, int value, const char* expected) {
    if (!ok) api::invalid("{} is {}, expected {}", name, value, expected);
  };
  require(s_q >= 1, "s_q", s_q, ">= 1");
  require(num_heads_k >= 1, "num_heads_k", num_heads_k, ">= 1");
  require(num_heads_q >= 1 && num_heads_q % num_heads_k == 0, "num_heads_q", num_heads_q,
          "a positive multiple of num_heads_k");
  require(batch >= 0, "batch", batch, ">= 0");
  sm90::require_device(device_index);
  return sm90::schedule_options(device_index, s_q, num_heads_q, num_heads_k, batch);
}

}  // namespace flash_mla
