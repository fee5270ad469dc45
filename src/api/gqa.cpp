#include "flash_mla/gqa.h"

#include <algorithm>
#include <cmath>

#include "api/call.h"
#include "api/gqa_checks.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/gqa/cpu/gqa.h"
#include "kernels/attention/gqa/reference/gqa.h"
#include "kernels/attention/gqa/sm90/gqa.h"

namespace flash_mla {
namespace {

float scale_of(const GqaArgs& args, const GqaOptions& options) {
  return options.softmax_scale.value_or(1.0f / std::sqrt(static_cast<float>(args.q.size(2))));
}

Backend check_shapes(const GqaArgs& args, const DecodeScheduleView& schedule, const GqaOptions& options) {
  api::check_gqa_shapes(args, options, /*allow_reference_types=*/false);
  if (schedule.parts.defined()) {
    if (!args.seqlens_k.defined()) api::invalid("seqlens_k is not given, expected it with a schedule");
    api::check_schedule_shapes(schedule, api::gqa_batch(args), args.q);
  }
  return api::backend_of(options.backend, args.q, "q");
}

cpu::GqaCall cpu_call(const GqaArgs& args, const DecodeScheduleView& schedule, const GqaOptions& options) {
  cpu::GqaCall call;
  call.problem = gqa::problem_of(args, options, scale_of(args, options));
  call.dtype = args.q.dtype;
  call.schedule = schedule;
  call.num_threads = options.num_threads > 0 ? options.num_threads : cpu::default_num_threads();
  return call;
}

/// What the size of the workspace is read from.
void check_cpu_values(const GqaArgs& args, const DecodeScheduleView& schedule) {
  api::check_gqa_values(args);
  if (schedule.parts.defined()) api::check_schedule_values(schedule, args.seqlens_k);
}

}  // namespace

std::size_t gqa_workspace_size(const GqaArgs& args, const DecodeScheduleView& schedule,
                               const GqaOptions& options) {
  if (check_shapes(args, schedule, options) == Backend::kSm90) {
    sm90::check_supported(args, schedule);
    return sm90::gqa_workspace_size(args, schedule, options);
  }
  check_cpu_values(args, schedule);
  return cpu::gqa_workspace_size(cpu_call(args, schedule, options));
}

void gqa_attention(const GqaArgs& args, const DecodeScheduleView& schedule, void* workspace,
                   std::size_t workspace_bytes, const GqaOptions& options) {
  constexpr const char* kSizeFunction = "gqa_workspace_size";
  if (check_shapes(args, schedule, options) == Backend::kSm90) {
    sm90::check_supported(args, schedule);
    api::check_workspace_bytes(workspace, workspace_bytes, sm90::gqa_workspace_size(args, schedule, options),
                               kSizeFunction);
    if (args.q.size(0) == 0) return;
    return sm90::gqa_attention(args, schedule, workspace, options, scale_of(args, options));
  }
  check_cpu_values(args, schedule);
  const cpu::GqaCall call = cpu_call(args, schedule, options);
  api::check_workspace_bytes(workspace, workspace_bytes, cpu::gqa_workspace_size(call), kSizeFunction);
  if (args.q.size(0) == 0) return;
  cpu::gqa_attention(call, workspace);
}

ScheduleOptions gqa_schedule_options(int device_index, int max_seqlen_q, int num_heads_q, int num_heads_k,
                                     int head_dim) {
  for (const auto& [value, name] :
       {std::pair{max_seqlen_q, "max_seqlen_q"}, std::pair{num_heads_q, "num_heads_q"},
        std::pair{num_heads_k, "num_heads_k"}, std::pair{head_dim, "head_dim"}}) {
    if (value < 1) api::invalid("{} is {}, expected >= 1", name, value);
  }
  if (num_heads_q % num_heads_k != 0) {
    api::invalid("num_heads_q is {}, expected a multiple of num_heads_k = {}", num_heads_q, num_heads_k);
  }
  return sm90::gqa_schedule_options(device_index, max_seqlen_q, num_heads_q, num_heads_k, head_dim);
}

namespace reference {

void gqa_attention(const GqaArgs& args, const GqaOptions& options) {
  api::check_gqa_shapes(args, options, /*allow_reference_types=*/true);
  if (args.q.device.type != DeviceType::kCpu)
    api::invalid("q is {}, expected a CPU tensor", args.q.describe());
  api::check_gqa_values(args);
  const double scale = options.softmax_scale ? double{*options.softmax_scale}
                                             : 1.0 / std::sqrt(static_cast<double>(args.q.size(2)));
  gqa_attention(args, gqa::problem_of(args, options, static_cast<float>(scale)), scale);
}

}  // namespace reference

}  // namespace flash_mla
