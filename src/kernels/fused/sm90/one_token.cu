// All layers of a model for one token. One CTA on every multiprocessor stays there for the whole step.
//
// Work:    every warp of the grid has rows of every weight matrix (one_token_work.cuh) and multiplies them
//          with the phase's vector, which is in shared memory. Attention: one_token_attention.cuh.
// Threads: 8 warps that multiply, all alike, each with a ring of weights of its own; three warps of which
//          eight lanes fill the rings; one warp that chooses experts.
// Memory:  rings of 5 pieces of 4 KB for each warp (160 KB: the weights that are under way, whatever phase
//          they belong to) | Q 18 KB, the router's scores in its place | keys of a tile 37 KB,
//          experts' activations in their place | attention scores and other scratch 10 KB | the chosen
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

#include <algorithm>

#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/fused/sm90/grid_barrier.cuh"
#include "kernels/fused/sm90/one_token.h"
#include "kernels/fused/sm90/one_token_attention.cuh"
#include "kernels/fused/sm90/one_token_ring.cuh"
#include "kernels/fused/sm90/one_token_work.cuh"
#include "kernels/fused/sm90/tagged.cuh"
#include "kernels/moe/sm90/choose.cuh"
#include "kernels/moe/sm90/moe.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/rows/sm90/row_math.cuh"
#include "kernels/rows/sm90/silu.cuh"

namespace flash_mla::sm90 {
namespace one_token_kernel {

constexpr int kFillThreads = 128, kFillers = 3;  // a warpgroup: three warps that copy, one that chooses
constexpr int kMaxNope = 128;
constexpr int kMaxOneTokenExperts = 256;

/// What CTAs leave for each other, in device memory.
struct Exchange {
  unsigned counter;  // of the grid's barrier
  unsigned rounds;   // layers of all steps so far
  alignas(256) Tagged qkv[kHeads * (kMaxNope + kRope) + kKey];
  alignas(256) Tagged q_latent[kHeads * kKey];
  alignas(256) Tagged own_key[kKey];  // as it goes to the cache
  alignas(256) float out[kMaxSplits * kHeads * kRank];
  alignas(256) float2 stats[kMaxSplits * kHeads];
  alignas(256) Tagged attended[kMaxK];
  alignas(256) Tagged x_attended[kMaxK];  // the residual behind the attention
  alignas(256) Tagged x_layer[kMaxK];     // and behind the layer
  alignas(256) float logits[kMaxOneTokenExperts];
  alignas(256) bf16 act[kMaxSlots * kMaxK];
};

using Barrier = GridBarrier<1, kThreads>;

/// CTAs that have rows of the router: they arrive when their logits are there.
__device__ __forceinline__ unsigned router_ctas(const OneToken& p) {
  return min(gridDim.x, static_cast<unsigned>(p.routing.num_experts));
}

struct Smem {
  RingSmem ring;
  AttentionSmem attention;
  ScratchSmem scratch;
  Choice choice;
  std::uint64_t chosen;  // by mixture layers
  RingState rings;
};
static_assert(sizeof(Smem) <= 227 << 10);

/// Head `head` of the query: out = [| its last 64 columns turned], a pair for each lane.
__device__ __forceinline__ void rotate_query(const OneToken& p, const Tagged* q, Tagged* out, unsigned round,
                                             int head, int lane) {
  const std::uint32_t pair = await_2(q + head * (p.nope + kRope) + p.nope + 2 * lane, round);
  bf16 turned[2];
  rotate(reinterpret_cast<const bf16*>(&pair), turned, __ldg(p.cosines + lane), __ldg(p.sines + lane));
  for (int i = 0; i < 2; ++i) store_tagged(out + head * kKey + kRank + 2 * lane + i, turned[i], round);
}

/// By one warp: the token's latent, normalised, and its key, turned, to its place in the cache and to
/// `own_key`.
__device__ __forceinline__ void append_key(const OneToken& p, const OneTokenLayer& l, const Tagged* kv,
                                           Tagged* own_key, unsigned round, int lane) {
  const std::int64_t slot = __ldg(p.slot);
  bf16* const key = static_cast<bf16*>(l.cache) + slot * kKey;
  const auto put = [&](int column, bf16 value) {
    store_tagged(own_key + column, value, round);
    if (slot >= 0) key[column] = value;
  };
  uint4 v[2];
  await_8<2>(
      round, [&](int i) { return kv + i * 256 + lane * 8; }, [](int) { return true; }, v);
  float x[16], squares = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t pairs[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[i * 8 + 2 * j] = low(pairs[j]), x[i * 8 + 2 * j + 1] = high(pairs[j]);
    }
  }
#pragma unroll
  for (const float f : x) squares = fmaf(f, f, squares);
  const float factor = rsqrtf(warp_total(squares) / float(kRank) + p.latent_eps);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int column = i / 8 * 256 + lane * 8 + i % 8;
    put(column, __float2bfloat16(x[i] * factor * __ldg(l.kv_norm + column)));
  }
  const std::uint32_t pair = await_2(kv + kRank + 2 * lane, round);
  bf16 turned[2];
  rotate(reinterpret_cast<const bf16*>(&pair), turned, __ldg(p.cosines + lane), __ldg(p.sines + lane));
  for (int i = 0; i < 2; ++i) put(kRank + 2 * lane + i, turned[i]);
}

