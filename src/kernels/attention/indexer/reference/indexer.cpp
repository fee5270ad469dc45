#include "kernels/attention/indexer/reference/indexer.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "base/element.h"
#include "base/fp8.h"

namespace flash_mla::reference {
namespace {

double value(const std::byte* from, int i) {
  return static_cast<double>(to_float(E4m3{static_cast<std::uint8_t>(from[i])}));
}

double logit(const indexer::Rows& rows, std::int64_t row, std::int64_t j) {
  const std::int64_t request = rows.request(row);
  const std::byte* key = rows.keys + rows.place(request, j, rows.key_bytes);
  float scale = 0;
  std::memcpy(&scale, rows.scales + rows.place(request, j, indexer::kScaleBytes), sizeof(scale));
  double sum = 0;
  for (int h = 0; h < rows.heads; ++h) {
    const std::byte* query = rows.query(row) + static_cast<std::ptrdiff_t>(h) * rows.dim;
    double dot = 0;
    for (int i = 0; i < rows.dim; ++i) dot += value(query, i) * value(key, i);
    // NaN is not below 0 and stays.
    sum += static_cast<double>(rows.weights[row * rows.weights_stride + h]) * (dot < 0 ? 0 : dot);
  }
  return sum * static_cast<double>(scale);
}

}  // namespace

void index_logits(const indexer::Rows& rows, const TensorView& logits, bool compressed, bool clean) {
  visit_float_type(logits.dtype, [&](auto element) {
    using T = decltype(element);
    for (std::int64_t row = 0; row < rows.num_rows; ++row) {
      T* out = logits.ptr<T>() + row * logits.stride(0);
      if (clean) {
        for (std::int64_t c = 0; c < logits.size(1); ++c) {
          out[c] = from_double<T>(-std::numeric_limits<double>::infinity());
        }
      }
      for (std::int64_t j = rows.begin(row); j < rows.end(row); ++j) {
        out[compressed ? j - rows.begin(row) : j] = from_double<T>(logit(rows, row, j));
      }
    }
  });
}

}  // namespace flash_mla::reference
