#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "base/element.h"
#include "flash_mla/tensor.h"

// Attention of one query row by the definition, in float64: what the references of sparse and FP8 attention
// share.

namespace flash_mla::reference {

/// Dequantised keys of d_qk float64 one after the other; V is the first d_v of each.
struct Keys {
  std::vector<double> elements;
  std::int64_t count = 0;
};

struct Row {
  std::vector<double> out;
  double lse = std::numeric_limits<double>::infinity();
  double max_logit = -std::numeric_limits<double>::infinity();
};

/// `sink`: natural log, -inf for none.
template <class T>
Row attend(const T* q, std::int64_t d_qk, std::int64_t d_v, const Keys& keys, double scale, double sink) {
  Row row;
  row.out.assign(static_cast<std::size_t>(d_v), 0.0);
  if (keys.count == 0) return row;
  std::vector<double> score(static_cast<std::size_t>(keys.count));
  for (std::int64_t j = 0; j < keys.count; ++j) {
    const double* k = keys.elements.data() + j * d_qk;
    double dot = 0;
    for (std::int64_t d = 0; d < d_qk; ++d) dot += double{to_float(q[d])} * k[d];
    score[static_cast<std::size_t>(j)] = dot * scale;
    row.max_logit = std::max(row.max_logit, dot * scale);
  }
  double sum = 0;
  for (std::int64_t j = 0; j < keys.count; ++j) {
    const double* v = keys.elements.data() + j * d_qk;
    const double p = std::exp(score[static_cast<std::size_t>(j)] - row.max_logit);
    sum += p;
    for (std::int64_t d = 0; d < d_v; ++d) row.out[static_cast<std::size_t>(d)] += p * v[d];
  }
  row.lse = row.max_logit + std::log(sum);
  for (double& x : row.out) x = x / sum / (1.0 + std::exp(sink - row.lse));
  return row;
}

/// Writes a value to a float32 or float64 tensor.
inline void store(const TensorView& t, std::int64_t at, double x) {
  if (t.dtype == DType::kFloat64) {
    t.ptr<double>()[at] = x;
  } else {
    t.ptr<float>()[at] = static_cast<float>(x);
  }
}

/// Writes a row of out, of any floating type.
inline void store_row(const TensorView& t, std::int64_t at, const std::vector<double>& row) {
  visit_float_type(t.dtype, [&](auto element) {
    using Out = decltype(element);
    for (std::size_t d = 0; d < row.size(); ++d) {
      t.ptr<Out>()[at + static_cast<std::int64_t>(d)] = from_double<Out>(row[d]);
    }
  });
}

}  // namespace flash_mla::reference
