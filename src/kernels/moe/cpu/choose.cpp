#include <vector>

#include "base/element.h"
#include "base/parallel.h"
#include "kernels/moe/choose_call.h"
#include "kernels/moe/cpu/router.h"

namespace flash_mla::cpu {
namespace {

void widen(const TensorView& t, std::int64_t at, std::int64_t n, std::vector<float>& out) {
  out.resize(static_cast<std::size_t>(n));
  visit_float_type(t.dtype, [&](auto element) {
    const auto* from = t.ptr<const decltype(element)>() + at;
    for (std::int64_t i = 0; i < n; ++i)
      out[static_cast<std::size_t>(i)] = static_cast<float>(to_float(from[i]));
  });
}

}  // namespace

void choose_experts(const ChooseCall& call, int num_threads) {
  const std::int64_t n = call.logits.size(0), experts = call.logits.size(1), k = call.ids.size(1);
  std::vector<float> bias;
  if (call.bias.defined()) widen(call.bias, 0, experts, bias);
  parallel_for(n, n * experts < (1 << 14) ? 1 : num_threads, [&](std::int64_t token) {
    thread_local std::vector<float> logits, weights;
    widen(call.logits, token * call.logits.stride(0), experts, logits);
    weights.resize(static_cast<std::size_t>(k));
    choose_experts(call.routing, logits.data(), bias.empty() ? nullptr : bias.data(),
                   call.ids.ptr<std::int32_t>() + token * call.ids.stride(0), weights.data());
    visit_float_type(call.weights.dtype, [&](auto element) {
      using T = decltype(element);
      T* out = call.weights.ptr<T>() + token * call.weights.stride(0);
      for (std::size_t i = 0; i < weights.size(); ++i) {
        out[i] = from_double<T>(static_cast<double>(weights[i]));
      }
    });
  });
}

}  // namespace flash_mla::cpu
