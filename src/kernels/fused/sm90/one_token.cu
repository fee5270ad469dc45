// All layers of a model for one token, or a few of one sequence. One CTA on every multiprocessor stays there for the
// whole step.
//
// Work:    every warp of the grid has rows of every weight matrix (one_token_work.cuh) and multiplies them
//          with the phase's vector, which is in shared memory. Attention: one_token_attention.cuh.
// Threads: 8 warps that multiply, all alike, each with a ring of weights of its own; three warps of which
//          eight lanes fill the rings; one warp that chooses experts.
// Memory:  rings of 5 pieces of 4 KB for each warp (160 KB: the weights that are under way, whatever phase
//          they belong to) | Q 18 KB and keys of a tile 37 KB, the router's scores or experts' activations
//          in their place | attention scores and other scratch 10 KB | the chosen
//          experts | barriers.
// Registers: 168 at the start, then 216 for the warps that multiply and 72 for the others.
//
// Phases of a layer: "|" is a vector that goes round (tagged.cuh), "||" a barrier of CTAs
// (grid_barrier.cuh):
//
//   norm, qkv | W_UK, rope, cache append | attention of a stretch of keys || combination, W_UV |
//   o, residual | norm, router || choice; meanwhile shared experts' gate and up, then the routed ones' ||
//   down, weighted sum, residual |
//
// While vectors go round the memory would idle: the weights of the phases ahead are on their way meanwhile.
// Only the routed experts' have to wait for the choice. Norms and the choice are made by every CTA for
// itself, which is quicker than to hand them on.
//
// Several tokens (kTokens, a kernel for each number): every row of weights is read once and multiplied with all
// tokens' vectors, a routed expert's with those of the tokens that chose it. What a token gets has the bits of its
// being alone: same products, same sums. Their memory: rings of 4 pieces (128 KB) | 64 KB for two activations of each
// warp, Q and keys in their place | scratch 16 KB.

