#include "flash_mla/dense_fp8.h"

#include <algorithm>
#include <cmath>

#include "api/call.h"
#include "api/sparse_checks.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/dense_fp8_decode/reference/dense_fp8_decode.h"
#include "kernels/attention/dense_fp8_decode/sm90/dense_fp8_decode.h"

namespace flash_mla {
namespace {

/// The call as dense_decode has it; k_cache is the pool's bytes where the format is FP8.
DenseDecodeArgs dense_args(const DenseFp8DecodeArgs& args) {
  DenseDecodeArgs dense;
  dense.q = args.q;
  dense.k_cache = args.cache.data;
  dense.block_table = args.block_table;
  dense.cache_seqlens = args.cache_seqlens;
  dense.out = args.out;
  dense.lse = args.lse;
  return dense;
}

void check_shapes(const DenseFp8DecodeArgs& args, const DecodeScheduleView& schedule,
                  const DenseFp8DecodeOptions& options) {
  api::check_dense_fp8_decode_shapes(args, options, /*allow_reference_types=*/false);
  api::check_schedule_shapes(schedule, args.q.size(0), args.q);
}

bool is_on_sm90(const DenseFp8DecodeArgs& args, const DenseFp8DecodeOptions& options) {
  return api::backend_of(options.backend, args.q, "q") == Backend::kSm90;
}
float softmax_scale_of(const DenseFp8DecodeArgs& args, const DenseFp8DecodeOptions& options) {
  return options.softmax_scale.value_or(1.0f / std::sqrt(static_cast<float>(args.q.size(3))));
}
bool causal_of(const DenseFp8DecodeArgs& args, const DenseFp8DecodeOptions& options) {
  return options.causal && args.q.size(1) > 1;
}

cpu::DenseDecodeParams cpu_params(const DenseFp8DecodeArgs& args, const DecodeScheduleView& schedule,
                                  const DenseFp8DecodeOptions& options, const kv::Pool& pool) {
  cpu::DenseDecodeParams params;
  params.softmax_scale = softmax_scale_of(args, options);
  params.causal = causal_of(args, options);
  const int threads = options.num_threads > 0 ? options.num_threads : cpu::default_num_threads();
  params.num_threads = static_cast<int>(std::min<std::int64_t>(threads, schedule.parts.size(0)));
  params.pool = args.cache.data.dtype != args.q.dtype ? &pool : nullptr;
  return params;
}

}  // namespace

std::size_t dense_fp8_decode_workspace_size(const DenseFp8DecodeArgs& args,
                                            const DecodeScheduleView& schedule,
                                            const DenseFp8DecodeOptions& options) {
  check_shapes(args, schedule, options);
  if (is_on_sm90(args, options)) {
    sm90::check_supported(args, schedule);
    return sm90::dense_fp8_decode_workspace_size(args, schedule);
  }
  if (schedule.fixed_split_blocks > 0) api::check_num_splits(schedule);
  const kv::Pool pool = kv::make_pool(args.cache);
  return cpu::dense_decode_workspace_size(dense_args(args), schedule,
                                          cpu_params(args, schedule, options, pool));
}

void dense_fp8_decode(const DenseFp8DecodeArgs& args, const DecodeScheduleView& schedule, void* workspace,
                      std::size_t workspace_bytes, const DenseFp8DecodeOptions& options) {
  check_shapes(args, schedule, options);
  if (is_on_sm90(args, options)) {
    sm90::check_supported(args, schedule);
    api::check_workspace_bytes(workspace, workspace_bytes,
                               sm90::dense_fp8_decode_workspace_size(args, schedule),
                               "dense_fp8_decode_workspace_size");
    if (args.q.size(0) == 0) return;
    sm90::dense_fp8_decode(args, schedule, workspace, softmax_scale_of(args, options),
                           causal_of(args, options), options.stream);
    return;
  }
  api::check_dense_fp8_decode_values(args);
  api::check_schedule_values(schedule, args.cache_seqlens);
  const kv::Pool pool = kv::make_pool(args.cache);
  const cpu::DenseDecodeParams params = cpu_params(args, schedule, options, pool);
  const DenseDecodeArgs dense = dense_args(args);
  api::check_workspace_bytes(workspace, workspace_bytes,
                             cpu::dense_decode_workspace_size(dense, schedule, params),
                             "dense_fp8_decode_workspace_size");
  if (args.q.size(0) == 0) return;
  cpu::dense_decode(dense, schedule, workspace, params);
}

namespace reference {

void dense_fp8_decode(const DenseFp8DecodeArgs& args, const DenseFp8DecodeOptions& options) {
  api::check_dense_fp8_decode_shapes(args, options, /*allow_reference_types=*/true);
  if (args.q.device.type != DeviceType::kCpu) {
    api::invalid("q is {}, expected a CPU tensor", args.q.describe());
  }
  api::check_dense_fp8_decode_values(args);
  const double scale = options.softmax_scale ? double{*options.softmax_scale}
                                             : 1.0 / std::sqrt(static_cast<double>(args.q.size(3)));
  dense_fp8_decode_unchecked(args, scale, options.causal && args.q.size(1) > 1);
}

}  // namespace reference
}  // namespace flash_mla
