#include "flash_mla/dense_prefill.h"

#include <cmath>

#include "api/call.h"
#include "kernels/attention/dense_prefill/sm90/dense_prefill.h"

namespace flash_mla {

std::size_t dense_prefill_workspace_size() { return sm90::dense_prefill_workspace_size(); }

void dense_prefill(const DensePrefillArgs& args, void* workspace, std::size_t workspace_bytes,
                   const DensePrefillOptions& options) {
  using api::check_tensor;
  check_tensor(args.q, "q", 3, {DType::kFloat16, DType::kBFloat16});
  check_tensor(args.k_nope, "k_nope", 3, {args.q.dtype});
  check_tensor(args.k_rope, "k_rope", 2, {args.q.dtype});
  check_tensor(args.v, "v", 3, {args.q.dtype});
  check_tensor(args.cu_seqlens_q, "cu_seqlens_q", 1, {DType::kInt32});
  check_tensor(args.cu_seqlens_k, "cu_seqlens_k", 1, {DType::kInt32});
  check_tensor(args.out, "out", 3, {args.q.dtype});
  if (args.lse.defined()) check_tensor(args.lse, "lse", 2, {DType::kFloat32});
  sm90::check_supported(args);
  api::check_no_overlap(args.out, "out");
  if (args.lse.defined()) api::check_no_overlap(args.lse, "lse");
  api::check_workspace_bytes(workspace, workspace_bytes, dense_prefill_workspace_size(),
                             "dense_prefill_workspace_size");
  const float scale = options.softmax_scale.value_or(1.0f / std::sqrt(192.0f));
  sm90::dense_prefill(args, scale, options.causal, workspace, options.stream);
}

}  // namespace flash_mla
