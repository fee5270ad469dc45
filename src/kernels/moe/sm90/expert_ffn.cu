// The routed experts of every token: pairs (token, choice) sorted by expert, two products for each expert
// that was hit (weight_stream.cuh, grouped_gemm.cu), and a weighted sum of each token's results in the order
// of its choice. The kernels here stand before and behind the products.
//
// Tile:      sort_pairs all pairs in one block; combine up to 4 columns of a token for each thread, with a
//            norm a token for each block; plain_experts, where nothing is aligned, an output for each warp.
// Threads:   1024, 256, 512 and 256, all alike.
// Memory:    sort_pairs a counter for each warp and expert (up to 64 KB), combine_and_norm the row as
//            float32.
// Registers: 32 to 56 a thread.

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "base/fp8.h"
#include "kernels/gemm/sm90/grouped_gemm.h"
#include "kernels/gemm/sm90/weight_stream.h"
#include "kernels/moe/sm90/fp8_experts.h"
#include "kernels/moe/sm90/moe.h"
#include "kernels/moe/sm90/narrow_experts.h"
#include "kernels/moe/sm90/plain_experts.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kSortThreads = 1024, kSortWarps = kSortThreads / 32;
constexpr int kRowThreads = kPlainThreads, kNormThreads = 512;
constexpr std::size_t kAlignment = 256;
constexpr int kSmallestUnit = 8;
constexpr std::int64_t kMaxNormColumns = 12288;  // 48 KB of floats
constexpr double kMaxStreamedRows = 22;          // pairs of an expert, on average

// ---- Sorting

struct SortArgs {
  const std::int32_t* ids;  // (pairs)
  std::int64_t num_pairs;
  int num_experts, rows_per_unit;
  std::int32_t* pairs;  // out: by expert, within one in ascending order
  ExpertUnit* units;
  std::int32_t* num_units;
};

/// Exclusive sums over the first kMaxExperts threads' values of the block.
__device__ int exclusive_sum(int value, int* warp_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  for (int w = 0; w < warp; ++w) before += warp_sums[w];
  __syncthreads();
  return before + sum - value;
}

/// A stable counting sort by one block. Every warp has a stretch of the pairs and its own counters.
__global__ __launch_bounds__(kSortThreads) void sort_pairs(const SortArgs p) {
  extern __shared__ int counts[];  // [warp][expert]: then where the warp's next pair of that expert goes
  __shared__ int warp_sums[kSortWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, e = threadIdx.x;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  for (int i = threadIdx.x; i < kSortWarps * p.num_experts; i += kSortThreads) counts[i] = 0;
  __syncthreads();

  const std::int64_t stretch = (p.num_pairs + kSortThreads - 1) / kSortThreads * 32;
  const std::int64_t begin = warp * stretch, end = min(begin + stretch, p.num_pairs);
  int* const own = counts + warp * p.num_experts;
  const auto walk = [&](auto&& place) {
    for (std::int64_t at = begin; at < end; at += 32) {
      const std::int64_t pair = at + lane;
      const int expert = pair < end ? __ldcg(p.ids + pair) : -1;
      const unsigned same = __match_any_sync(~0u, expert);
      const int base = expert >= 0 ? own[expert] : 0;
      if (expert >= 0) place(pair, base + __popc(same & ((1u << lane) - 1)));
      __syncwarp();
      if (expert >= 0 && lane == __ffs(same) - 1) own[expert] = base + __popc(same);
      __syncwarp();
    }
  };
  walk([](std::int64_t, int) {});
  __syncthreads();

  int total = 0;
  if (e < p.num_experts) {
    for (int w = 0; w < kSortWarps; ++w) total += counts[w * p.num_experts + e];
  }
  const int first = exclusive_sum(total, warp_sums);
  const int own_units = (total + p.rows_per_unit - 1) / p.rows_per_unit;
  const int first_unit = exclusive_sum(own_units, warp_sums);
  if (e < p.num_experts) {
    for (int u = 0; u < own_units; ++u) {
      p.units[first_unit + u] = {e, first + u * p.rows_per_unit,
                                 min(p.rows_per_unit, total - u * p.rows_per_unit)};
    }
    int next = first;
    for (int w = 0; w < kSortWarps; ++w) {
      const int count = counts[w * p.num_experts + e];
      counts[w * p.num_experts + e] = next;
      next += count;
    }
    if (e == p.num_experts - 1) *p.num_units = first_unit + own_units;
  }
  __syncthreads();
  walk([&](std::int64_t pair, int to) { p.pairs[to] = static_cast<std::int32_t>(pair); });
}

// ---- Combination

struct CombineArgs {
  const void* results;      // (pairs, hidden) float32 or bfloat16
  const float* weights;     // (pairs)
  const std::int32_t* ids;  // (pairs)
  __nv_bfloat16* inout;
  std::int64_t inout_stride, tokens, hidden;
  int experts_per_token;
};

struct NormArgs {
  const float* weight;
  float eps;
  __nv_bfloat16* out;
  std::int64_t stride;
};

/// sum += weight times kWidth neighbouring results.
template <int kWidth, class T>
__device__ __forceinline__ void add_results(float (&sum)[kWidth], float weight, const T* from) {
  if constexpr (kWidth == 1) {
    sum[0] = fmaf(weight, static_cast<float>(__ldcg(from)), sum[0]);
  } else if constexpr (std::is_same_v<T, float>) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(from));
    sum[0] = fmaf(weight, v.x, sum[0]), sum[1] = fmaf(weight, v.y, sum[1]);
    sum[2] = fmaf(weight, v.z, sum[2]), sum[3] = fmaf(weight, v.w, sum[3]);
  } else {
    const uint2 v = __ldcg(reinterpret_cast<const uint2*>(from));
    sum[0] = fmaf(weight, __uint_as_float(v.x << 16), sum[0]);
    sum[1] = fmaf(weight, __uint_as_float(v.x & 0xFFFF0000u), sum[1]);
    sum[2] = fmaf(weight, __uint_as_float(v.y << 16), sum[2]);
    sum[3] = fmaf(weight, __uint_as_float(v.y & 0xFFFF0000u), sum[3]);
  }
}

