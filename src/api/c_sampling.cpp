// The C ABI of choices of tokens and of experts.

#include "flash_mla/c_sampling.h"

#include "api/c_guard.h"
#include "flash_mla/routing.h"
#include "flash_mla/sampling.h"

namespace {

using namespace flash_mla;
using api::guarded;
using api::optional_view;
using api::required;
using api::view;

SamplingOptions options_of(const flash_mla_sampling_options* given) {
  flash_mla_sampling_options o;
  flash_mla_sampling_options_init(&o);
  if (given != nullptr) o = *given;
  SamplingOptions options;
  options.probabilities = o.probabilities != 0;
  options.temperature = o.temperature;
  options.top_k = o.top_k;
  options.top_p = o.top_p;
  options.min_p = o.min_p;
  options.joint = o.joint != 0;
  options.seed = o.seed;
  options.position = o.position;
  options.num_threads = o.num_threads;
  options.stream = o.stream;
  return options;
}

SamplingRows rows_of(const flash_mla_sampling_rows& r) {
  return {optional_view(r.temperature, "temperature"), optional_view(r.top_k, "top_k"),
          optional_view(r.top_p, "top_p"), optional_view(r.min_p, "min_p")};
}
SamplingRows rows_of(const flash_mla_sampling_rows* r) { return r == nullptr ? SamplingRows{} : rows_of(*r); }

DrawKeys keys_of(const flash_mla_draw_keys& k) {
  return {optional_view(k.seeds, "seeds"), optional_view(k.indices, "indices"),
          optional_view(k.positions, "positions")};
}

}  // namespace

void flash_mla_sampling_options_init(flash_mla_sampling_options* options) {
  if (options == nullptr) return;
  const SamplingOptions o;
  *options = {o.temperature, o.top_p, o.min_p, o.top_k, o.seed, o.position, 0, 0, o.num_threads, o.stream};
}

flash_mla_status flash_mla_sample_tokens(const flash_mla_sample_args* args,
                                         const flash_mla_sampling_options* options) {
  return guarded([&] {
    const flash_mla_sample_args& a = required(args, "args");
    SampleArgs sample;
    sample.scores = view(a.scores, "scores");
    sample.rows = optional_view(a.rows, "rows");
    sample.options = rows_of(a.options);
    sample.keys = keys_of(a.keys);
    sample.tokens = view(a.tokens, "tokens");
    sample.valid = optional_view(a.valid, "valid");
    sample_tokens(sample, options_of(options));
  });
}

flash_mla_status flash_mla_filter_tokens(const DLTensor* scores, const flash_mla_sampling_rows* rows,
                                         DLTensor* out, const flash_mla_sampling_options* options) {
  return guarded(
      [&] { filter_tokens(view(scores, "scores"), rows_of(rows), view(out, "out"), options_of(options)); });
}

flash_mla_status flash_mla_token_probabilities(const DLTensor* logits, const flash_mla_sampling_rows* rows,
                                               DLTensor* out, const flash_mla_sampling_options* options) {
  return guarded([&] {
    token_probabilities(view(logits, "logits"), rows_of(rows), view(out, "out"), options_of(options));
  });
}

flash_mla_status flash_mla_speculative_sampling(const flash_mla_speculative_args* args,
                                                const flash_mla_sampling_options* options) {
  return guarded([&] {
    const flash_mla_speculative_args& a = required(args, "args");
    SpeculativeArgs chains;
    chains.draft_probs = view(a.draft_probs, "draft_probs");
    chains.draft_tokens = view(a.draft_tokens, "draft_tokens");
    chains.target_probs = view(a.target_probs, "target_probs");
    chains.keys = keys_of(a.keys);
    chains.tokens = view(a.tokens, "tokens");
    chains.accepted = optional_view(a.accepted, "accepted");
    chains.emitted = optional_view(a.emitted, "emitted");
    speculative_sampling(chains, options_of(options));
  });
}

void flash_mla_routing_options_init(flash_mla_routing_options* options) {
  if (options == nullptr) return;
  const RoutingOptions o;
  *options = {0, o.num_groups, o.groups_kept, 0, 0, o.scale, o.num_threads, nullptr};
}

flash_mla_status flash_mla_choose_experts(const DLTensor* logits, const DLTensor* bias, DLTensor* ids,
                                          DLTensor* weights, const flash_mla_routing_options* options) {
  return guarded([&] {
    flash_mla_routing_options o;
    flash_mla_routing_options_init(&o);
    if (options != nullptr) o = *options;
    RoutingOptions routing;
    routing.scores = o.sigmoid != 0 ? ExpertScores::kSigmoid : ExpertScores::kSoftmax;
    routing.num_groups = o.num_groups;
    routing.groups_kept = o.groups_kept;
    routing.groups_by_best_two = o.groups_by_best_two != 0;
    routing.normalise = o.normalise != 0;
    routing.scale = o.scale;
    routing.num_threads = o.num_threads;
    routing.stream = o.stream;
    choose_experts(
        {view(logits, "logits"), optional_view(bias, "bias"), view(ids, "ids"), view(weights, "weights")},
        routing);
  });
}
