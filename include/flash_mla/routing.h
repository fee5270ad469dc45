#pragma once

#include <cstdint>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// What a router's logit becomes before experts are compared.
enum class ExpertScores : std::uint8_t {
  kSoftmax,  ///< over all experts (DeepSeek-V2)
  kSigmoid,  ///< of each by itself (DeepSeek-V3)
};

struct RoutingArgs {
  TensorView logits;  ///< (n, num_experts) float32 | float16 | bfloat16, the router's outputs, finite
  /// Optional, (num_experts) float32 or logits' dtype: added to the scores that choose, and not to the weights.
  TensorView bias{};
  TensorView
      ids;  ///< (n, k) int32, last dimension contiguous; written: best first, of equals the lower id first
  TensorView weights;  ///< (n, k) float32 or logits' dtype, last dimension contiguous; written
};

struct RoutingOptions {
  ExpertScores scores = ExpertScores::kSoftmax;
  /// Experts lie in so many groups of equal size; only those of the best groups_kept groups are in the running. 1: all are.
  int num_groups = 1, groups_kept = 1;
  /// What a group is worth: the sum of its two best scores (DeepSeek-V3), or its best (DeepSeek-V2).
  bool groups_by_best_two = false;
  bool normalise = false;  ///< weights are divided by their sum + 1e-20, before `scale`
  float scale = 1.0f;      ///< every weight is multiplied by it: routed_scaling_factor
  int num_threads = 0;     ///< CPU: threads to run on; 0 means as many as OpenMP would use
  void* stream = nullptr;  ///< CUDA: the cudaStream_t to launch on
  Backend backend = Backend::kAuto;
};

/// The k experts of every token, and what their outputs are weighed with: DeepSeek-V2's routing (arXiv 2405.04434, section
/// 2.2.2), greedy or limited to groups, and V3's (arXiv 2412.19437, section 2.1.2), chosen by sigmoid + bias, weighed by sigmoid.
/// Scores and sums are float32; a weight is rounded to its dtype once.
///
/// On the host all values are checked before anything is written: logits that are not finite throw. On a GPU: float32 logits
/// and bias, dense rows, up to 512 experts, 32 groups, k up to 32; values are the caller's to get right; the work is queued on
/// options.stream and may be captured. Throws InvalidArgument (argument, value, what was expected) or Unsupported.
FLASH_MLA_API void choose_experts(const RoutingArgs& args, const RoutingOptions& options = {});

}  // namespace flash_mla