/// kWidth neighbouring columns of a token for each thread. `kSome`: pairs without an expert have no results.
template <int kWidth, class T, bool kSome>
__global__ __launch_bounds__(kRowThreads) void combine(const CombineArgs p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t pieces = p.hidden / kWidth;
  const std::int64_t i = std::int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= p.tokens * pieces) return;
  const std::int64_t token = i / pieces, column = i % pieces * kWidth;
  __nv_bfloat16* const out = p.inout + token * p.inout_stride + column;
  const T* from = static_cast<const T*>(p.results) + token * p.experts_per_token * p.hidden + column;
  const float* weights = p.weights + token * p.experts_per_token;
  float sum[kWidth];
#pragma unroll
  for (int c = 0; c < kWidth; ++c) sum[c] = __bfloat162float(out[c]);
#pragma unroll 8
  for (int e = 0; e < p.experts_per_token; ++e) {
    if constexpr (kSome) {
      if (__ldcg(p.ids + token * p.experts_per_token + e) < 0) continue;
    }
    add_results(sum, __ldcg(weights + e), from + e * p.hidden);
  }
  if constexpr (kWidth == 4) {
    __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(sum[0], sum[1]), __floats2bfloat162_rn(sum[2], sum[3])};
    *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(pair);
  } else {
    out[0] = __float2bfloat16(sum[0]);
  }
}

/// The same for whole tokens, a block each, and the norm of the sums as they were rounded.
template <int kWidth, class T>
__global__ __launch_bounds__(kNormThreads) void combine_and_norm(const CombineArgs p, const NormArgs norm) {
  extern __shared__ float row[];
  __shared__ float squares[kNormThreads / 32];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t token = blockIdx.x;
  __nv_bfloat16* const out = p.inout + token * p.inout_stride;
  const T* from = static_cast<const T*>(p.results) + token * p.experts_per_token * p.hidden;
  const float* weights = p.weights + token * p.experts_per_token;
  float square = 0;
  for (std::int64_t column = threadIdx.x * kWidth; column < p.hidden; column += kNormThreads * kWidth) {
    float sum[kWidth];
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum[c] = __bfloat162float(out[column + c]);
#pragma unroll 8
    for (int e = 0; e < p.experts_per_token; ++e) {
      add_results(sum, __ldcg(weights + e), from + e * p.hidden + column);
    }
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const __nv_bfloat16 rounded = __float2bfloat16(sum[c]);
      out[column + c] = rounded;
      row[column + c] = __bfloat162float(rounded);
      square += row[column + c] * row[column + c];
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) square += __shfl_xor_sync(~0u, square, offset);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
  __syncthreads();
  square = 0;
  for (const float s : squares) square += s;
  const float factor = rsqrtf(square / static_cast<float>(p.hidden) + norm.eps);
  for (std::int64_t column = threadIdx.x; column < p.hidden; column += kNormThreads) {
    norm.out[token * norm.stride + column] = __float2bfloat16(row[column] * factor * norm.weight[column]);
  }
}

