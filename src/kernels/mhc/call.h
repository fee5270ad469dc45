#pragma once

// The public operations on hyper-connections (include/flash_mla/mhc.h) as backends take them: arguments have been checked.

#include "flash_mla/mhc.h"

namespace flash_mla {

struct MhcPostCall {
  TensorView x, residual, post, comb, out;
};

namespace cpu {
void mhc_pre(const TensorView& residual, const MhcWeights& weights, const MhcMixes& mixes,
             const MhcOptions& options, int num_threads);
void mhc_post(const MhcPostCall& call, int num_threads);
void mhc_post_pre(const MhcPostCall& call, const MhcWeights& weights, const MhcMixes& mixes,
                  const MhcOptions& options, int num_threads);
}  // namespace cpu

namespace sm90 {
/// Queued on options.stream. Throw Unsupported where the device is none that this backend runs on.
void mhc_pre(const TensorView& residual, const MhcWeights& weights, const MhcMixes& mixes,
             const MhcOptions& options);
void mhc_post(const MhcPostCall& call, const MhcOptions& options);
void mhc_post_pre(const MhcPostCall& call, const MhcWeights& weights, const MhcMixes& mixes,
                  const MhcOptions& options);
}  // namespace sm90

namespace reference {
void mhc_pre_unchecked(const TensorView& residual, const MhcWeights& weights, const MhcMixes& mixes,
                       const MhcOptions& options);
void mhc_post_unchecked(const MhcPostCall& call);
}  // namespace reference

}  // namespace flash_mla
