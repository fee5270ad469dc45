#include "sampling_bindings.h"

#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>
#include <utility>

#include "arguments.h"
#include "flash_mla/routing.h"
#include "flash_mla/sampling.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

/// What the calls share, as the package passes it: numbers that no tensor has.
SamplingOptions options_of(const nb::dict& given) {
  SamplingOptions o;
  o.probabilities = nb::cast<bool>(given["probabilities"]);
  o.temperature = nb::cast<double>(given["temperature"]);
  o.top_k = nb::cast<std::int64_t>(given["top_k"]);
  o.top_p = nb::cast<double>(given["top_p"]);
  o.min_p = nb::cast<double>(given["min_p"]);
  o.joint = nb::cast<bool>(given["joint"]);
  o.seed = nb::cast<std::uint64_t>(given["seed"]);
  o.position = nb::cast<std::uint64_t>(given["position"]);
  o.num_threads = int_argument(given["num_threads"], "num_threads", 0);
  o.stream = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(given["stream"]));
  return o;
}

SamplingRows rows_of(Tensors& t) { return {t("temperature"), t("top_k"), t("top_p"), t("min_p")}; }
DrawKeys keys_of(Tensors& t) { return {t("seeds"), t("indices"), t("positions")}; }

void py_sample_tokens(nb::dict tensors, const nb::dict& options) {
  Tensors t(std::move(tensors));
  SampleArgs args;
  args.scores = t("scores");
  args.rows = t("rows");
  args.options = rows_of(t);
  args.keys = keys_of(t);
  args.tokens = t("tokens");
  args.valid = t("valid");
  const SamplingOptions o = options_of(options);
  nb::gil_scoped_release release;
  sample_tokens(args, o);
}

void py_filter_tokens(nb::dict tensors, const nb::dict& options) {
  Tensors t(std::move(tensors));
  const TensorView scores = t("scores"), out = t("out");
  const SamplingRows rows = rows_of(t);
  const SamplingOptions o = options_of(options);
  nb::gil_scoped_release release;
  filter_tokens(scores, rows, out, o);
}

void py_token_probabilities(nb::dict tensors, const nb::dict& options) {
  Tensors t(std::move(tensors));
  const TensorView logits = t("logits"), out = t("out");
  const SamplingRows rows = rows_of(t);
  const SamplingOptions o = options_of(options);
  nb::gil_scoped_release release;
  token_probabilities(logits, rows, out, o);
}

void py_speculative_sampling(nb::dict tensors, const nb::dict& options) {
  Tensors t(std::move(tensors));
  SpeculativeArgs args;
  args.draft_probs = t("draft_probs");
  args.draft_tokens = t("draft_tokens");
  args.target_probs = t("target_probs");
  args.keys = keys_of(t);
  args.tokens = t("tokens");
  args.accepted = t("accepted");
  args.emitted = t("emitted");
  const SamplingOptions o = options_of(options);
  nb::gil_scoped_release release;
  speculative_sampling(args, o);
}

void py_choose_experts(nb::dict tensors, const std::string& scores, nb::handle num_groups,
                       nb::handle groups_kept, bool groups_by_best_two, bool normalise, double scale,
                       nb::handle num_threads, std::uintptr_t stream) {
  RoutingOptions o;
  if (scores == "softmax") {
    o.scores = ExpertScores::kSoftmax;
  } else if (scores == "sigmoid") {
    o.scores = ExpertScores::kSigmoid;
  } else {
    throw InvalidArgument("scores is '" + scores + "', expected 'softmax' or 'sigmoid'");
  }
  o.num_groups = int_argument(num_groups, "num_groups", 1);
  o.groups_kept = int_argument(groups_kept, "groups_kept", 1);
  o.groups_by_best_two = groups_by_best_two;
  o.normalise = normalise;
  o.scale = static_cast<float>(scale);
  o.num_threads = int_argument(num_threads, "num_threads", 0);
  o.stream = reinterpret_cast<void*>(stream);
  Tensors t(std::move(tensors));
  const RoutingArgs args{t("logits"), t("bias"), t("ids"), t("weights")};
  nb::gil_scoped_release release;
  choose_experts(args, o);
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("sample_tokens", &py_sample_tokens, "tensors"_a, "options"_a);
  m.def("filter_tokens", &py_filter_tokens, "tensors"_a, "options"_a);
  m.def("token_probabilities", &py_token_probabilities, "tensors"_a, "options"_a);
  m.def("speculative_sampling", &py_speculative_sampling, "tensors"_a, "options"_a);
  m.def("choose_experts", &py_choose_experts, "tensors"_a, "scores"_a, "num_groups"_a.none(),
        "groups_kept"_a.none(), "groups_by_best_two"_a, "normalise"_a, "scale"_a, "num_threads"_a.none() = 0,
        "stream"_a = 0);
}

}  // namespace flash_mla::python