// ---- Host

struct Workspace {
  ExpertUnit* units;
  std::int32_t *num_units, *pairs;
  __nv_bfloat16* act;
  float* results;
  // Of products in FP8 and W4A8: x, quantised; their activations are where the others' are. Offsets are W4A8's.
  std::byte* x_codes;
  float *x_scales, *act_scales, *x_offsets, *act_offsets;
  std::size_t bytes;
};

std::int64_t unit_bound(std::int64_t pairs, int num_experts, int rows_per_unit) {
  return std::min<std::int64_t>(num_experts, pairs) + pairs / rows_per_unit;
}

Workspace lay_out(void* base, std::int64_t tokens, std::int64_t hidden, std::int64_t intermediate,
                  int num_experts, int experts_per_token) {
  const std::int64_t pairs = tokens * experts_per_token;
  std::size_t at = 0;
  const auto take = [&](std::int64_t count, std::size_t size) {
    std::byte* p = static_cast<std::byte*>(base) + at;
    at += (static_cast<std::size_t>(count) * size + kAlignment - 1) / kAlignment * kAlignment;
    return p;
  };
  Workspace w{};
  w.units =
      reinterpret_cast<ExpertUnit*>(take(unit_bound(pairs, num_experts, kSmallestUnit), sizeof(ExpertUnit)));
  w.num_units = reinterpret_cast<std::int32_t*>(take(1, sizeof(std::int32_t)));
  w.pairs = reinterpret_cast<std::int32_t*>(take(pairs, sizeof(std::int32_t)));
  const std::int64_t x_blocks = (hidden + 127) / 128, act_blocks = (intermediate + 127) / 128;
  w.act = reinterpret_cast<__nv_bfloat16*>(take(pairs * std::max(intermediate * 2, act_blocks * 128), 1));
  w.results = reinterpret_cast<float*>(take(pairs * hidden, sizeof(float)));
  w.x_codes = take(tokens * x_blocks * 128, 1);
  w.x_scales = reinterpret_cast<float*>(take(tokens * x_blocks, sizeof(float)));
  w.x_offsets = reinterpret_cast<float*>(take(tokens * x_blocks, sizeof(float)));
  w.act_scales = reinterpret_cast<float*>(take(pairs * act_blocks, sizeof(float)));
  w.act_offsets = reinterpret_cast<float*>(take(pairs * act_blocks, sizeof(float)));
  w.bytes = at;
  return w;
}

/// Rows of x that a unit is planned for: the least bucket that few experts overflow (an overflowing expert's
/// weights are read once more, though from L2). Beyond the streaming kernel's, tiles take over.
int rows_per_unit(const ExpertFfn& p) {
  const double mean = mean_pairs(p);
  if (mean > kMaxStreamedRows && !p.batch_invariant) return kGroupedRows;
  return mean <= 3 ? 8 : mean <= 9 ? 16 : mean <= 22 ? 32 : 64;
}

cudaError_t launch_sort(const SortArgs& args, bool programmatic, cudaStream_t stream) {
  const int bytes = kSortWarps * args.num_experts * static_cast<int>(sizeof(int));
  constexpr int kMaxBytes = kSortWarps * kMaxExperts * static_cast<int>(sizeof(int));
  if (const cudaError_t e = allow_shared_memory<sort_pairs>(kMaxBytes)) return e;
  LaunchConfig config(1, kSortThreads, static_cast<std::size_t>(bytes), stream);
  return launch(config.programmatic(programmatic), sort_pairs, args);
}

template <class T>
cudaError_t launch_combine(const ExpertFfn& p, const T* results, cudaStream_t stream) {
  const CombineArgs args{results,        p.weights, p.ids,    static_cast<__nv_bfloat16*>(p.inout),
                         p.inout_stride, p.tokens,  p.hidden, p.experts_per_token};
  const bool wide =
      p.hidden % 4 == 0 && p.inout_stride % 4 == 0 && reinterpret_cast<std::uintptr_t>(p.inout) % 8 == 0;
  if (p.norm != nullptr) {
    const NormArgs norm{p.norm, p.norm_eps, static_cast<__nv_bfloat16*>(p.norm_out), p.norm_stride};
    LaunchConfig rows(static_cast<unsigned>(p.tokens), kNormThreads,
                      static_cast<std::size_t>(p.hidden) * sizeof(float), stream);
    rows.programmatic(p.programmatic_launch);
    return launch(rows, wide ? combine_and_norm<4, T> : combine_and_norm<1, T>, args, norm);
  }
  const std::int64_t threads = p.tokens * p.hidden / (wide ? 4 : 1);
  LaunchConfig config(static_cast<unsigned>((threads + kRowThreads - 1) / kRowThreads), kRowThreads, 0,
                      stream);
  config.programmatic(p.programmatic_launch);
  if (p.of_experts > 0) return launch(config, wide ? combine<4, T, true> : combine<1, T, true>, args);
  return launch(config, wide ? combine<4, T, false> : combine<1, T, false>, args);
}

