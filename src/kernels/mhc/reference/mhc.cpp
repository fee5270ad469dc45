#include <algorithm>
#include <cmath>
#include <vector>

#include "base/element.h"
#include "kernels/mhc/call.h"

namespace flash_mla::reference {
namespace {

double at(const TensorView& t, std::int64_t i, std::int64_t j = 0, std::int64_t k = 0) {
  const std::int64_t where =
      i * t.stride(0) + (t.rank > 1 ? j * t.stride(1) : 0) + (t.rank > 2 ? k * t.stride(2) : 0);
  return visit_float_type(t.dtype, [&](auto element) {
    return static_cast<double>(to_float(t.ptr<const decltype(element)>()[where]));
  });
}

using Matrix = std::vector<std::vector<double>>;

Matrix transposed(const Matrix& m) {
  Matrix out(m.size(), std::vector<double>(m.size()));
  for (std::size_t i = 0; i < m.size(); ++i) {
    for (std::size_t j = 0; j < m.size(); ++j) out[j][i] = m[i][j];
  }
  return out;
}

Matrix rows_divided(Matrix m, double eps) {
  for (auto& row : m) {
    double sum = eps;
    for (const double x : row) sum += x;
    for (double& x : row) x /= sum;
  }
  return m;
}
Matrix columns_divided(const Matrix& m, double eps) { return transposed(rows_divided(transposed(m), eps)); }

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

void mhc_pre_unchecked(const TensorView& residual, const MhcWeights& w, const MhcMixes& mixes,
                       const MhcOptions& o) {
  const std::int64_t tokens = residual.size(0), n = residual.size(1), d = residual.size(2);
  for (std::int64_t token = 0; token < tokens; ++token) {
    double squares = 0;
    for (std::int64_t i = 0; i < n * d; ++i) squares += std::pow(at(residual, token, i / d, i % d), 2);
    const double factor =
        1 / std::sqrt(squares / static_cast<double>(n * d) + static_cast<double>(o.rms_eps));
    std::vector<double> logits;
    for (std::int64_t m = 0; m < n * (n + 2); ++m) {
      double sum = 0;
      for (std::int64_t i = 0; i < n * d; ++i) sum += at(w.fn, m, i) * at(residual, token, i / d, i % d);
      logits.push_back(sum * factor * at(w.scale, std::min<std::int64_t>(m / n, 2)) + at(w.base, m));
    }
    const auto logit = [&](std::int64_t m) { return logits[static_cast<std::size_t>(m)]; };
    for (std::int64_t s = 0; s < n; ++s) {
      mixes.post.ptr<double>()[token * mixes.post.stride(0) + s * mixes.post.stride(1)] =
          sigmoid(logit(n + s)) * static_cast<double>(o.post_mult);
    }
    const auto eps = static_cast<double>(o.sinkhorn_eps);
    Matrix comb(static_cast<std::size_t>(n), std::vector<double>(static_cast<std::size_t>(n)));
    for (std::int64_t i = 0; i < n * n; ++i) {
      comb[static_cast<std::size_t>(i / n)][static_cast<std::size_t>(i % n)] = std::exp(logit(2 * n + i));
    }
    comb = rows_divided(comb, 0);
    for (auto& row : comb) {
      for (double& x : row) x += eps;
    }
    comb = columns_divided(comb, eps);
    for (int repeat = 1; repeat < o.sinkhorn_repeat; ++repeat) {
      comb = columns_divided(rows_divided(comb, eps), eps);
    }
    for (std::int64_t i = 0; i < n * n; ++i) {
      mixes.comb.ptr<double>()[token * mixes.comb.stride(0) + i / n * mixes.comb.stride(1) +
                               i % n * mixes.comb.stride(2)] =
          comb[static_cast<std::size_t>(i / n)][static_cast<std::size_t>(i % n)];
    }
    double* input = mixes.layer_input.ptr<double>() + token * mixes.layer_input.stride(0);
    double input_squares = 0;
    for (std::int64_t c = 0; c < d; ++c) {
      input[c] = 0;
      for (std::int64_t s = 0; s < n; ++s) {
        input[c] += (sigmoid(logit(s)) + static_cast<double>(o.pre_eps)) * at(residual, token, s, c);
      }
      input_squares += input[c] * input[c];
    }
    if (!w.norm.defined()) continue;
    const double norm =
        1 / std::sqrt(input_squares / static_cast<double>(d) + static_cast<double>(o.norm_eps));
    for (std::int64_t c = 0; c < d; ++c) input[c] *= norm * at(w.norm, c);
  }
}

void mhc_post_unchecked(const MhcPostCall& call) {
  const std::int64_t n = call.residual.size(1), d = call.residual.size(2);
  for (std::int64_t token = 0; token < call.residual.size(0); ++token) {
    for (std::int64_t i = 0; i < n * d; ++i) {
      const std::int64_t t = i / d, c = i % d;
      double sum = at(call.post, token, t) * at(call.x, token, c);
      for (std::int64_t s = 0; s < n; ++s) sum += at(call.comb, token, s, t) * at(call.residual, token, s, c);
      call.out.ptr<double>()[token * call.out.stride(0) + t * call.out.stride(1) + c] = sum;
    }
  }
}

}  // namespace flash_mla::reference