#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/fused/sm90/one_token.h"
#include "kernels/fused/sm90/one_token_attention.cuh"
#include "kernels/fused/sm90/one_token_exchange.cuh"
#include "kernels/fused/sm90/one_token_experts.cuh"
#include "kernels/fused/sm90/one_token_phases.cuh"
#include "kernels/fused/sm90/one_token_ring.cuh"
#include "kernels/fused/sm90/one_token_work.cuh"
#include "kernels/fused/sm90/tagged.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90 {
namespace one_token_kernel {

constexpr int kFillThreads = 128, kFillers = 3;  // a warpgroup: three warps that copy, one that chooses

template <int kTokens>
struct Smem {
  RingSmem<kTokens> ring;
  AttentionSmem<kTokens> attention;
  ScratchSmem<kTokens> scratch;
  Choice<kTokens> choice;
  std::uint64_t chosen;  // by mixture layers
  RingState<kTokens> rings;
};
static_assert(sizeof(Smem<1>) <= 227 << 10 && sizeof(Smem<kMaxOneTokens>) <= 227 << 10);

/// One lane for each ring: eight lanes of one warp would stand in each other's way.
template <int kTokens>
__device__ __forceinline__ void fill_rings(const OneToken& p, Smem<kTokens>& s, int filler, int lane) {
  const int warp = filler + lane * kFillers;
  const unsigned lanes = __ballot_sync(~0u, warp < kWarps);
  if (warp >= kWarps) return;
  const Share share(p, warp);
  Walk walk(p, share, s.choice);
  RingFiller ring(s.ring, s.rings, walk, warp);
  int layer = 0, mixtures = 0;  // of the layers before
  for (bool more = true; __any_sync(lanes, more);) {
    if (!more) continue;
    more = ring.step();
    for (; layer < walk.layer(); ++layer) mixtures += p.layers[layer].router != nullptr;
    if (walk.wants_choice() && ptx::mbarrier_test_wait(&s.chosen, mixtures & 1)) walk.chosen();
  }
}

/// The shared experts' rows of W_down that are the CTA's, into L2.
__device__ __forceinline__ void prefetch_down(const OneToken& p, const OneTokenLayer& l, const Share& share) {
  const Ffn ffn = ffn_of(p, true, 0);
  for (int i = share.lane; i < ffn.shared * share.down_rows; i += 32) {
    const int slot = i / share.down_rows, row = share.down_first + i - slot * share.down_rows;
    prefetch_bulk(static_cast<const bf16*>(l.down) + (p.routing.num_experts + slot) * ffn.down_slot +
                      row * ffn.down_pitch,
                  static_cast<std::uint32_t>(ffn.width) * 2);
  }
}

/// CTAs that have keys of some token.
template <int kTokens>
__device__ __forceinline__ unsigned attention_ctas(int len, const Share& share) {
  if constexpr (kTokens == 1) {
    return KeyRange(len, share.cta, share.ctas).splits;
  } else {
    return AllSplits<kTokens>(len, share.ctas).ctas_with_keys(share.ctas);
  }
}

/// By one warp of every CTA, while the others are at the shared experts: the choice of each mixture layer.
template <int kTokens>
__device__ __forceinline__ void choose_experts(const OneToken& p, Smem<kTokens>& s, int lane) {
  Exchange<kTokens>& e = exchange_of<kTokens>(p);
  const Share share(p, 0);
  const unsigned ctas_with_keys = attention_ctas<kTokens>(__ldg(p.len), share);
  const int width = p.routing.experts_per_token + p.routing.shared_experts;
  Barrier grid(&e.counter);
  for (int layer = 0; layer < p.num_layers; ++layer) {
    const OneTokenLayer& l = p.layers[layer];
    grid.expect(ctas_with_keys);
    if (l.router != nullptr) {
      grid.wait_in_warp();  // until the memory has little to do: the rings are full
      prefetch_down(p, l, share);
      grid.expect(router_ctas(p));
      grid.wait_in_warp();
      for (int t = 0; t < kTokens; ++t) {
        choose(p, l, e.logits[t], s.choice.ids[t], s.choice.weights[t], s.attention.routing);
        __syncwarp();
      }
      if constexpr (kTokens > 1) {
        unite(s.choice, p.routing.experts_per_token, lane);
        __syncwarp();
      }
      if (lane == 0) ptx::mbarrier_arrive(&s.chosen);
      if (share.cta == 0 && lane < width) {
        for (int t = 0; t < kTokens; ++t) l.ids[t * width + lane] = s.choice.ids[t][lane];
      }
    }
    grid.expect(share.ctas);
  }
}

/// An element of x as it was handed over.
__device__ __forceinline__ float load1(const bf16* p) {
  const unsigned short bits = __ldcg(reinterpret_cast<const unsigned short*>(p));
  return __bfloat162float(reinterpret_cast<const bf16&>(bits));
}

/// By the warps that multiply.
template <int kTokens>
__device__ __forceinline__ void run_layers(const OneToken& p, Smem<kTokens>& s, int warp, int lane) {
  Exchange<kTokens>& e = exchange_of<kTokens>(p);
  bf16* const x = static_cast<bf16*>(p.x);
  const Share share(p, warp);
  const Owner<kTokens> owner(lane);
  Ring<kTokens> ring(s.ring, s.rings, warp, lane);
  const int slices = dense_slices(p.intermediate);
  const unsigned ctas = gridDim.x;
  Barrier grid(&e.counter);
  Attention<kTokens> attention(p, share, s.attention, s.scratch);
  const int len = __ldg(p.len);
  const unsigned ctas_with_keys = kTokens > 1 ? attention_ctas<kTokens>(len, share) : attention.splits();
  const bool has_keys = kTokens > 1 ? share.cta < static_cast<int>(ctas_with_keys) : attention.has_keys();
  const unsigned before = __ldcg(&e.rounds);

  const bf16(&v)[kTokens][kMaxK] = s.scratch.vector.x;  // the phase's vectors
  NormWeights norm;
  int mixtures = 0;  // of the layers before
#pragma unroll 1
  for (int layer = 0; layer < p.num_layers; ++layer) {
    const OneTokenLayer& l = p.layers[layer];
    const bool mixture = l.router != nullptr;
    const Ffn ffn = ffn_of(p, mixture, slices);
    bf16* const cache = static_cast<bf16*>(l.cache);
    const unsigned round = (before + layer + 1) & 0xFFFF;
    // Columns i ... i + 7 of the vectors that all CTAs have a part in.
    const auto await_all = [&](const Tagged(&from)[kTokens][kMaxK], int i, unsigned of_round,
                               uint4(&to)[kTokens]) {
      await_8<kTokens>(
          of_round, [&](int t) { return from[t] + i; }, [](int) { return true; }, to);
    };

    if constexpr (kTokens > 1) attention.take(share.cta);
    if (warp == 7) attention.prefetch(cache);
    norm.load(l.input_norm, p.hidden);
    share_normalised(norm, p.eps, p.hidden, s.scratch.vector, [&](int i, uint4(&to)[kTokens]) {
      if (layer > 0) {
        await_all(e.x_layer, i, (round - 1) & 0xFFFF, to);
        return;
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) to[t] = load8(x + t * p.hidden + i);
    });
    const int qkv_rows = share.of(p.heads * (p.nope + kRope) + kKey);
#pragma unroll 1
    for (int i = 0; i < qkv_rows; i += 2) {
      const int count = min(2, qkv_rows - i);
      const float sum = ring.multiply_all(count, p.hidden, v);
      if (owner.of(count)) {
        store_tagged(e.qkv[owner.token] + share.index + (i + owner.row) * share.stride, __float2bfloat16(sum),
                     round);
      }
    }

    if (warp == 7 && share.cta >= share.ctas - kTokens) {
      const int token = share.ctas - 1 - share.cta;
      append_key(p, l, token, e.qkv[token] + p.heads * (p.nope + kRope), e.own_key[token], round, lane);
    }
    const int uk_pieces = share.of(p.heads * (kRank / kUkRows));
#pragma unroll 1
    for (int i = 0; i < uk_pieces; ++i) {
      absorb(p, ring, e, round, share.index + i * share.stride, lane);
    }
    if (warp == 6) {
      for (int i = share.cta; i < kTokens * p.heads; i += share.ctas) {
        const int token = kTokens > 1 ? i / p.heads : 0;
        rotate_query(p, token, e.qkv[token], e.q_latent[token], round, i - token * p.heads, lane);
      }
    }

    if constexpr (kTokens == 1) {
      if (attention.has_keys()) {
        attention.run(e.q_latent[0], e.own_key[0], round, cache,
                      e.out[0] + std::int64_t(share.cta) * kHeads * kRank, e.stats[0] + share.cta * kHeads);
      }
    } else if (has_keys) {
      for (int number = share.cta; attention.take(number); number += share.ctas) {
        if (number != share.cta) {
          sync_warps();  // the split before has been read
          if (warp == 7) attention.prefetch(cache);
        }
        const int token = attention.token(), split = attention.split();
        attention.run(e.q_latent[token], e.own_key[0], round, cache, e.out[token] + split * kHeads * kRank,
                      e.stats[token] + split * kHeads);
      }
    }
    grid.arrive(ctas_with_keys, has_keys);

    if (share.uv_rows > 0) {
      grid.wait();
#pragma unroll 1
      for (int t = 0; t < kTokens; ++t) {
        const int splits = kTokens > 1 ? KeyRange(len + t, share.cta, share.ctas).splits : attention.splits();
        combine_splits(e.out[t], e.stats[t], splits, share.uv_head, share, s.scratch.latent[t]);
      }
      sync_warps();
      expand(p, ring, share, s.scratch.latent, e, round);
    }

    share_vectors(p.heads * p.v, s.scratch.vector,
                  [&](int i, uint4(&to)[kTokens]) { await_all(e.attended, i, round, to); });
    const int o_rows = share.of(p.hidden);
#pragma unroll 1
    for (int i = 0; i < o_rows; i += 2) {
      const int count = min(2, o_rows - i), row = share.index + (i + owner.row) * share.stride;
      const float residual = !owner.of(count) ? 0.0f
                             : layer == 0     ? load1(x + owner.token * p.hidden + row)
                                              : load_tagged(e.x_layer[owner.token] + row);
      const float sum = ring.multiply_all(count, p.heads * p.v, v);
      if (owner.of(count)) {
        store_tagged(e.x_attended[owner.token] + row, __float2bfloat16(residual + sum), round);
      }
    }

    norm.load(l.post_attention_norm, p.hidden);
    share_normalised(norm, p.eps, p.hidden, s.scratch.vector,
                     [&](int i, uint4(&to)[kTokens]) { await_all(e.x_attended, i, round, to); });
    if (mixture) {
#pragma unroll 1
      for (int row = share.index; row < p.routing.num_experts; row += share.stride) {
        float logits[kTokens];
        route_row(p, ring, v, lane, logits);
        if (lane == 0) {
#pragma unroll
          for (int t = 0; t < kTokens; ++t) e.logits[t][row] = logits[t];
        }
      }
      grid.arrive(router_ctas(p), share.cta < p.routing.num_experts);
    }
    if constexpr (kTokens == 1) {
      multiply_pairs(p, ffn, ring, share, v[0], e.act[0]);
      if (mixture) ptx::mbarrier_wait(&s.chosen, mixtures++ & 1);
    } else {
      multiply_shared_pairs(p, ffn, ring, share, v, e);
      if (mixture) {
        ptx::mbarrier_wait(&s.chosen, mixtures++ & 1);
        multiply_chosen_pairs(p, ffn, ring, share, v, s.choice, e);
      }
    }
    grid.arrive(ctas);
    grid.wait();

    if constexpr (kTokens == 1) {
      multiply_down(ffn, ring, share, e.act[0], s.attention.act[warp], s.scratch.down[0]);
    } else {
      multiply_down<kTokens, true>(ffn, ring, share, s.choice, ffn.shared, e, s.attention.act[warp],
                                   s.scratch.down);
      if (mixture) {
        multiply_down<kTokens, false>(ffn, ring, share, s.choice, s.choice.count, e, s.attention.act[warp],
                                      s.scratch.down);
      }
    }
    ptx::fence_async_proxy();  // keys come by the copy engine to where the activations were
    sync_warps();
    const int token = kTokens > 1 ? static_cast<int>(threadIdx.x) / kMaxDownRows : 0;
    const int own = static_cast<int>(threadIdx.x) - token * kMaxDownRows;
    if (token < kTokens && own < share.down_rows) {
      const int row = share.down_first + own;
      float total = load_tagged(e.x_attended[token] + row);
      for (int slot = 0; slot < ffn.slots; ++slot) {
        const float weight = slot < ffn.shared ? 1.0f : s.choice.weights[token][slot - ffn.shared];
        total = fmaf(weight, s.scratch.down[token][slot][own], total);
      }
      store_tagged(e.x_layer[token] + row, __float2bfloat16(total), round);
      if (layer + 1 == p.num_layers) x[token * p.hidden + row] = __float2bfloat16(total);
    }
  }
  if (grid.finish()) e.rounds = before + p.num_layers;
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads + kFillThreads, 1)
    one_token_kernel(const __grid_constant__ OneToken p) {
  extern __shared__ __align__(128) std::uint8_t dynamic_smem[];
  Smem<kTokens>& s = *reinterpret_cast<Smem<kTokens>*>(dynamic_smem);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;

  if (threadIdx.x < kWarps * kDepth<kTokens>) {
    ptx::mbarrier_init(&s.rings.arrived[0][0] + threadIdx.x, 1);
    ptx::mbarrier_init(&s.rings.read[0][0] + threadIdx.x, 1);
  }
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.attention.arrived, 1);
    ptx::mbarrier_init(&s.chosen, 1);
  }
  ptx::fence_barrier_init();
  __syncthreads();
  if (warp >= kWarps) {
    ptx::set_max_registers_down<72>();
    if (warp < kWarps + kFillers) {
      fill_rings(p, s, warp - kWarps, lane);
    } else {
      choose_experts(p, s, lane);
    }
  } else {
    ptx::set_max_registers_up<216>();
    run_layers(p, s, warp, lane);
  }
}

