#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "base/element.h"
#include "base/parallel.h"
#include "kernels/mhc/call.h"

namespace flash_mla::cpu {
namespace {

constexpr int kMaxMixes = kMaxMhcStreams * (kMaxMhcStreams + 2);

/// Numbers of one token, by signed indices.
struct Mixes {
  std::array<float, kMaxMixes> values{};
  float& operator[](std::int64_t i) { return values[static_cast<std::size_t>(i)]; }
};

/// Several sums, so that they are added in vectors; their order depends on n alone.
float dot(const float* a, const float* b, std::int64_t n) {
  constexpr std::int64_t kSums = 16;
  float sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (std::int64_t j = 0; j < kSums; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) sums[i % kSums] += a[i] * b[i];
  float sum = 0;
  for (const float s : sums) sum += s;
  return sum;
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

/// comb (n, n), its logits, becomes nearly doubly stochastic: Sinkhorn and Knopp's way.
void sinkhorn(float* comb, std::int64_t n, const MhcOptions& o) {
  for (std::int64_t row = 0; row < n; ++row) {
    float* c = comb + row * n;
    const float largest = *std::max_element(c, c + n);
    float sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += c[i] = std::exp(c[i] - largest);
    for (std::int64_t i = 0; i < n; ++i) c[i] = c[i] / sum + o.sinkhorn_eps;
  }
  const auto divide = [&](std::int64_t first, std::int64_t step) {
    float sum = o.sinkhorn_eps;
    for (std::int64_t i = 0; i < n; ++i) sum += comb[first + i * step];
    for (std::int64_t i = 0; i < n; ++i) comb[first + i * step] /= sum;
  };
  for (int repeat = 0; repeat < o.sinkhorn_repeat; ++repeat) {
    for (std::int64_t row = 0; row < n && repeat > 0; ++row) divide(row * n, 1);
    for (std::int64_t column = 0; column < n; ++column) divide(column, n);
  }
}

/// What a thread works in: a token's streams in float32.
std::vector<float>& streams() {
  thread_local std::vector<float> values;
  return values;
}

template <class T>
void widen(const TensorView& residual, std::int64_t token, float* out) {
  const std::int64_t d = residual.size(2);
  for (std::int64_t s = 0; s < residual.size(1); ++s) {
    const T* from = residual.ptr<const T>() + token * residual.stride(0) + s * residual.stride(1);
    for (std::int64_t c = 0; c < d; ++c) out[s * d + c] = static_cast<float>(to_float(from[c]));
  }
}

/// One token, whose streams are `flat` (n, d).
template <class T>
void pre_token(const float* flat, std::int64_t token, std::int64_t n, std::int64_t d, const MhcWeights& w,
               const MhcMixes& mixes, const MhcOptions& o) {
  const std::int64_t count = n * (n + 2);
  const float factor = 1.0f / std::sqrt(dot(flat, flat, n * d) / static_cast<float>(n * d) + o.rms_eps);
  const float* scale = w.scale.ptr<const float>();
  Mixes m;
  for (std::int64_t i = 0; i < count; ++i) {
    const float raw = dot(w.fn.ptr<const float>() + i * w.fn.stride(0), flat, n * d) * factor;
    const std::int64_t kind = std::min<std::int64_t>(i / n, 2);
    m[i] = raw * scale[kind * w.scale.stride(0)] + w.base.ptr<const float>()[i * w.base.stride(0)];
  }
  float* post = mixes.post.ptr<float>() + token * mixes.post.stride(0);
  for (std::int64_t s = 0; s < n; ++s) {
    m[s] = sigmoid(m[s]) + o.pre_eps;
    post[s * mixes.post.stride(1)] = sigmoid(m[n + s]) * o.post_mult;
  }
  float* comb = m.values.data() + 2 * n;
  sinkhorn(comb, n, o);
  for (std::int64_t i = 0; i < n * n; ++i) {
    mixes.comb.ptr<float>()[token * mixes.comb.stride(0) + i / n * mixes.comb.stride(1) +
                            i % n * mixes.comb.stride(2)] = comb[i];
  }
  T* input = mixes.layer_input.ptr<T>() + token * mixes.layer_input.stride(0);
  for (std::int64_t c = 0; c < d; ++c) {
    float sum = 0;
    for (std::int64_t s = 0; s < n; ++s) sum += m[s] * flat[s * d + c];
    input[c] = from_double<T>(static_cast<double>(sum));
  }
  if (!w.norm.defined()) return;
  double squares = 0;
  for (std::int64_t c = 0; c < d; ++c) {
    const auto x = static_cast<double>(to_float(input[c]));
    squares += x * x;
  }
  const float norm = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(d)) + o.norm_eps);
  visit_float_type(w.norm.dtype, [&](auto element) {
    const auto* weight = w.norm.ptr<const decltype(element)>();
    for (std::int64_t c = 0; c < d; ++c) {
      const float x = static_cast<float>(to_float(input[c])) * norm;
      input[c] = from_double<T>(static_cast<double>(x * static_cast<float>(to_float(weight[c]))));
    }
  });
}

/// One token: `flat`, its streams, become the next residual's, rounded, and are written to out.
template <class T>
void post_token(const MhcPostCall& call, std::int64_t token, float* flat) {
  const std::int64_t n = call.residual.size(1);
  const std::int64_t d = call.residual.size(2);
  Mixes post, comb;
  for (std::int64_t t = 0; t < n; ++t) {
    post[t] = call.post.ptr<const float>()[token * call.post.stride(0) + t * call.post.stride(1)];
    for (std::int64_t s = 0; s < n; ++s) {
      comb[s * n + t] = call.comb.ptr<const float>()[token * call.comb.stride(0) + s * call.comb.stride(1) +
                                                     t * call.comb.stride(2)];
    }
  }
  const T* x = call.x.ptr<const T>() + token * call.x.stride(0);
  T* out = call.out.ptr<T>() + token * call.out.stride(0);
  for (std::int64_t c = 0; c < d; ++c) {
    const float y = static_cast<float>(to_float(x[c]));
    std::array<float, kMaxMhcStreams> mixed;
    for (std::int64_t t = 0; t < n; ++t) {
      float sum = post[t] * y;
      for (std::int64_t s = 0; s < n; ++s) sum += comb[s * n + t] * flat[s * d + c];
      mixed[static_cast<std::size_t>(t)] = sum;
    }
    for (std::int64_t t = 0; t < n; ++t) {
      const T rounded = from_double<T>(static_cast<double>(mixed[static_cast<std::size_t>(t)]));
      out[t * call.out.stride(1) + c] = rounded;
      flat[t * d + c] = static_cast<float>(to_float(rounded));
    }
  }
}

/// f(element, token, its streams in float32) for every token.
template <class F>
void for_tokens(const TensorView& residual, int num_threads, const F& f) {
  visit_float_type(residual.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, double>) {
      parallel_for(residual.size(0), num_threads, [&](std::int64_t token) {
        std::vector<float>& flat = streams();
        flat.resize(static_cast<std::size_t>(residual.size(1) * residual.size(2)));
        widen<T>(residual, token, flat.data());
        f(element, token, flat.data());
      });
    }
  });
}

}  // namespace

void mhc_pre(const TensorView& residual, const MhcWeights& weights, const MhcMixes& mixes,
             const MhcOptions& options, int num_threads) {
  for_tokens(residual, num_threads, [&](auto element, std::int64_t token, const float* flat) {
    pre_token<decltype(element)>(flat, token, residual.size(1), residual.size(2), weights, mixes, options);
  });
}

void mhc_post(const MhcPostCall& call, int num_threads) {
  for_tokens(call.residual, num_threads, [&](auto element, std::int64_t token, float* flat) {
    post_token<decltype(element)>(call, token, flat);
  });
}

void mhc_post_pre(const MhcPostCall& call, const MhcWeights& weights, const MhcMixes& mixes,
                  const MhcOptions& options, int num_threads) {
  for_tokens(call.residual, num_threads, [&](auto element, std::int64_t token, float* flat) {
    using T = decltype(element);
    post_token<T>(call, token, flat);
    pre_token<T>(flat, token, call.residual.size(1), call.residual.size(2), weights, mixes, options);
  });
}

}  // namespace flash_mla::cpu
