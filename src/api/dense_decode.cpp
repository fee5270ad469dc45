#include "kernels/attention/dense_decode/cpu/dense_decode.h"

#include <cmath>

#include "api/checks.h"
#include "flash_mla/decode.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"

namespace flash_mla {
namespace {

constexpr std::uintptr_t kWorkspaceAlignment = 64;

Backend resolve_backend(const DenseDecodeArgs& args, const DenseDecodeOptions& options) {
  const DeviceType device = args.q.device.type;
  if (options.backend == Backend::kAuto) {
    return device == DeviceType::kCpu ? Backend::kCpu : Backend::kSm90;
  }
  const DeviceType wanted = options.backend == Backend::kCpu ? DeviceType::kCpu : DeviceType::kCuda;
  if (device != wanted) {
    api::invalid("q is {}, expected a tensor the {} backend can use", args.q.describe(),
                 backend_name(options.backend));
  }
  return options.backend;
}

void check_shapes(const DenseDecodeArgs& args, const DecodeScheduleView& schedule,
                  const DenseDecodeOptions& options) {
  api::check_dense_decode_shapes(args, options, /*allow_reference_types=*/false);
  api::check_schedule_shapes(schedule, args.q.size(0), args.q);
}

float softmax_scale_of(const DenseDecodeArgs& args, const DenseDecodeOptions& options) {
  return options.softmax_scale.value_or(1.0f / std::sqrt(static_cast<float>(args.d_qk())));
}

bool causal_of(const DenseDecodeArgs& args, const DenseDecodeOptions& options) {
  return options.causal && args.q.size(1) > 1;
}

cpu::DenseDecodeParams cpu_params(const DenseDecodeArgs& args, const DecodeScheduleView& schedule,
                                  const DenseDecodeOptions& options) {
  cpu::DenseDecodeParams params;
  params.softmax_scale = softmax_scale_of(args, options);
  params.causal = causal_of(args, options);
  const int threads = options.num_threads > 0 ? options.num_threads : cpu::default_num_threads();
  params.num_threads = static_cast<int>(std::min<std::int64_t>(threads, schedule.parts.size(0)));
  return params;
}

void check_workspace(const void* workspace, std::size_t workspace_bytes, std::size_t needed) {
  if (workspace_bytes < needed) {
    api::invalid("workspace_bytes is {}, expected at least dense_decode_workspace_size() = {}",
                 workspace_bytes, needed);
  }
  if (needed > 0 && workspace == nullptr) api::invalid("workspace is null, expected {} bytes", needed);
  if (reinterpret_cast<std::uintptr_t>(workspace) % kWorkspaceAlignment != 0) {
    api::invalid("workspace is {}, expected a pointer aligned to {} bytes", fmt::ptr(workspace),
                 kWorkspaceAlignment);
  }
}

}  // namespace

const char* backend_name(Backend backend) {
  switch (backend) {
    case Backend::kAuto:
      return "auto";
    case Backend::kCpu:
      return "cpu";
    case Backend::kSm90:
      return "sm90";
  }
  return "unknown";
}

std::size_t dense_decode_workspace_size(const DenseDecodeArgs& args, const DecodeScheduleView& schedule,
                                        const DenseDecodeOptions& options) {
  check_shapes(args, schedule, options);
  if (resolve_backend(args, options) == Backend::kSm90) {
    sm90::check_supported(args, schedule);
    return sm90::dense_decode_workspace_size(args, schedule);
  }
  if (schedule.fixed_split_blocks > 0) api::check_num_splits(schedule);
  return cpu::dense_decode_workspace_size(args, schedule, cpu_params(args, schedule, options));
}

void dense_decode(const DenseDecodeArgs& args, const DecodeScheduleView& schedule, void* workspace,
                  std::size_t workspace_bytes, const DenseDecodeOptions& options) {
  check_shapes(args, schedule, options);
  if (resolve_backend(args, options) == Backend::kSm90) {
    sm90::check_supported(args, schedule);
    check_workspace(workspace, workspace_bytes, sm90::dense_decode_workspace_size(args, schedule));
    if (args.q.size(0) == 0) return;
    sm90::dense_decode(args, schedule, workspace, softmax_scale_of(args, options), causal_of(args, options),
                       options.stream);
    return;
  }
  api::check_dense_decode_values(args);
  api::check_schedule_values(schedule, args.cache_seqlens);
  const cpu::DenseDecodeParams params = cpu_params(args, schedule, options);
  check_workspace(workspace, workspace_bytes, cpu::dense_decode_workspace_size(args, schedule, params));
  if (args.q.size(0) == 0) return;
  cpu::dense_decode(args, schedule, workspace, params);
}

}  // namespace flash_mla
