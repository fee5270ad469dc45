#pragma once

// The products whose time is that of reading the weights: one row of the model's linear layers, or the rows
// of each expert. Behind skinny_gemm.h and moe.h.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

namespace flash_mla::sm90 {

/// Rows that share one expert's weights.
struct ExpertUnit {
  std::int32_t expert;
  std::int32_t first;  ///< of its entries in the list of pairs
  std::int32_t count;
};

enum class StreamWeight { kBf16, kFp32, kE4m3, kInt4 };

struct WeightStream {
  const void* weight = nullptr;  ///< (n, k), for experts (num_experts, n, k)
  /// Not null: the weights are e4m3, each to be multiplied by scales[n / 8][k / 128], (ceil(n / 8), ceil(k / 128)) for
  /// every expert. A block of 128 x 128 of a checkpoint is 16 rows of these, so that matrices may lie on each other.
  const float* scales = nullptr;
  /// The weights are int4 as int4_weights.h lays them out, `scales` theirs, aligned to 16 bytes. n and with silu_mul n / 2
  /// are divisible by 8.
  bool weight_int4 = false;
  const float* bias = nullptr;
  const void* x = nullptr;  ///< bfloat16 rows
  void* out = nullptr;
  std::int64_t x_stride = 0, out_stride = 0;
  std::int64_t n = 0, k = 0;
  std::int64_t m = 0;  ///< rows of out; for experts: pairs

  // Experts. A pair p = token * experts_per_token + i reads row p / x_divisor of x and writes row p of out.
  const ExpertUnit* units = nullptr;         ///< or null
  const std::int32_t* num_units = nullptr;   ///< on the device
  const std::int32_t* pairs = nullptr;       ///< pairs ordered by expert
  const std::int32_t* direct_ids = nullptr;  ///< instead of units: pair p is a unit of expert direct_ids[p]
  std::int64_t max_units = 0;                ///< bound on the number of units
  std::int64_t likely_units = 0;             ///< what the division of the work is planned for
  int rows_per_unit = 0;                     ///< bound on a unit's count: 8, 16, 32 or 64
  int x_divisor = 1;

  bool out_fp32 = false, weight_fp32 = false, accumulate = false, silu_mul = false;
  bool batch_invariant = false, programmatic_launch = false;
  /// Whether weights and units are there before the kernel directly before this one has finished.
  bool early_weights = true;
};

/// How a product is divided. The k of one output is summed by `cluster` CTAs times `warps_k` warps, in an
/// order that follows from these two and k.
struct StreamPlan {
  int groups;       ///< of 8 rows of x
  int tiles;        ///< of 16 rows of the weights, for each warp
  int warps_n;      ///< warps side by side along n
  int warps_k;      ///< warps that share the k of a CTA
  int cluster;      ///< CTAs that share k: 1, 2, 4 or 8
  int width;        ///< outputs of an item along n, divisible by 4
  int ctas_per_sm;  ///< 1 leaves room for the next kernel
};

StreamPlan plan_stream(const WeightStream& args, int num_sms);
/// Every plan that plan_stream() chooses from; for measurements.
std::vector<StreamPlan> stream_plans(const WeightStream& args, int num_sms);
/// Queues the product; requires what the fast path of SkinnyGemm requires.
cudaError_t launch_stream(const WeightStream& args, const StreamPlan& plan, cudaStream_t stream);
cudaError_t launch_stream(const WeightStream& args, cudaStream_t stream);

/// Whether x and the weights can be read 16 bytes at a time. `scaled`: the weights are e4m3 or int4.
bool fits_stream(const void* x, std::int64_t x_stride, const void* weight, std::int64_t k,
                 bool scaled = false);

}  // namespace flash_mla::sm90
