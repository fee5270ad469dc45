#pragma once

#include "kernels/moe/sm90/moe.h"

namespace flash_mla::sm90 {

/// A norm and the routing of its result in one kernel, for few tokens: what rms_norm() and route() do.
struct NormAndRoute {
  RouteArgs route;           ///< x is where the normalised rows go; logits as there
  const void* in = nullptr;  ///< (tokens, hidden) bfloat16
  std::int64_t in_stride = 0;
  const float* norm = nullptr;
  float eps = 0;
};

/// Whether norm_and_route() takes this: aligned rows, at most 64 tokens, a router small enough that every
/// token can read it anew, and not batch_invariant (many tokens take another kernel with other rounding).
bool fits_norm_and_route(const NormAndRoute& args);
void norm_and_route(const NormAndRoute& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