cudaError_t run_plain(const ExpertFfn& p, const Workspace& w, int num_sms, cudaStream_t stream) {
  const PlainArgs args{p, w.act, w.results};
  LaunchConfig config(static_cast<unsigned>(8 * num_sms), kRowThreads, 0, stream);
  config.programmatic(p.programmatic_launch);
  if (const cudaError_t e = launch(config, plain_experts<false>, args)) return e;
  return launch(config, plain_experts<true>, args);
}

Fp8Experts fp8_experts(const ExpertFfn& p, const Workspace& w, int num_sms) {
  Fp8ExpertMemory memory;
  memory.units = w.units;
  memory.num_units = w.num_units;
  memory.pairs = w.pairs;
  memory.x_codes = w.x_codes;
  memory.act_codes = w.act;
  memory.x_scales = w.x_scales;
  memory.act_scales = w.act_scales;
  memory.results = w.results;
  return fp8_experts(p, memory, num_sms);
}

cudaError_t run_fp8(const ExpertFfn& p, const Workspace& w, const Fp8Experts& products, cudaStream_t stream) {
  const SortArgs sort{p.ids, products.gate_up.m, p.num_experts, kGroupedRows, w.pairs, w.units, w.num_units};
  if (const cudaError_t e = quantise_rows(products.quantise, stream)) return e;
  if (const cudaError_t e = launch_sort(sort, p.programmatic_launch, stream)) return e;
  if (const cudaError_t e = fp8_gemm(products.gate_up, stream)) return e;
  return fp8_gemm(products.down, stream);
}

NarrowExpertMemory narrow_memory(const Workspace& w) {
  NarrowExpertMemory memory;
  memory.units = w.units;
  memory.num_units = w.num_units;
  memory.pairs = w.pairs;
  memory.x_codes = w.x_codes;
  memory.act = w.act;
  memory.x_scales = w.x_scales;
  memory.x_offsets = w.x_offsets;
  memory.act_scales = w.act_scales;
  memory.act_offsets = w.act_offsets;
  memory.results = w.results;
  return memory;
}

cudaError_t run_narrow(const ExpertFfn& p, const Workspace& w, const NarrowExperts& products,
                       cudaStream_t stream) {
  const SortArgs sort{p.ids,   products.gate_up.m, p.num_experts, products.gate_up.rows_per_unit, w.pairs,
                      w.units, w.num_units};
  if (products.quantise.x != nullptr) {
    if (const cudaError_t e = quantise_rows(products.quantise, stream)) return e;
  }
  if (const cudaError_t e = launch_sort(sort, p.programmatic_launch, stream)) return e;
  if (const cudaError_t e = narrow_gemm(products.gate_up, stream)) return e;
  return narrow_gemm(products.down, stream);
}

cudaError_t run_fast(const ExpertFfn& p, const Workspace& w, cudaStream_t stream) {
  const std::int64_t pairs = p.tokens * p.experts_per_token;
  WeightStream s;
  s.rows_per_unit = kSmallestUnit;
  if (p.tokens == 1 && p.of_experts == 0) {  // every choice is an expert of its own
    s.direct_ids = p.ids;
    s.max_units = s.likely_units = pairs;
  } else {
    s.rows_per_unit = rows_per_unit(p);
    const SortArgs sort{p.ids, pairs, p.num_experts, s.rows_per_unit, w.pairs, w.units, w.num_units};
    if (const cudaError_t e = launch_sort(sort, p.programmatic_launch, stream)) return e;
    s.units = w.units;
    s.num_units = w.num_units;
    s.pairs = w.pairs;
    s.max_units = unit_bound(pairs, p.num_experts, s.rows_per_unit);
    const double missed = std::exp(-mean_pairs(p));
    s.likely_units = static_cast<std::int64_t>(p.num_experts * (1 - missed)) + pairs / 64;
  }
  s.m = pairs;
  s.weight_int4 = p.int4;
  s.batch_invariant = p.batch_invariant;
  s.programmatic_launch = p.programmatic_launch;

  WeightStream gate_up = s;
  gate_up.weight = p.gate_up;
  gate_up.scales = p.gate_up_scales;
  gate_up.x = p.x;
  gate_up.x_stride = p.x_stride;
  gate_up.x_divisor = p.experts_per_token;
  gate_up.n = 2 * p.intermediate;
  gate_up.k = p.hidden;
  gate_up.out = w.act;
  gate_up.out_stride = p.intermediate;
  gate_up.silu_mul = true;
  gate_up.early_weights = false;  // the kernel directly before says which
  const auto multiply = [&](const WeightStream& product) {
    return s.rows_per_unit == kGroupedRows ? launch_grouped_gemm(product, stream)
                                           : launch_stream(product, stream);
  };
  if (const cudaError_t e = multiply(gate_up)) return e;

  WeightStream down = s;
  down.weight = p.down;
  down.scales = p.down_scales;
  down.x = w.act;
  down.x_stride = p.intermediate;
  down.n = p.hidden;
  down.k = p.intermediate;
  down.out = w.results;
  down.out_stride = p.hidden;
  down.out_fp32 = true;
  return multiply(down);
}

