#include <algorithm>
#include <cmath>
#include <limits>

#include "base/parallel.h"
#include "base/philox.h"
#include "kernels/sampling/call.h"
#include "kernels/sampling/cpu/draw.h"
#include "kernels/sampling/cpu/floats.h"

namespace flash_mla::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

/// What a thread works in.
struct Workspace {
  DrawScratch draw;
  std::vector<float> row, other;
};
Workspace& workspace() {
  thread_local Workspace w;
  return w;
}

/// The first of the largest, or -1 where no token is possible: `least` is the score of one that is not.
std::int32_t likeliest(std::span<const float> scores, float least) {
  std::int32_t best = -1;
  float largest = least;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] > largest) {
      largest = scores[i];
      best = static_cast<std::int32_t>(i);
    }
  }
  return best;
}

Draw draw_for(double u, const RowLimits& limits, std::size_t vocab_size) {
  const auto top_k = std::min(limits.top_k, static_cast<std::int64_t>(vocab_size));
  return make_draw(u, limits.temperature, static_cast<int>(top_k), limits.top_p, limits.min_p);
}

/// Weights of a row; their sum.
std::uint64_t weigh_scores(std::span<const float> scores, float largest, bool probabilities, const Draw& draw,
                           DrawScratch& scratch) {
  return probabilities ? weigh_probabilities(scores, largest, draw, scratch)
                       : weigh_logits(scores, largest, draw, scratch);
}

/// Writes scores of tokens in `kept`, in the order of ids, over `divisor`, and `other` for those between them.
void write_kept(std::span<const float> scores, std::span<const std::int32_t> kept, double divisor,
                float other, const TensorView& out, std::int64_t row) {
  visit_float_type(out.dtype, [&](auto element) {
    using T = decltype(element);
    T* to = out.ptr<T>() + row * out.stride(0);
    const T none = from_double<T>(static_cast<double>(other));
    std::size_t next = 0;
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const bool stays = next < kept.size() && static_cast<std::size_t>(kept[next]) == i;
      if (stays) ++next;
      // Nothing is divided by 1: a logit keeps its bits.
      to[i] = stays ? from_double<T>(static_cast<double>(scores[i]) / divisor) : none;
    }
  });
}

}  // namespace

void sample_tokens(const SampleArgs& args, const SamplingOptions& options, int num_threads) {
  const std::int64_t vocab = args.scores.size(1);
  parallel_for(args.tokens.size(0), num_threads, [&](std::int64_t i) {
    Workspace& w = workspace();
    const std::int64_t row = args.rows.defined() ? integer_at(args.rows, i) : i;
    const std::span<const float> scores = floats(args.scores, row * args.scores.stride(0), vocab, w.row);
    const RowLimits limits = limits_of(args.options, options, row);
    std::int32_t token = likeliest(scores, options.probabilities ? 0.0f : -kInf);
    if (args.valid.defined()) args.valid.ptr<std::uint8_t>()[i * args.valid.stride(0)] = token >= 0 ? 1 : 0;
    if (token >= 0 && limits.temperature > 0) {
      const KeyOfDraw key = key_of(args.keys, options, i);
      const Draw draw = draw_for(uniform(key.seed, key.index, key.position), limits, scores.size());
      const std::uint64_t total =
          weigh_scores(scores, scores[static_cast<std::size_t>(token)], options.probabilities, draw, w.draw);
      token = draw_weighed(scores, draw, total, options.joint, w.draw);
    }
    put_integer(args.tokens, i * args.tokens.stride(0), token);
  });
}

void filter_tokens(const TensorView& scores_tensor, const SamplingRows& rows, const TensorView& out,
                   const SamplingOptions& options, int num_threads) {
  const std::int64_t vocab = scores_tensor.size(1);
  const float least = options.probabilities ? 0.0f : -kInf;
  parallel_for(scores_tensor.size(0), num_threads, [&](std::int64_t row) {
    Workspace& w = workspace();
    const std::span<const float> scores = floats(scores_tensor, row * scores_tensor.stride(0), vocab, w.row);
    const RowLimits limits = limits_of(rows, options, row);
    const std::int32_t best = likeliest(scores, least);
    std::vector<std::int32_t>& kept = w.draw.candidates;
    if (limits.temperature == 0) {
      kept.assign(1, best);
    } else {
      const Draw draw = draw_for(0, limits, scores.size());
      std::uint64_t total = 1;
      if (limits.top_p < 1 || limits.min_p > 0) {
        total =
            weigh_scores(scores, scores[static_cast<std::size_t>(best)], options.probabilities, draw, w.draw);
      } else {
        // No weight decides: tokens stay that are too unlikely to be drawn.
        w.draw.weights.assign(scores.size(), 0);
        for (std::size_t i = 0; i < scores.size(); ++i) w.draw.weights[i] = scores[i] > least ? 1 : 0;
      }
      keep_likeliest(scores, draw, total, options.joint, w.draw);
    }
    double sum = 1;
    if (options.probabilities) {
      sum = 0;
      for (const std::int32_t token : kept)
        sum += static_cast<double>(scores[static_cast<std::size_t>(token)]);
    }
    write_kept(scores, kept, sum, least, out, row);
  });
}

void token_probabilities(const TensorView& logits_tensor, const SamplingRows& rows, const TensorView& out,
                         const SamplingOptions& options, int num_threads) {
  const std::int64_t vocab = logits_tensor.size(1);
  parallel_for(logits_tensor.size(0), num_threads, [&](std::int64_t row) {
    Workspace& w = workspace();
    const std::span<const float> logits = floats(logits_tensor, row * logits_tensor.stride(0), vocab, w.row);
    const double temperature = limits_of(rows, options, row).temperature;
    const std::int32_t best = likeliest(logits, -kInf);
    const float largest = logits[static_cast<std::size_t>(best)];
    w.other.resize(logits.size());
    double sum = 0;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      const double below = static_cast<double>(logits[i]) - static_cast<double>(largest);
      if (temperature > 0) {
        w.other[i] = static_cast<float>(std::exp(below / temperature));
      } else {
        w.other[i] = static_cast<std::int32_t>(i) == best ? 1.0f : 0.0f;
      }
      sum += static_cast<double>(w.other[i]);
    }
    visit_float_type(out.dtype, [&](auto element) {
      using T = decltype(element);
      T* to = out.ptr<T>() + row * out.stride(0);
      for (std::size_t i = 0; i < logits.size(); ++i) {
        to[i] = from_double<T>(static_cast<double>(w.other[i]) / sum);
      }
    });
  });
}

}  // namespace flash_mla::cpu
