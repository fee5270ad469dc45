#include "flash_mla/routing.h"

#include <cmath>
#include <limits>

#include "api/call.h"
#include "base/element.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/moe/choose_call.h"

namespace flash_mla {
namespace {

using api::check_last_dim_contiguous;
using api::check_no_overlap;
using api::check_same_device;
using api::check_size;
using api::check_tensor;

void check_shapes(const RoutingArgs& a) {
  check_tensor(a.logits, "logits", 2, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  check_last_dim_contiguous(a.logits, "logits");
  const std::int64_t experts = a.logits.size(1);
  if (experts < 1 || experts > std::numeric_limits<std::int32_t>::max()) {
    api::invalid("logits.shape[1] (num_experts) is {}, expected 1 to 2147483647", experts);
  }
  if (a.bias.defined()) {
    check_tensor(a.bias, "bias", 1, {DType::kFloat32, a.logits.dtype});
    check_size(a.bias, "bias", 0, experts, "logits.shape[1] (num_experts)");
    check_last_dim_contiguous(a.bias, "bias");
    check_same_device(a.bias, "bias", a.logits, "logits");
  }
  const auto output = [&](const TensorView& t, const char* name) {
    check_size(t, name, 0, a.logits.size(0), "logits.shape[0] (n)");
    check_last_dim_contiguous(t, name);
    check_no_overlap(t, name);
    check_same_device(t, name, a.logits, "logits");
  };
  check_tensor(a.ids, "ids", 2, {DType::kInt32});
  output(a.ids, "ids");
  check_tensor(a.weights, "weights", 2, {DType::kFloat32, a.logits.dtype});
  output(a.weights, "weights");
  check_size(a.weights, "weights", 1, a.ids.size(1), "ids.shape[1] (k)");
}

Routing routing_of(const RoutingArgs& a, const RoutingOptions& o) {
  const std::int64_t experts = a.logits.size(1), k = a.ids.size(1);
  if (static_cast<int>(o.scores) > static_cast<int>(ExpertScores::kSigmoid)) {
    api::invalid("scores is {}, expected one of ExpertScores", static_cast<int>(o.scores));
  }
  if (o.num_groups < 1 || experts % o.num_groups != 0) {
    api::invalid("num_groups is {}, expected a divisor of logits.shape[1] (num_experts) = {}", o.num_groups,
                 experts);
  }
  if (o.groups_kept < 1 || o.groups_kept > o.num_groups) {
    api::invalid("groups_kept is {}, expected 1 to num_groups = {}", o.groups_kept, o.num_groups);
  }
  const std::int64_t size = experts / o.num_groups;
  if (o.groups_by_best_two && o.num_groups > 1 && size < 2) {
    api::invalid(
        "num_groups is {}, expected at least two experts in a group to compare groups by their best two",
        o.num_groups);
  }
  if (k < 1 || k > size * o.groups_kept) {
    api::invalid("ids.shape[1] (k) is {}, expected 1 to {} (experts of the groups that are kept)", k,
                 size * o.groups_kept);
  }
  if (!std::isfinite(o.scale)) api::invalid("scale is {}, expected a finite number", o.scale);
  Routing r;
  r.num_experts = static_cast<int>(experts);
  r.experts_per_token = static_cast<int>(k);
  r.num_groups = o.num_groups;
  r.groups_kept = o.groups_kept;
  r.scoring = o.scores == ExpertScores::kSigmoid ? ScoringFunc::kSigmoid : ScoringFunc::kSoftmax;
  r.method = o.num_groups == 1      ? TopkMethod::kGreedy
             : o.groups_by_best_two ? TopkMethod::kNoAuxTc
                                    : TopkMethod::kGroupLimitedGreedy;
  r.normalise = o.normalise;
  r.scale = o.scale;
  return r;
}

/// Elements of the first `rows` rows, all of a vector's.
void check_finite(const TensorView& t, const char* name) {
  const std::int64_t rows = t.rank == 2 ? t.size(0) : 1, columns = t.size(t.rank - 1);
  visit_float_type(t.dtype, [&](auto element) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto* row = t.ptr<const decltype(element)>() + (t.rank == 2 ? r * t.stride(0) : 0);
      for (std::int64_t c = 0; c < columns; ++c) {
        const auto x = static_cast<double>(to_float(row[c]));
        if (std::isfinite(x)) continue;
        if (t.rank == 2) api::invalid("{}[{}][{}] is {}, expected a finite number", name, r, c, x);
        api::invalid("{}[{}] is {}, expected a finite number", name, c, x);
      }
    }
  });
}

/// That the kernel takes a call.
void check_gpu(const ChooseCall& c) {
  const auto refuse = [](const TensorView& t, const char* name, const char* what) {
    throw Unsupported(fmt::format("{} is {}; choose_experts on a GPU takes {}", name, t.describe(), what));
  };
  const auto dense = [&](const TensorView& t, const char* name, DType dtype) {
    if (!t.defined()) return;
    if (t.dtype != dtype) refuse(t, name, dtype == DType::kInt32 ? "int32" : "float32");
    if (t.rank == 2 && t.size(0) > 1 && t.stride(0) != t.size(1)) refuse(t, name, "dense rows");
  };
  dense(c.logits, "logits", DType::kFloat32);
  dense(c.bias, "bias", DType::kFloat32);
  dense(c.ids, "ids", DType::kInt32);
  dense(c.weights, "weights", DType::kFloat32);
  if (c.routing.num_experts > kMaxGpuExperts) refuse(c.logits, "logits", "up to 512 experts");
  if (c.routing.experts_per_token > kMaxGpuExpertsPerToken) refuse(c.ids, "ids", "up to 32 experts a token");
  if (c.routing.num_groups > kMaxGpuGroups) {
    throw Unsupported(fmt::format("num_groups is {}; choose_experts on a GPU takes up to {}",
                                  c.routing.num_groups, kMaxGpuGroups));
  }
}

}  // namespace

void choose_experts(const RoutingArgs& args, const RoutingOptions& options) {
  check_shapes(args);
  const ChooseCall call{args.logits, args.bias, args.ids, args.weights, routing_of(args, options)};
  if (options.num_threads < 0) api::invalid("num_threads is {}, expected >= 0", options.num_threads);
  const Backend backend = api::backend_of(options.backend, args.logits, "logits");
  if (backend == Backend::kSm90) {
    check_gpu(call);
    if (call.ids.numel() > 0) sm90::choose_experts(call, options.stream);
    return;
  }
  check_finite(args.logits, "logits");
  if (args.bias.defined()) check_finite(args.bias, "bias");
  cpu::choose_experts(call, cpu::threads_of_call(options.num_threads));
}

}  // namespace flash_mla
