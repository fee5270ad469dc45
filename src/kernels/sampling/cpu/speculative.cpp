#include <algorithm>

#include "base/parallel.h"
#include "base/philox.h"
#include "kernels/sampling/call.h"
#include "kernels/sampling/cpu/draw.h"
#include "kernels/sampling/cpu/floats.h"

namespace flash_mla::cpu {
namespace {

double element(const TensorView& t, std::int64_t at) {
  return visit_float_type(
      t.dtype, [&](auto e) { return static_cast<double>(to_float(t.ptr<const decltype(e)>()[at])); });
}

struct Workspace {
  DrawScratch draw;
  std::vector<float> target, draft, rest;
};

/// A token of the probabilities, which are not all 0.
std::int32_t draw_from(std::span<const float> probabilities, double u, DrawScratch& scratch) {
  Draw draw;
  draw.u = u;
  const std::uint64_t total =
      weigh_probabilities(probabilities, *std::ranges::max_element(probabilities), draw, scratch);
  return draw_weighed(probabilities, draw, total, /*joint=*/false, scratch);
}

}  // namespace

void speculative_sampling(const SpeculativeArgs& a, const SamplingOptions& options, int num_threads) {
  const std::int64_t n = a.draft_probs.size(1), vocab = a.draft_probs.size(2);
  const auto at = [](const TensorView& t, std::int64_t chain, std::int64_t i) {
    return chain * t.stride(0) + i * t.stride(1);
  };
  parallel_for(a.draft_probs.size(0), num_threads, [&](std::int64_t chain) {
    thread_local Workspace w;
    const KeyOfDraw key = key_of(a.keys, options, chain);
    const auto u = [&](std::int64_t i, std::uint32_t use) {
      return uniform(key.seed, key.index, key.position + static_cast<std::uint64_t>(i), use);
    };
    std::int64_t emitted = n, accepted = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t where = at(a.draft_tokens, chain, i);
      const std::int64_t token = a.draft_tokens.dtype == DType::kInt64
                                     ? a.draft_tokens.ptr<const std::int64_t>()[where]
                                     : a.draft_tokens.ptr<const std::int32_t>()[where];
      const double p = element(a.draft_probs, at(a.draft_probs, chain, i) + token),
                   q = element(a.target_probs, at(a.target_probs, chain, i) + token);
      const bool accept = u(i, 0) * p < q;
      accepted += accept ? 1 : 0;
      if (!accept) emitted = std::min(emitted, i);
      if (i < emitted) put_integer(a.tokens, at(a.tokens, chain, i), token);
    }
    std::span<const float> from = floats(a.target_probs, at(a.target_probs, chain, emitted), vocab, w.target);
    if (emitted < n) {
      const std::span<const float> draft =
          floats(a.draft_probs, at(a.draft_probs, chain, emitted), vocab, w.draft);
      w.rest.resize(from.size());
      bool any = false;
      for (std::size_t i = 0; i < from.size(); ++i) {
        w.rest[i] = std::max(from[i] - draft[i], 0.0f);
        any |= w.rest[i] > 0;
      }
      // Nothing is left where both are one distribution but for rounding: then it is the target's.
      if (any) from = w.rest;
    }
    const std::int32_t last = draw_from(from, u(emitted, emitted < n ? kReplacesDraft : 0), w.draw);
    put_integer(a.tokens, at(a.tokens, chain, emitted), last);
    for (std::int64_t i = emitted + 1; i <= n; ++i) put_integer(a.tokens, at(a.tokens, chain, i), -1);
    const auto tell = [&](const TensorView& t, std::int64_t count) {
      if (t.defined()) t.ptr<std::int32_t>()[chain * t.stride(0)] = static_cast<std::int32_t>(count);
    };
    tell(a.accepted, accepted);
    tell(a.emitted, emitted);
  });
}

}  // namespace flash_mla::cpu
