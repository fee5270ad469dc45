// Plain kernels behind skinny_gemm.h and moe.h.

#include <cuda_bf16.h>

#include <cmath>

#include "model/cuda/moe.h"
#include "model/cuda/skinny_gemm.h"

namespace flash_mla::model::cuda {
namespace {
using bf16 = __nv_bfloat16;

__device__ float sum32(float x) {
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(~0u, x, o);
  return x;
}
template <class W>
__device__ float warp_dot(const bf16* x, const W* w, std::int64_t k) {
  float s = 0;
  for (std::int64_t i = threadIdx.x; i < k; i += 32) s += __bfloat162float(x[i]) * static_cast<float>(w[i]);
  return sum32(s);
}
__device__ float gate(float g, float u) { return g / (1 + expf(-g)) * u; }

template <class W>
__global__ void gemm_kernel(SkinnyGemm a) {
  const std::int64_t n = blockIdx.x, m = blockIdx.y;
  const bf16* x = static_cast<const bf16*>(a.x) + m * a.x_stride;
  const W* w = static_cast<const W*>(a.weight);
  float v = warp_dot(x, w + n * a.k, a.k);
  if (a.bias) v += a.bias[n];
  if (a.silu_mul) {
    float u = warp_dot(x, w + (n + a.n / 2) * a.k, a.k);
    if (a.bias) u += a.bias[n + a.n / 2];
    v = gate(v, u);
  }
  if (threadIdx.x) return;
  const std::int64_t at = m * a.out_stride + n;
  if (a.out_fp32) {
    float* o = static_cast<float*>(a.out);
    o[at] = v + (a.accumulate ? o[at] : 0);
  } else {
    bf16* o = static_cast<bf16*>(a.out);
    o[at] = __float2bfloat16(v + (a.accumulate ? __bfloat162float(o[at]) : 0.0f));
  }
}

__global__ void choose_kernel(RouteArgs a) {
  const std::int64_t t = blockIdx.x;
  extern __shared__ float sh[];
  float *score = sh, *choice = sh + a.num_experts;
  const float* l = a.logits + t * a.num_experts;
  float hi = -INFINITY, sum = 0;
  for (int e = 0; e < a.num_experts; ++e) hi = fmaxf(hi, l[e]);
  for (int e = 0; e < a.num_experts; ++e) {
    score[e] = a.scoring == ScoringFunc::kSigmoid ? 1 / (1 + expf(-l[e])) : expf(l[e] - hi);
    sum += score[e];
  }
  for (int e = 0; e < a.num_experts; ++e) {
    if (a.scoring == ScoringFunc::kSoftmax) score[e] /= sum;
    choice[e] = score[e] + (a.correction ? a.correction[e] : 0);
  }
  if (a.method != TopkMethod::kGreedy) {
    const int size = a.num_experts / a.num_groups;
    unsigned kept = 0;
    for (int k = 0; k < a.groups_kept; ++k) {
      int best = -1;
      float bv = -INFINITY;
      for (int g = 0; g < a.num_groups; ++g) {
        if (kept >> g & 1) continue;
        float f = -INFINITY, s = -INFINITY;
        for (int e = g * size; e < (g + 1) * size; ++e) {
          if (choice[e] > f) {
            s = f;
            f = choice[e];
          } else {
            s = fmaxf(s, choice[e]);
          }
        }
        const float v = a.method == TopkMethod::kNoAuxTc ? f + s : f;
        if (best < 0 || v > bv) {
          best = g;
          bv = v;
        }
      }
      kept |= 1u << best;
    }
    for (int e = 0; e < a.num_experts; ++e)
      if (!(kept >> (e / size) & 1)) choice[e] = -INFINITY;
  }
  float total = 0;
  for (int k = 0; k < a.experts_per_token; ++k) {
    int best = 0;
    for (int e = 1; e < a.num_experts; ++e)
      if (choice[e] > choice[best]) best = e;
    a.ids[t * a.experts_per_token + k] = best;
    a.weights[t * a.experts_per_token + k] = score[best];
    total += score[best];
    choice[best] = -INFINITY;
  }
  for (int k = 0; k < a.experts_per_token; ++k) {
    float& w = a.weights[t * a.experts_per_token + k];
    w = (a.normalise ? w / (total + 1e-20f) : w) * a.scale;
  }
}

__global__ void gate_up_kernel(ExpertFfn a) {
  const std::int64_t pair = blockIdx.y, n = blockIdx.x, t = pair / a.experts_per_token;
  const bf16* x = static_cast<const bf16*>(a.x) + t * a.x_stride;
  const bf16* w = static_cast<const bf16*>(a.gate_up) + a.ids[pair] * 2 * a.intermediate * a.hidden;
  const float g = warp_dot(x, w + n * a.hidden, a.hidden);
  const float u = warp_dot(x, w + (n + a.intermediate) * a.hidden, a.hidden);
  if (threadIdx.x == 0)
    static_cast<bf16*>(a.workspace)[pair * a.intermediate + n] = __float2bfloat16(gate(g, u));
}
__global__ void down_kernel(ExpertFfn a) {
  const std::int64_t t = blockIdx.y, n = blockIdx.x;
  bf16* out = static_cast<bf16*>(a.inout) + t * a.inout_stride + n;
  float s = __bfloat162float(*out);
  for (int k = 0; k < a.experts_per_token; ++k) {
    const std::int64_t pair = t * a.experts_per_token + k;
    const bf16* w = static_cast<const bf16*>(a.down) + (a.ids[pair] * a.hidden + n) * a.intermediate;
    s += a.weights[pair] *
         warp_dot(static_cast<const bf16*>(a.workspace) + pair * a.intermediate, w, a.intermediate);
  }
  if (threadIdx.x == 0) *out = __float2bfloat16(s);
}
dim3 grid(std::int64_t x, std::int64_t y) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); }
}  // namespace

cudaError_t skinny_gemm(const SkinnyGemm& a, cudaStream_t s) {
  const dim3 g = grid(a.silu_mul ? a.n / 2 : a.n, a.m);
  if (a.weight_fp32) {
    gemm_kernel<float><<<g, 32, 0, s>>>(a);
  } else {
    gemm_kernel<bf16><<<g, 32, 0, s>>>(a);
  }
  return cudaGetLastError();
}
cudaError_t choose_experts(const RouteArgs& a, cudaStream_t s) {
  choose_kernel<<<static_cast<unsigned>(a.tokens), 1, static_cast<std::size_t>(a.num_experts) * 8, s>>>(a);
  return cudaGetLastError();
}
cudaError_t route(const RouteArgs& a, cudaStream_t s) {
  SkinnyGemm g;
  g.x = a.x;
  g.x_stride = a.x_stride;
  g.weight = a.router;
  g.weight_fp32 = true;
  g.out = a.logits;
  g.out_fp32 = true;
  g.m = a.tokens;
  g.k = a.hidden;
  g.n = g.out_stride = a.num_experts;
  skinny_gemm(g, s);
  return choose_experts(a, s);
}
std::size_t expert_ffn_workspace_size(std::int64_t tokens, std::int64_t, std::int64_t intermediate, int,
                                      int k) {
  return static_cast<std::size_t>(tokens * intermediate * k) * 2;
}
cudaError_t expert_ffn(const ExpertFfn& a, cudaStream_t s) {
  gate_up_kernel<<<grid(a.intermediate, a.tokens * a.experts_per_token), 32, 0, s>>>(a);
  down_kernel<<<grid(a.hidden, a.tokens), 32, 0, s>>>(a);
  return cudaGetLastError();
}
}  // namespace flash_mla::model::cuda
