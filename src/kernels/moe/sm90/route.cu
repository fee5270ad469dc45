// The router's product (skinny_gemm.h) and the choice of experts behind it (choose.cu).

#include "kernels/gemm/sm90/skinny_gemm.h"
#include "kernels/moe/sm90/choose.cuh"
#include "kernels/moe/sm90/moe.h"

namespace flash_mla::sm90 {

cudaError_t route(const RouteArgs& p, cudaStream_t stream) {
  if (!choice::valid(p)) return cudaErrorInvalidValue;
  SkinnyGemm logits;
  logits.x = p.x;
  logits.x_stride = p.x_stride;
  logits.weight = p.router;
  logits.out = p.logits;
  logits.out_stride = p.routing.num_experts;
  logits.m = p.tokens;
  logits.n = p.routing.num_experts;
  logits.k = p.hidden;
  logits.out_fp32 = logits.weight_fp32 = true;
  logits.batch_invariant = p.batch_invariant;
  logits.programmatic_launch = p.programmatic_launch;
  if (const cudaError_t e = skinny_gemm(logits, stream)) return e;
  return choose_experts(p, stream);
}

}  // namespace flash_mla::sm90
