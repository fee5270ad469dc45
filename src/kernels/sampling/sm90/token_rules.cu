// Biases and excluded tokens of rows of logits.
//
// Tile:      one row for kParts blocks; a warp takes the 32 logits of a word of the mask at a time.
// Threads:   512, all alike.
// Memory:    none but registers: rows lie in the L2 cache, and what is allowed is not read.
// Registers: up to 32 a thread.

#include <cmath>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/sampling/sm90/token_rules.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kParts = 16;
constexpr int kThreads = 512;
constexpr int kWarp = 32;
constexpr int kUnroll = 4;  // words of the mask on their way to a warp

__device__ bool allows(const std::uint32_t* mask, int token) {
  return mask == nullptr || (mask[token / 32] >> (token % 32) & 1) != 0;
}

// Logits of tokens that are allowed get their biases and no others change: nobody else touches them.
__device__ void add_biases(float* row, int columns, const TokenBias* biases, int count,
                           const std::uint32_t* mask) {
  for (int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x); i < count; i += kParts * kThreads) {
    const int token = biases[i].token;
    if (i > 0 && biases[i - 1].token == token) continue;  // who has the token's first adds all of them
    if (token < 0 || token >= columns || !allows(mask, token)) continue;
    float logit = row[token];
    for (int j = i; j < count && biases[j].token == token; ++j) logit += biases[j].bias;
    row[token] = logit;
  }
}

__device__ void exclude_others(float* row, int columns, const std::uint32_t* mask) {
  const int words = (columns + 31) / 32, warps = kParts * kThreads / kWarp;
  const int warp = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int first = warp; first < words; first += kUnroll * warps) {
    std::uint32_t allowed[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int word = first + j * warps;
      allowed[j] = word < words ? mask[word] : ~0u;
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int token = (first + j * warps) * kWarp + lane;
      if ((allowed[j] >> lane & 1) != 0 || token >= columns) continue;
      // Not NaN, not +inf.
      if (row[token] < INFINITY) row[token] = -INFINITY;
    }
  }
}

__global__ void __launch_bounds__(kThreads) token_rules_kernel(float* logits, int columns, TokenRules rules) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const RuledRow rule = rules.rows[blockIdx.y];
  float* row = logits + static_cast<std::int64_t>(rule.row) * columns;
  const std::uint32_t* mask =
      rule.mask < 0 ? nullptr : rules.masks + static_cast<std::int64_t>(rule.mask) * ((columns + 31) / 32);
  add_biases(row, columns, rules.biases + rule.first_bias, rule.num_biases, mask);
  if (mask != nullptr) exclude_others(row, columns, mask);
}

}  // namespace

void apply_token_rules(Matrix logits, const TokenRules& rules, cudaStream_t stream) {
  const dim3 grid(kParts, static_cast<unsigned>(rules.num_rows));
  check(launch(LaunchConfig(grid, kThreads, 0, stream).programmatic(), token_rules_kernel,
               reinterpret_cast<float*>(logits.data), static_cast<int>(logits.columns), rules),
        "token_rules");
}

}  // namespace flash_mla::sm90
