#include "kernels/attention/gqa/reference/gqa.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/element.h"

namespace flash_mla::reference {
namespace {

using gqa::Problem;

/// A query and head of a sequence.
struct Row {
  std::int64_t req, query, head;
};

/// Fills `score` with (key, score) pairs' scores of the keys that the row sees, and `seen` with those keys.
template <class T>
void score_keys(const Problem& p, const Row& row, double scale, std::vector<std::int64_t>& seen,
                std::vector<double>& score) {
  const std::int64_t n = p.queries(row.req), m = p.keys(row.req), kv_head = row.head / p.group;
  const T* q = static_cast<const T*>(p.q) + (p.first_query(row.req) + row.query) * p.q_strides.token +
               row.head * p.q_strides.head;
  seen.clear();
  score.clear();
  const gqa::Range visible = p.visible(row.query, n, m);
  for (std::int64_t j = visible.begin; j < visible.end; ++j) {
    if (!p.unmasked(row.req, row.query, j, m)) continue;
    const gqa::Place at = p.place(row.req, static_cast<std::int32_t>(j));
    const T* k = static_cast<const T*>(p.k) + at.page * p.k_strides.page + at.offset * p.k_strides.token +
                 kv_head * p.k_strides.head;
    double x = 0;
    for (int d = 0; d < p.d_qk; ++d) x += double{to_float(q[d])} * double{to_float(k[d])};
    x *= scale;
    if (p.soft_cap > 0) x = double{p.soft_cap} * std::tanh(x / double{p.soft_cap});
    if (p.slopes != nullptr) {
      x -= double{p.slopes[row.head]} * std::abs(static_cast<double>(j - (m - n + row.query)));
    }
    seen.push_back(j);
    score.push_back(x);
  }
}

/// The row's output into `acc`; returns its log-sum-exp.
template <class T>
double attend(const Problem& p, const Row& row, const std::vector<std::int64_t>& seen,
              const std::vector<double>& score, std::vector<double>& acc) {
  std::fill(acc.begin(), acc.end(), 0.0);
  if (seen.empty()) return std::numeric_limits<double>::infinity();
  const double highest = *std::max_element(score.begin(), score.end());
  double sum = 0;
  for (std::size_t i = 0; i < seen.size(); ++i) {
    const gqa::Place at = p.place(row.req, static_cast<std::int32_t>(seen[i]));
    const T* v = static_cast<const T*>(p.v) + at.page * p.v_strides.page + at.offset * p.v_strides.token +
                 row.head / p.group * p.v_strides.head;
    const double weight = std::exp(score[i] - highest);
    sum += weight;
    for (std::size_t d = 0; d < acc.size(); ++d) acc[d] += weight * double{to_float(v[d])};
  }
  const double lse = highest + std::log(sum);
  double factor = 1 / sum;
  if (p.sinks != nullptr) factor /= 1 + std::exp(double{p.sinks[row.head]} - lse);
  for (double& x : acc) x *= factor;
  return lse;
}

template <class T>
void run(const GqaArgs& a, const Problem& p, double scale) {
  std::vector<std::int64_t> seen;
  std::vector<double> score, acc(static_cast<std::size_t>(p.d_v));
  for (std::int64_t r = 0; r < p.batch; ++r) {
    for (std::int64_t i = 0; i < p.queries(r); ++i) {
      for (std::int64_t h = 0; h < p.h_q; ++h) {
        const Row row{r, i, h};
        score_keys<T>(p, row, scale, seen, score);
        const double lse = attend<T>(p, row, seen, score, acc);
        const std::int64_t token = p.first_query(r) + i;
        visit_float_type(a.out.dtype, [&](auto element) {
          using Out = decltype(element);
          Out* out = a.out.ptr<Out>() + token * p.out_strides.token + h * p.out_strides.head;
          for (std::size_t d = 0; d < acc.size(); ++d) out[d] = from_double<Out>(acc[d]);
        });
        if (!a.lse.defined()) continue;
        const std::int64_t at = h * p.lse_head_stride + token * p.lse_token_stride;
        if (a.lse.dtype == DType::kFloat64) {
          a.lse.ptr<double>()[at] = lse;
        } else {
          a.lse.ptr<float>()[at] = static_cast<float>(lse);
        }
      }
    }
  }
}

}  // namespace

void gqa_attention(const GqaArgs& args, const Problem& problem, double scale) {
  visit_float_type(args.q.dtype, [&](auto element) { run<decltype(element)>(args, problem, scale); });
}

}  // namespace flash_mla::reference
