#include "flash_mla/sparse.h"

#include <cmath>

#include "api/call.h"
#include "api/sparse_checks.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/sparse_decode/cpu/sparse_decode.h"
#include "kernels/attention/sparse_decode/reference/sparse_decode.h"
#include "kernels/attention/sparse_decode/sm90/sparse_decode.h"
#include "kernels/attention/sparse_prefill/cpu/sparse_prefill.h"
#include "kernels/attention/sparse_prefill/reference/sparse_prefill.h"
#include "kernels/attention/sparse_prefill/sm90/sparse_prefill.h"

namespace flash_mla {
namespace {

float scale_of(const std::optional<float>& scale, const TensorView& q) {
  return scale.value_or(1.0f / std::sqrt(static_cast<float>(q.size(q.rank - 1))));
}

double reference_scale_of(const std::optional<float>& scale, const TensorView& q) {
  return scale ? double{*scale} : 1.0 / std::sqrt(static_cast<double>(q.size(q.rank - 1)));
}

cpu::SparseParams cpu_params(float softmax_scale, int num_threads, int fixed_split_blocks) {
  cpu::SparseParams params;
  params.softmax_scale = softmax_scale;
  params.num_threads = num_threads > 0 ? num_threads : cpu::default_num_threads();
  params.fixed_split_blocks = fixed_split_blocks;
  return params;
}

void check_on_cpu(const TensorView& q) {
  if (q.device.type != DeviceType::kCpu) api::invalid("q is {}, expected a CPU tensor", q.describe());
}

}  // namespace

std::size_t sparse_decode_workspace_size(const SparseDecodeArgs& args, const SparseDecodeOptions& options) {
  api::check_sparse_decode_shapes(args, options, /*allow_reference_types=*/false);
  if (api::backend_of(options.backend, args.q, "q") == Backend::kSm90) {
    sm90::check_supported(args, options.fixed_split_blocks);
    return sm90::sparse_decode_workspace_size(args, options.fixed_split_blocks);
  }
  return cpu::sparse_decode_workspace_size(args, cpu_params(scale_of(options.softmax_scale, args.q),
                                                            options.num_threads, options.fixed_split_blocks));
}

void sparse_decode(const SparseDecodeArgs& args, void* workspace, std::size_t workspace_bytes,
                   const SparseDecodeOptions& options) {
  api::check_sparse_decode_shapes(args, options, /*allow_reference_types=*/false);
  if (api::backend_of(options.backend, args.q, "q") == Backend::kSm90) {
    sm90::check_supported(args, options.fixed_split_blocks);
    api::check_workspace_bytes(workspace, workspace_bytes,
                               sm90::sparse_decode_workspace_size(args, options.fixed_split_blocks),
                               "sparse_decode_workspace_size");
    if (args.q.size(0) == 0 || args.q.size(1) == 0) return;
    sm90::sparse_decode(args, workspace, scale_of(options.softmax_scale, args.q), options.fixed_split_blocks,
                        options.stream);
    return;
  }
  api::check_sparse_decode_values(args);
  const cpu::SparseParams params =
      cpu_params(scale_of(options.softmax_scale, args.q), options.num_threads, options.fixed_split_blocks);
  api::check_workspace_bytes(workspace, workspace_bytes, cpu::sparse_decode_workspace_size(args, params),
                             "sparse_decode_workspace_size");
  if (args.q.size(0) == 0) return;
  cpu::sparse_decode(args, workspace, params);
}

std::size_t sparse_prefill_workspace_size(const SparsePrefillArgs& args,
                                          const SparsePrefillOptions& options) {
  api::check_sparse_prefill_shapes(args, options, /*allow_reference_types=*/false);
  if (api::backend_of(options.backend, args.q, "q") == Backend::kSm90) {
    sm90::check_supported(args);
    return 0;
  }
  return cpu::sparse_prefill_workspace_size(
      args, cpu_params(scale_of(options.softmax_scale, args.q), options.num_threads, 0));
}

void sparse_prefill(const SparsePrefillArgs& args, void* workspace, std::size_t workspace_bytes,
                    const SparsePrefillOptions& options) {
  api::check_sparse_prefill_shapes(args, options, /*allow_reference_types=*/false);
  if (api::backend_of(options.backend, args.q, "q") == Backend::kSm90) {
    sm90::check_supported(args);
    if (args.q.size(0) == 0) return;
    sm90::sparse_prefill(args, scale_of(options.softmax_scale, args.q), options.stream);
    return;
  }
  api::check_sparse_prefill_values(args);
  const cpu::SparseParams params =
      cpu_params(scale_of(options.softmax_scale, args.q), options.num_threads, 0);
  api::check_workspace_bytes(workspace, workspace_bytes, cpu::sparse_prefill_workspace_size(args, params),
                             "sparse_prefill_workspace_size");
  if (args.q.size(0) == 0) return;
  cpu::sparse_prefill(args, workspace, params);
}

namespace reference {

void sparse_decode(const SparseDecodeArgs& args, const SparseDecodeOptions& options) {
  api::check_sparse_decode_shapes(args, options, /*allow_reference_types=*/true);
  check_on_cpu(args.q);
  api::check_sparse_decode_values(args);
  sparse_decode_unchecked(args, reference_scale_of(options.softmax_scale, args.q));
}

void sparse_prefill(const SparsePrefillArgs& args, const SparsePrefillOptions& options) {
  api::check_sparse_prefill_shapes(args, options, /*allow_reference_types=*/true);
  check_on_cpu(args.q);
  api::check_sparse_prefill_values(args);
  sparse_prefill_unchecked(args, reference_scale_of(options.softmax_scale, args.q));
}

}  // namespace reference
}  // namespace flash_mla