// ---- Host

bool valid(const OneToken& p) {
  return p.num_tokens > 0 && p.num_tokens <= kMaxOneTokens && p.num_layers > 0 && p.x != nullptr &&
         p.workspace != nullptr && p.cosines != nullptr && p.sines != nullptr && p.slot != nullptr &&
         p.len != nullptr && p.table != nullptr;
}

bool fits_device(int sms, int heads, int hidden) {
  // Every CTA hands on some of x: whoever has all of it knows that all CTAs are done with what came before.
  return sms >= heads && hidden >= sms && (hidden + sms - 1) / sms <= kMaxDownRows;
}

}  // namespace one_token_kernel

using namespace one_token_kernel;

bool fits_one_token(const OneToken& p, bool dense, bool mixture) {
  const auto fits = [](int size) { return size > 0 && size <= kMaxK && size % 8 == 0; };
  if (p.num_layers > kMaxOneTokenLayers || p.heads > kHeads) return false;
  if (p.nope != 32 && p.nope != 64 && p.nope != 128) return false;
  if (!fits(p.hidden) || !fits(p.heads * p.v)) return false;
  if (dense && (p.intermediate <= 0 || dense_slices(p.intermediate) > kMaxSlots)) return false;
  const Routing& r = p.routing;
  if (mixture && (!fits(p.moe_intermediate) || r.experts_per_token + r.shared_experts > kMaxSlots ||
                  r.num_experts > kMaxOneTokenExperts)) {
    return false;
  }
  int sms = 0, device = 0, cooperative = 0;
  return multiprocessors(sms) == cudaSuccess && fits_device(sms, p.heads, p.hidden) &&
         cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) == cudaSuccess &&
         cooperative != 0;
}

std::size_t one_token_workspace_size() { return kExchangeBegin<kMaxOneTokens + 1>; }

template <int kTokens>
static cudaError_t launch_for(const OneToken& p, int num_sms, cudaStream_t stream) {
  if (p.num_tokens != kTokens) {
    if constexpr (kTokens < kMaxOneTokens) return launch_for<kTokens + 1>(p, num_sms, stream);
    return cudaErrorInvalidValue;
  }
  constexpr auto kKernel = one_token_kernel::one_token_kernel<kTokens>;
  if (const cudaError_t e = allow_shared_memory<kKernel>(sizeof(Smem<kTokens>))) return e;
  LaunchConfig config(static_cast<unsigned>(num_sms), kThreads + kFillThreads, sizeof(Smem<kTokens>), stream);
  return launch(config.cooperative(), kKernel, p);
}

cudaError_t one_token(const OneToken& p, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  int num_sms = 0;
  if (const cudaError_t e = multiprocessors(num_sms)) return e;
  if (!fits_device(num_sms, p.heads, p.hidden)) return cudaErrorInvalidValue;
  return launch_for<1>(p, num_sms, stream);
}

}  // namespace flash_mla::sm90
