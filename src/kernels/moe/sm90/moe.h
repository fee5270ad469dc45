#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#include "base/routing.h"
#include "flash_mla/export.h"

namespace flash_mla::sm90 {

/// The choice of experts: what kernels/moe/cpu/router.h does, one warp for each token. Two kernels: the
/// router's product (fp32 weights, every bit kept, fp32 accumulation) and the choice.
struct RouteArgs {
  const void* x = nullptr;            ///< (tokens, hidden) bfloat16, aligned to 16 bytes
  std::int64_t x_stride = 0;          ///< elements, divisible by 8 for the fast path
  const float* router = nullptr;      ///< (num_experts, hidden) float32, dense, aligned to 16 bytes
  const float* correction = nullptr;  ///< (num_experts): V3's bias, which chooses and never weighs; or null
  float* logits = nullptr;            ///< scratch (tokens, num_experts) float32; holds the logits afterwards
  /// out (tokens, experts_per_token + shared_experts), best first, of equals the lower id first; then the
  /// shared ones, num_experts, num_experts + 1, ...
  std::int32_t* ids = nullptr;
  float* weights = nullptr;  ///< out, of the same shape; 1 for the shared ones
  /// Not null: counts[e] grows by one for every token that chooses e, (num_experts), unless its entry of `slots` (tokens) is
  /// negative: such tokens only fill up a recorded step.
  unsigned long long* counts = nullptr;
  const std::int64_t* slots = nullptr;
  std::int64_t tokens = 0, hidden = 0;
  /// At most kMaxExperts experts, kMaxExpertsPerToken of a token, the shared ones counted in, 32 groups.
  Routing routing;
  bool batch_invariant = false;
  bool programmatic_launch = false;  ///< see SkinnyGemm; `router` and `correction` may be read early
};
inline constexpr int kMaxExperts = 512;
inline constexpr int kMaxExpertsPerToken = 32;

/// Queues router product and choice. Same guarantees as skinny_gemm().
cudaError_t route(const RouteArgs& args, cudaStream_t stream);

/// The choice alone, from `args.logits`; x and router are not read.
FLASH_MLA_API cudaError_t choose_experts(const RouteArgs& args, cudaStream_t stream);

/// inout[t] += sum over i of weights[t, i] * down_e(silu(gate_e(x[t])) * up_e(x[t])), e = ids[t, i], in the
/// order of i, added in fp32 and rounded once.
///
/// Few pairs for each expert: the kernel of skinny_gemm.h over the experts that were hit, whose weights are
/// read once. Many: tiles of 128 pairs on the tensor cores. The bits are the same from run to run.
struct ExpertFfn {
  const void* x = nullptr;    ///< (tokens, hidden) bfloat16, aligned to 16 bytes
  std::int64_t x_stride = 0;  ///< elements, divisible by 8 for the fast path
  const void* gate_up =
      nullptr;  ///< (num_experts, 2 * intermediate, hidden) bfloat16, gate rows first; 16 bytes
  const void* down = nullptr;  ///< (num_experts, hidden, intermediate) bfloat16; 16 bytes
  /// Not null, both: the weights are e4m3 with the scales of SkinnyGemm::weight_scales, expert after expert:
  /// (num_experts, ceil(2 * intermediate / 8), ceil(hidden / 128)) and (num_experts, ceil(hidden / 8),
  /// ceil(intermediate / 128)). Products of few rows are exact in them, tiles round value times scale to bfloat16.
  const float *gate_up_scales = nullptr, *down_scales = nullptr;
  /// The weights are int4 instead, expert after expert as gemm/sm90/int4_weights.h lays them out, and these their scales:
  /// (num_experts, ceil(hidden / 128), 2 * intermediate) and (num_experts, ceil(intermediate / 128), hidden), aligned to
  /// 16 bytes. Exact and rounded as e4m3 is. hidden and intermediate are divisible by 8.
  bool int4 = false;
  /// Of e4m3 and int4 weights: from so many pairs of an expert on, on average, x and the activations are quantised as well,
  /// with a scale for every row and 128 columns, and multiplied in FP8 (fp8_gemm.h) or W4A8 (narrow_gemm.h). Never where
  /// batch_invariant.
  double fp8_rows = std::numeric_limits<double>::infinity();
  bool whole_blocks = false;  ///< as Fp8Gemm's, of gate, of up and of down
  const std::int32_t* ids =
      nullptr;  ///< (tokens, experts_per_token), each in [0, num_experts), distinct for a token
  /// Not 0: these are some of so many experts, and an id of -1 is one that is not among them, whose result is left out.
  int of_experts = 0;
  const float* weights = nullptr;  ///< (tokens, experts_per_token)
  void* inout = nullptr;           ///< (tokens, hidden) bfloat16; may not be x
  std::int64_t inout_stride = 0;   ///< elements
  std::int64_t tokens = 0, hidden = 0, intermediate = 0;
  int num_experts = 0, experts_per_token = 0;  ///< at most kMaxExperts
  /// (hidden) or null. If given: norm_out = inout / sqrt(mean(inout²) + norm_eps) * norm, of the new inout.
  /// May be x.
  const float* norm = nullptr;
  float norm_eps = 0;
  void* norm_out = nullptr;      ///< (tokens, hidden) bfloat16
  std::int64_t norm_stride = 0;  ///< elements
  void* workspace = nullptr;     ///< expert_ffn_workspace_size() bytes, aligned to 256; nothing to be set up
  bool batch_invariant = false;  ///< a token's bits do not depend on the other tokens
  bool programmatic_launch = false;  ///< see SkinnyGemm: here only the launch is early
};

/// Bytes that expert_ffn() needs for up to `tokens` tokens: non-decreasing in tokens.
std::size_t expert_ffn_workspace_size(std::int64_t tokens, std::int64_t hidden, std::int64_t intermediate,
                                      int num_experts, int experts_per_token);

/// Queues the experts of all tokens. Same guarantees as skinny_gemm(); fast path for hidden and intermediate
/// divisible by 8, with e4m3 and int4 by 16.
cudaError_t expert_ffn(const ExpertFfn& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
