#pragma once

// The feed-forward networks: the choice of experts, and what a warp multiplies of them.

#include "kernels/fused/sm90/one_token_exchange.cuh"
#include "kernels/fused/sm90/one_token_ring.cuh"
#include "kernels/moe/sm90/choose.cuh"
#include "kernels/moe/sm90/moe.h"
#include "kernels/rows/sm90/silu.cuh"

namespace flash_mla::sm90::one_token_kernel {

/// By one warp: a token's experts.
__device__ __forceinline__ void choose(const OneToken& p, const OneTokenLayer& l, float* logits,
                                       std::int32_t* ids, float* weights, float (&scratch)[2][8 * 32]) {
  RouteArgs a;
  a.correction = l.correction;
  a.logits = logits;
  a.ids = ids;
  a.weights = weights;
  a.routing = p.routing;
  if (p.routing.num_experts <= 64) {
    choice::choose_token<2>(a, 0, scratch[0], scratch[1]);
  } else {
    choice::choose_token<8>(a, 0, scratch[0], scratch[1]);
  }
}

/// By one warp: the union of what the tokens have chosen, `each` of them; an entry for each lane.
template <int kTokens>
__device__ __forceinline__ void unite(Choice<kTokens>& c, int each, int lane) {
  int count = 0;
  for (int begin = 0; begin < kTokens * each; begin += 32) {
    const int entry = begin + lane;
    const bool inside = entry < kTokens * each;
    const int id = inside ? c.ids[entry / each][entry % each] : -1;
    bool first = inside;
    std::uint32_t tokens = 0, places = 0;
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 0; i < each; ++i) {
        if (c.ids[t][i] != id) continue;
        first = first && t * each + i >= entry;
        tokens |= 1u << t;
        places |= static_cast<std::uint32_t>(i) << 8 * t;
      }
    }
    const unsigned firsts = __ballot_sync(~0u, first);
    const int at = count + __popc(firsts & ((1u << lane) - 1));
    if (first) c.expert[at] = id, c.tokens[at] = tokens, c.places[at] = places;
    count += __popc(firsts);
  }
  if (lane == 0) c.count = count;
}

/// Gate and up of one token: those of shared experts first, which want no choice.
__device__ __forceinline__ void multiply_pairs(const OneToken& p, const Ffn& ffn, Ring<1>& ring,
                                               const Share& share, const bf16* x, bf16* act) {
  const int shared = ffn.shared * ffn.width, routed = (ffn.slots - ffn.shared) * ffn.width;
  float sums[2];
  int pair = share.begin_of(shared);
#pragma unroll 1
  for (int left = share.end_of(shared) - pair, lists = 2; lists > 0;) {
    if (left == 0) {
      pair = shared + share.begin_of(routed);
      left = shared + share.end_of(routed) - pair;
      --lists;
      continue;
    }
    ring.multiply(2, p.hidden, x, sums);
    if (share.lane == 0) act[pair] = __float2bfloat16(silu(sums[0]) * sums[1]);
    ++pair;
    --left;
  }
}

/// Gate and up of several tokens: the shared experts' pairs, which want no choice.
template <int kTokens>
__device__ __forceinline__ void multiply_shared_pairs(const OneToken& p, const Ffn& ffn, Ring<kTokens>& ring,
                                                      const Share& share, const bf16 (&x)[kTokens][kMaxK],
                                                      Exchange<kTokens>& e) {
  const Owner<kTokens> owner(share.lane);
  const int end = share.end_of(ffn.shared * ffn.width);
#pragma unroll 1
  for (int pair = share.begin_of(ffn.shared * ffn.width); pair < end; ++pair) {
    const float gate = ring.multiply_all(2, p.hidden, x);
    const float up = __shfl_xor_sync(~0u, gate, 16);  // the second row's sums are in the upper lanes
    if (owner.of(1)) e.act[owner.token][pair] = __float2bfloat16(silu(gate) * up);
  }
}