/// The products of W_UK's next 16 rows, of p.nope columns, with a head's query; a row's sum ends in one lane.
__device__ __forceinline__ void absorb(const OneToken& p, Ring& ring, const Tagged* q, Tagged* q_latent,
                                       unsigned round, int index, int lane) {
  constexpr int kPerHead = kRank / kUkRows;
  const int head = index / kPerHead, first = index % kPerHead * kUkRows;
  const int lanes = p.nope / 8, rows = 32 / lanes;  // lanes of a row, rows read at a time
  const int column = lane % lanes * 8;
  const uint4 v = await_8(q + head * (p.nope + kRope) + column, round);
  const float x[8] = {low(v.x), high(v.x), low(v.y), high(v.y), low(v.z), high(v.z), low(v.w), high(v.w)};
  const std::uint8_t* const piece = ring.piece(0);
  Tagged* const to = q_latent + head * kKey + first + lane / lanes;
#pragma unroll 2
  for (int row = 0; row < kUkRows; row += rows) {
    float a[2] = {};
    Ring::dot8(*reinterpret_cast<const uint4*>(piece + row * p.nope * 2 + lane * 16), x, a);
    float sum = a[0] + a[1];
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane % lanes == 0) store_tagged(to + row, __float2bfloat16(sum), round);
  }
  ring.release(1);
}

/// The CTA's rows of W_UV times the latent of its head.
__device__ __forceinline__ void expand(const OneToken& p, Ring& ring, const Share& share,
                                       const float (&latent)[2][kRank], Tagged* attended, unsigned round) {
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int at = i / 8 * 256 + share.lane * 8 + i % 8;
    x[i] = __bfloat162float(__float2bfloat16(latent[0][at] + latent[1][at]));
  }
  const int count = share.of_cta((share.uv_rows + kUvRows - 1) / kUvRows);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int first = (share.warp + i * kWarps) * kUvRows, rows = min(kUvRows, share.uv_rows - first);
    const std::uint8_t* const piece = ring.piece(0);
    float sums[kUvRows];
#pragma unroll
    for (int r = 0; r < kUvRows; ++r) {
      float a[2] = {};
      if (r < rows) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          Ring::dot8(*reinterpret_cast<const uint4*>(piece + r * kRank * 2 + j * 512 + share.lane * 16),
                     x + j * 8, a);
        }
      }
      sums[r] = warp_total(a[0] + a[1]);
    }
    ring.release(1);
    if (share.lane < rows) {
      store_tagged(attended + share.uv_head * p.v + share.uv_first + first + share.lane,
                   __float2bfloat16(share.lane == 0 ? sums[0] : sums[1]), round);
    }
  }
}

/// One of the router's rows, float32, times h.
__device__ __forceinline__ float route_row(const OneToken& p, Ring& ring, const bf16* x, int lane) {
  float sum = 0;
#pragma unroll 1
  for (int part = 0; part < p.hidden; part += kRouterColumns) {
    const std::uint8_t* const piece = ring.piece(0);
    const int columns = min(kRouterColumns, p.hidden - part);
#pragma unroll 2
    for (int at = lane * 4; at < columns; at += 128) {
      const float4 w = *reinterpret_cast<const float4*>(piece + at * 4);
      const uint2 v = *reinterpret_cast<const uint2*>(x + part + at);
      sum += w.x * low(v.x) + w.y * high(v.x) + (w.z * low(v.y) + w.w * high(v.y));
    }
    ring.release(1);
  }
  return warp_total(sum);
}

/// By one warp.
__device__ __forceinline__ void choose(const OneToken& p, const OneTokenLayer& l, float* logits,
                                       Choice& choice, float (&scratch)[2][8 * 32]) {
  RouteArgs a;
  a.correction = l.correction;
  a.logits = logits;
  a.ids = choice.ids;
  a.weights = choice.weights;
  a.routing = p.routing;
  if (p.routing.num_experts <= 64) {
    choice::choose_token<2>(a, 0, scratch[0], scratch[1]);
  } else {
    choice::choose_token<8>(a, 0, scratch[0], scratch[1]);
  }
}

