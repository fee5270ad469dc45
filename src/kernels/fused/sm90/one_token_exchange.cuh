#pragma once

// What CTAs leave for each other, in device memory.

#include <cstddef>

#include "kernels/fused/sm90/grid_barrier.cuh"
#include "kernels/fused/sm90/one_token_attention.cuh"
#include "kernels/fused/sm90/one_token_work.cuh"
#include "kernels/fused/sm90/tagged.cuh"

namespace flash_mla::sm90::one_token_kernel {

inline constexpr int kMaxNope = 128;
inline constexpr int kMaxOneTokenExperts = 256;

/// Steps of every number of tokens have one of their own: what a step does not write must not look as if a later one
/// had.
template <int kTokens>
struct Exchange {
  unsigned counter;  // of the grid's barrier
  unsigned rounds;   // layers of all steps so far
  alignas(256) Tagged qkv[kTokens][kHeads * (kMaxNope + kRope) + kKey];
  alignas(256) Tagged q_latent[kTokens][kHeads * kKey];
  alignas(256) Tagged own_key[kTokens][kKey];  // as it goes to the cache
  alignas(256) float out[kTokens][kMaxSplits * kHeads * kRank];
  alignas(256) float2 stats[kTokens][kMaxSplits * kHeads];
  alignas(256) Tagged attended[kTokens][kMaxK];
  alignas(256) Tagged x_attended[kTokens][kMaxK];  // the residual behind the attention
  alignas(256) Tagged x_layer[kTokens][kMaxK];     // and behind the layer
  alignas(256) float logits[kTokens][kMaxOneTokenExperts];
  alignas(256) bf16 act[kTokens][kMaxSlots * kMaxK];  // of the token's experts, shared ones first
};

/// Bytes of the workspace in front of the part for kTokens tokens.
template <int kTokens>
inline constexpr std::size_t kExchangeBegin = kExchangeBegin<kTokens - 1> + sizeof(Exchange<kTokens - 1>);
template <>
inline constexpr std::size_t kExchangeBegin<1> = 0;

template <int kTokens>
__device__ __forceinline__ Exchange<kTokens>& exchange_of(const OneToken& p) {
  return *reinterpret_cast<Exchange<kTokens>*>(static_cast<std::uint8_t*>(p.workspace) +
                                               kExchangeBegin<kTokens>);
}

using Barrier = GridBarrier<1, kThreads>;

/// CTAs that have rows of the router: they arrive when their logits are there.
__device__ __forceinline__ unsigned router_ctas(const OneToken& p) {
  return min(gridDim.x, static_cast<unsigned>(p.routing.num_experts));
}

}  // namespace flash_mla::sm90::one_token_kernel