/// And those of the experts that any of the tokens has chosen, with the vectors of these.
template <int kTokens>
__device__ __forceinline__ void multiply_chosen_pairs(const OneToken& p, const Ffn& ffn, Ring<kTokens>& ring,
                                                      const Share& share, const bf16 (&x)[kTokens][kMaxK],
                                                      const Choice<kTokens>& choice, Exchange<kTokens>& e) {
  const int pairs = choice.count * ffn.width, end = share.end_of(pairs);
#pragma unroll 1
  for (int pair = share.begin_of(pairs); pair < end; ++pair) {
    const int i = pair / ffn.width, row = pair - i * ffn.width;
#pragma unroll 1
    for (std::uint32_t tokens = choice.tokens[i]; tokens != 0; tokens &= tokens - 1) {
      const int t = __ffs(static_cast<int>(tokens)) - 1;
      float sums[2];
      ring.product(2, p.hidden, x[t], sums);
      if (share.lane == 0) {
        e.act[t][(ffn.shared + choice.place(i, t)) * ffn.width + row] =
            __float2bfloat16(silu(sums[0]) * sums[1]);
      }
    }
    ring.release(2);
  }
}

/// W_down of one token: the CTA's rows of all experts, to `down`.
__device__ __forceinline__ void multiply_down(const Ffn& ffn, Ring<1>& ring, const Share& share,
                                              const bf16* act, bf16 (&own)[1][kMaxK],
                                              float (&down)[kMaxSlots][kMaxDownRows]) {
  const int end = share.down_begin(ffn.slots, share.warp + 1);
  float sums[2];
#pragma unroll 1
  for (int at = share.down_begin(ffn.slots, share.warp), loaded = -1; at < end;) {
    const int slot = at / share.down_rows, row = at - slot * share.down_rows;
    if (slot != loaded) load_vectors<1>({act + slot * ffn.width}, ffn.width, share.lane, own);
    loaded = slot;
    const int count = min(2, min(end - at, share.down_rows - row));
    ring.multiply(count, ffn.width, own[0], sums);
    if (share.lane < count) down[slot][row + share.lane] = share.lane == 0 ? sums[0] : sums[1];
    at += count;
  }
}

/// W_down of several tokens: the CTA's rows of the shared experts, or of those that were chosen, to `down`.
template <int kTokens, bool kShared>
__device__ __forceinline__ void multiply_down(const Ffn& ffn, Ring<kTokens>& ring, const Share& share,
                                              const Choice<kTokens>& choice, int experts,
                                              const Exchange<kTokens>& e, bf16 (*act)[kMaxK],
                                              float (&down)[kTokens][kMaxSlots][kMaxDownRows]) {
  constexpr int kTogether = kActVectors<kTokens>;
  const int end = share.down_begin(experts, share.warp + 1);
  int loaded = -1, loaded_token = -1;
#pragma unroll 1
  for (int at = share.down_begin(experts, share.warp); at < end;) {
    const int i = at / share.down_rows, row = at - i * share.down_rows;
    const int count = min(2, min(end - at, share.down_rows - row));
    const auto slot_of = [&](int token) { return kShared ? i : ffn.shared + choice.place(i, token); };
#pragma unroll 1
    for (std::uint32_t tokens = kShared ? (1u << kTokens) - 1 : choice.tokens[i]; tokens != 0;) {
      int of
          [kTogether];  // tokens whose activations are multiplied now; the last of them again where there are fewer
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        of[n] = tokens != 0 ? __ffs(static_cast<int>(tokens)) - 1 : of[n > 0 ? n - 1 : 0];
        tokens &= tokens - 1;
      }
      if (loaded != i || loaded_token != of[0]) {
        const bf16* from[kTogether];
#pragma unroll
        for (int n = 0; n < kTogether; ++n) from[n] = e.act[of[n]] + slot_of(of[n]) * ffn.width;
        load_vectors(from, ffn.width, share.lane, act);
        loaded = i, loaded_token = of[0];
      }
#pragma unroll 1
      for (int n = 0; n < (of[kTogether - 1] == of[0] ? 1 : kTogether); ++n) {
        float sums[2];
        ring.product(count, ffn.width, act[n], sums);
        if (share.lane < count) {
          const int token = n == 0 ? of[0] : of[kTogether - 1];
          down[token][slot_of(token)][row + share.lane] = share.lane == 0 ? sums[0] : sums[1];
        }
      }
    }
    ring.release(count);
    at += count;
  }
}

}  // namespace flash_mla::sm90::one_token_kernel
