#pragma once

// A call of dense decode as the kernels take it, but for the cache: what dense decode over FP8 caches has in common with
// it. Implemented by dense_decode.cpp. Of a.k_cache only the shape counts, (pages, page_size, latent heads, whatever).

#include <cstddef>

#include "flash_mla/decode.h"
#include "flash_mla/schedule.h"
#include "kernels/attention/dense_decode/sm90/params.h"
#include "kernels/attention/dense_decode/sm90/plan.h"

namespace flash_mla::sm90 {

/// Rows of partial results: those of 2 * num_parts slots, or with fixed split points of every split that the
/// block table has room for.
struct PartialLayout {
  std::size_t out_bytes, stats_bytes;
};
PartialLayout partial_layout(const DenseDecodeArgs& a, const DecodeScheduleView& s);

/// Throws Unsupported or InvalidArgument for what no kernel here takes: too much work, a schedule that is not theirs,
/// strides of q and out.
void check_work(const DenseDecodeArgs& a, const DecodeScheduleView& s);

/// All but the boxes of the copy engine.
DecodeParams decode_params(const DenseDecodeArgs& a, const DecodeScheduleView& s, void* workspace,
                           float softmax_scale, bool causal);
DecodePlan plan_of(const DenseDecodeArgs& a, const DecodeParams& p);

}  // namespace flash_mla::sm90