/// One lane for each ring: eight lanes of one warp would stand in each other's way.
__device__ __forceinline__ void fill_rings(const OneToken& p, Smem& s, int filler, int lane) {
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

/// By one warp of every CTA, while the others are at the shared experts: the choice of each mixture layer.
__device__ __forceinline__ void choose_experts(const OneToken& p, Smem& s, int lane) {
  Exchange& e = *static_cast<Exchange*>(p.workspace);
  const Share share(p, 0);
  const KeyRange keys(__ldg(p.len), share.cta, share.ctas);
  Barrier grid(&e.counter);
  for (int layer = 0; layer < p.num_layers; ++layer) {
    const OneTokenLayer& l = p.layers[layer];
    grid.expect(keys.splits);
    if (l.router != nullptr) {
      grid.wait_in_warp();  // until the memory has little to do: the rings are full
      prefetch_down(p, l, share);
      grid.expect(router_ctas(p));
      grid.wait_in_warp();
      choose(p, l, e.logits, s.choice, s.attention.routing);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&s.chosen);
      if (share.cta == 0 && lane < p.routing.experts_per_token + p.routing.shared_experts) {
        l.ids[lane] = s.choice.ids[lane];
        if (l.counts != nullptr && lane < p.routing.experts_per_token)
          atomicAdd(l.counts + s.choice.ids[lane], 1ull);
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
__device__ __forceinline__ void run_layers(const OneToken& p, Smem& s, int warp, int lane) {
  Exchange& e = *static_cast<Exchange*>(p.workspace);
  bf16* const x = static_cast<bf16*>(p.x);
  const Share share(p, warp);
  Ring ring(s.ring, s.rings, warp, lane);
  const int slices = dense_slices(p.intermediate);
  const unsigned ctas = gridDim.x;
  Barrier grid(&e.counter);
  Attention attention(p, share, s.attention, s.scratch);
  const unsigned before = __ldcg(&e.rounds);

  const bf16* const v = s.scratch.vector.x;  // the phase's vector
  float sums[2];
  NormWeights norm;
  int mixtures = 0;  // of the layers before
#pragma unroll 1
  for (int layer = 0; layer < p.num_layers; ++layer) {
    const OneTokenLayer& l = p.layers[layer];
    const bool mixture = l.router != nullptr;
    const Ffn ffn = ffn_of(p, mixture, slices);
    bf16* const cache = static_cast<bf16*>(l.cache);
    const unsigned round = (before + layer + 1) & 0xFFFF;

    if (warp == 7) attention.prefetch(cache);
    norm.load(l.input_norm, p.hidden);
    share_normalised(norm, p.eps, p.hidden, s.scratch.vector, [&](int i) {
      return layer == 0 ? load8(x + i) : await_8(e.x_layer + i, (round - 1) & 0xFFFF);
    });
    const int qkv_rows = share.of(p.heads * (p.nope + kRope) + kKey);
#pragma unroll 1
    for (int i = 0; i < qkv_rows; i += 2) {
      const int count = min(2, qkv_rows - i);
      ring.multiply(count, p.hidden, v, sums);
      if (lane < count) {
        store_tagged(e.qkv + share.index + (i + lane) * share.stride,
                     __float2bfloat16(lane == 0 ? sums[0] : sums[1]), round);
      }
    }

    if (warp == 7 && share.cta == share.ctas - 1) {
      append_key(p, l, e.qkv + p.heads * (p.nope + kRope), e.own_key, round, lane);
    }
    const int uk_pieces = share.of(p.heads * (kRank / kUkRows));
#pragma unroll 1
    for (int i = 0; i < uk_pieces; ++i) {
      absorb(p, ring, e.qkv, e.q_latent, round, share.index + i * share.stride, lane);
    }
    if (warp == 6) {
      for (int head = share.cta; head < p.heads; head += share.ctas) {
        rotate_query(p, e.qkv, e.q_latent, round, head, lane);
      }
    }

    if (attention.has_keys()) {
      attention.run(e.q_latent, e.own_key, round, cache, e.out + std::int64_t(share.cta) * kHeads * kRank,
                    e.stats + share.cta * kHeads);
    }
    grid.arrive(attention.splits(), attention.has_keys());

    if (share.uv_rows > 0) {
      grid.wait();
      combine_splits(e.out, e.stats, attention.splits(), share.uv_head, share, s.scratch.latent);
      sync_warps();
      expand(p, ring, share, s.scratch.latent, e.attended, round);
    }

    share_vector(p.heads * p.v, s.scratch.vector, [&](int i) { return await_8(e.attended + i, round); });
    const int o_rows = share.of(p.hidden);
#pragma unroll 1
    for (int i = 0; i < o_rows; i += 2) {
      const int count = min(2, o_rows - i), row = share.index + (i + lane) * share.stride;
      const float residual = lane >= count ? 0.0f
                             : layer == 0  ? load1(x + row)
                                           : load_tagged(e.x_layer + row);
      ring.multiply(count, p.heads * p.v, v, sums);
      if (lane < count) {
        store_tagged(e.x_attended + row, __float2bfloat16(residual + (lane == 0 ? sums[0] : sums[1])), round);
      }
    }

    norm.load(l.post_attention_norm, p.hidden);
    share_normalised(norm, p.eps, p.hidden, s.scratch.vector,
                     [&](int i) { return await_8(e.x_attended + i, round); });
    if (mixture) {
#pragma unroll 1
      for (int row = share.index; row < p.routing.num_experts; row += share.stride) {
        const float logit = route_row(p, ring, v, lane);
        if (lane == 0) e.logits[row] = logit;
      }
      grid.arrive(router_ctas(p), share.cta < p.routing.num_experts);
    }
    const int shared = ffn.shared * ffn.width, routed = (ffn.slots - ffn.shared) * ffn.width;
    int pair = share.begin_of(shared);
#pragma unroll 1
    for (int left = share.end_of(shared) - pair, lists = 2; lists > 0;) {
      if (left == 0) {
        pair = shared + share.begin_of(routed);
        left = shared + share.end_of(routed) - pair;
        --lists;
        continue;
      }
      ring.multiply(2, p.hidden, v, sums);
      if (lane == 0) e.act[pair] = __float2bfloat16(silu(sums[0]) * sums[1]);
      ++pair;
      --left;
    }
    if (mixture) ptx::mbarrier_wait(&s.chosen, mixtures++ & 1);
    grid.arrive(ctas);
    grid.wait();

    const int end = share.down_begin(ffn.slots, warp + 1);
#pragma unroll 1
    for (int at = share.down_begin(ffn.slots, warp), loaded = -1; at < end;) {
      const int slot = at / share.down_rows, row = at - slot * share.down_rows;
      if (slot != loaded) load_vector(e.act + slot * ffn.width, ffn.width, lane, s.attention.act[warp]);
      loaded = slot;
      const int count = min(2, min(end - at, share.down_rows - row));
      ring.multiply(count, ffn.width, s.attention.act[warp], sums);
      if (lane < count) s.scratch.down[slot][row + lane] = lane == 0 ? sums[0] : sums[1];
      at += count;
    }
    ptx::fence_async_proxy();  // keys come by the copy engine to where the activations were
    sync_warps();
    if (threadIdx.x < share.down_rows) {
      const int row = share.down_first + static_cast<int>(threadIdx.x);
      float total = load_tagged(e.x_attended + row);
      for (int slot = 0; slot < ffn.slots; ++slot) {
        const float weight = slot < ffn.shared ? 1.0f : s.choice.weights[slot - ffn.shared];
        total = fmaf(weight, s.scratch.down[slot][threadIdx.x], total);
      }
      store_tagged(e.x_layer + row, __float2bfloat16(total), round);
      if (layer + 1 == p.num_layers) x[row] = __float2bfloat16(total);
    }
  }
  if (grid.finish()) e.rounds = before + p.num_layers;
}

__global__ void __launch_bounds__(kThreads + kFillThreads, 1)
    one_token_kernel(const __grid_constant__ OneToken p) {
  extern __shared__ __align__(128) std::uint8_t dynamic_smem[];
  Smem& s = *reinterpret_cast<Smem*>(dynamic_smem);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;

  if (threadIdx.x < kWarps * kDepth) {
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
  return p.num_layers > 0 && p.x != nullptr && p.workspace != nullptr && p.cosines != nullptr &&
         p.sines != nullptr && p.slot != nullptr && p.len != nullptr && p.table != nullptr;
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

std::size_t one_token_workspace_size() { return sizeof(Exchange); }

cudaError_t one_token(const OneToken& p, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  int num_sms = 0;
  if (const cudaError_t e = multiprocessors(num_sms)) return e;
  if (!fits_device(num_sms, p.heads, p.hidden)) return cudaErrorInvalidValue;
  if (const cudaError_t e = allow_shared_memory<one_token_kernel::one_token_kernel>(sizeof(Smem))) return e;
  LaunchConfig config(static_cast<unsigned>(num_sms), kThreads + kFillThreads, sizeof(Smem), stream);
  return launch(config.cooperative(), one_token_kernel::one_token_kernel, p);
}

}  // namespace flash_mla::sm90