bool valid(const ExpertFfn& p) {
  if (p.tokens < 0 || p.hidden <= 0 || p.intermediate <= 0 || p.num_experts < 1 ||
      p.num_experts > kMaxExperts || p.experts_per_token < 1 ||
      p.experts_per_token > std::max(p.num_experts, p.of_experts)) {
    return false;
  }
  if (p.of_experts != 0 && (p.of_experts < p.num_experts || p.norm != nullptr)) return false;
  if ((p.gate_up_scales == nullptr) != (p.down_scales == nullptr)) return false;
  if (p.int4 && (p.gate_up_scales == nullptr || p.hidden % 8 != 0 || p.intermediate % 8 != 0)) return false;
  if (p.tokens == 0) return true;
  return p.x != nullptr && p.gate_up != nullptr && p.down != nullptr && p.ids != nullptr &&
         p.weights != nullptr && p.inout != nullptr && p.workspace != nullptr &&
         (p.tokens == 1 || (p.x_stride >= p.hidden && p.inout_stride >= p.hidden)) &&
         (p.norm == nullptr || (p.norm_out != nullptr && p.hidden <= kMaxNormColumns)) &&
         p.tokens * p.experts_per_token <= INT32_MAX;
}

}  // namespace

std::size_t expert_ffn_workspace_size(std::int64_t tokens, std::int64_t hidden, std::int64_t intermediate,
                                      int num_experts, int experts_per_token) {
  return lay_out(nullptr, tokens, hidden, intermediate, num_experts, experts_per_token).bytes;
}

cudaError_t expert_ffn(const ExpertFfn& p, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.tokens == 0) return cudaSuccess;
  int num_sms = 0;
  if (const cudaError_t e = multiprocessors(num_sms)) return e;
  const Workspace w =
      lay_out(p.workspace, p.tokens, p.hidden, p.intermediate, p.num_experts, p.experts_per_token);
  const bool scaled = p.gate_up_scales != nullptr;
  const bool fast = fits_stream(p.x, p.tokens == 1 ? 0 : p.x_stride, p.gate_up, p.hidden, scaled) &&
                    fits_stream(w.act, p.intermediate, p.down, p.intermediate, scaled);
  const Fp8Experts products = fp8_experts(p, w, num_sms);
  if (takes_fp8(p, products)) {
    if (const cudaError_t e = run_fp8(p, w, products, stream)) return e;
    return launch_combine(p, reinterpret_cast<const __nv_bfloat16*>(w.results), stream);
  }
  const NarrowExperts w4a8 = w4a8_experts(p, narrow_memory(w), mean_pairs(p)),
                      exact = exact_experts(p, narrow_memory(w), mean_pairs(p));
  if (takes_w4a8(p, w4a8, mean_pairs(p))) {
    if (const cudaError_t e = run_narrow(p, w, w4a8, stream)) return e;
    return launch_combine(p, reinterpret_cast<const __nv_bfloat16*>(w.results), stream);
  }
  if (takes_exact(p, exact, mean_pairs(p))) {
    if (const cudaError_t e = run_narrow(p, w, exact, stream)) return e;
    return launch_combine(p, w.results, stream);
  }
  if (const cudaError_t e = fast ? run_fast(p, w, stream) : run_plain(p, w, num_sms, stream)) return e;
  return launch_combine(p, w.results, stream);
}

}  // namespace flash_mla::sm90
