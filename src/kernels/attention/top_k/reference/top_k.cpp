#include "kernels/attention/top_k/reference/top_k.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/attention/top_k/places.h"

namespace flash_mla::reference {
namespace {

/// a comes before b, by the definition.
bool larger(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && !std::isnan(b);
  return a > b;
}

}  // namespace

void top_k_unchecked(const TopKArgs& args) {
  const std::int64_t k = args.indices.size(1);
  const selection::Places places(args.output, args.logits.size(0));
  std::vector<std::int32_t> order;
  for (std::int64_t row = 0; row < args.logits.size(0); ++row) {
    const std::int64_t start = args.row_starts.defined() ? args.row_starts.ptr<const std::int32_t>()[row] : 0;
    const float* scores = args.logits.ptr<const float>() + row * args.logits.stride(0) + start;
    order.resize(static_cast<std::size_t>(args.lengths.ptr<const std::int32_t>()[row]));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int32_t a, std::int32_t b) { return larger(scores[a], scores[b]); });
    if (static_cast<std::int64_t>(order.size()) > k) order.resize(static_cast<std::size_t>(k));
    std::sort(order.begin(), order.end());
    auto* out = args.indices.ptr<std::int32_t>() + row * args.indices.stride(0);
    std::copy(order.begin(), order.end(), out);
    const auto count = static_cast<std::int64_t>(order.size());
    places.translate(row, out, count);
    std::fill(out + count, out + k, -1);
  }
}

}  // namespace flash_mla::reference
