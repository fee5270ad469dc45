#include "flash_mla/sampling.h"

#include <cmath>
#include <limits>

#include "api/call.h"
#include "base/element.h"
#include "base/parallel.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/sampling/call.h"

namespace flash_mla {
namespace api {
namespace {

/// So that weights of up to 2^44 add up to a number of 64 bits.
constexpr std::int64_t kMaxVocab = (1 << 20) - 1;

void check_scores(const TensorView& t, const char* name, int rank) {
  check_tensor(t, name, rank, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  check_last_dim_contiguous(t, name);
  const std::int64_t vocab = t.size(rank - 1);
  if (vocab < 1 || vocab > kMaxVocab) {
    invalid("{}.shape[{}] (vocab) is {}, expected 1 to {}", name, rank - 1, vocab, kMaxVocab);
  }
}

/// Whether the call runs on a GPU, whose numbers nobody reads on the host.
bool on_gpu(const TensorView& t, const char* name, const SamplingOptions& options) {
  if (options.num_threads < 0) invalid("num_threads is {}, expected >= 0", options.num_threads);
  return backend_of(options.backend, t, name) == Backend::kSm90;
}

/// An optional vector with an element for each of `n`.
void check_vector(const TensorView& t, const char* name, std::int64_t n, const char* n_name,
                  std::initializer_list<DType> dtypes, const TensorView& beside, const char* beside_name) {
  if (!t.defined()) return;
  check_tensor(t, name, 1, dtypes);
  check_size(t, name, 0, n, n_name);
  check_same_device(t, name, beside, beside_name);
}

void check_rows(const SamplingRows& rows, std::int64_t n, const TensorView& beside, const char* beside_name) {
  const auto floats = {DType::kFloat32, DType::kFloat64};
  check_vector(rows.temperature, "temperature", n, "rows (n)", floats, beside, beside_name);
  check_vector(rows.top_k, "top_k", n, "rows (n)", {DType::kInt32, DType::kInt64}, beside, beside_name);
  check_vector(rows.top_p, "top_p", n, "rows (n)", floats, beside, beside_name);
  check_vector(rows.min_p, "min_p", n, "rows (n)", floats, beside, beside_name);
}

void check_keys(const DrawKeys& keys, std::int64_t m, const TensorView& beside, const char* beside_name) {
  check_vector(keys.seeds, "seeds", m, "draws (m)", {DType::kInt64}, beside, beside_name);
  check_vector(keys.indices, "indices", m, "draws (m)", {DType::kInt32, DType::kInt64}, beside, beside_name);
  check_vector(keys.positions, "positions", m, "draws (m)", {DType::kInt64}, beside, beside_name);
}

/// `gpu`: those of single rows are not looked at.
void check_limits(SamplingRows rows, const SamplingOptions& o, std::int64_t n, bool gpu) {
  if (gpu) {
    // What a tensor stands for is not used.
    SamplingOptions used = o;
    if (rows.temperature.defined()) used.temperature = 1;
    if (rows.top_k.defined()) used.top_k = 0;
    if (rows.top_p.defined()) used.top_p = 1;
    if (rows.min_p.defined()) used.min_p = 0;
    return check_limits({}, used, n > 0 ? 1 : 0, false);
  }
  const auto where = [](const TensorView& t, const char* name, std::int64_t row) {
    return t.defined() ? fmt::format("{}[{}]", name, row) : std::string(name);
  };
  for (std::int64_t row = 0; row < n; ++row) {
    const RowLimits l = limits_of(rows, o, row);
    if (!(l.temperature >= 0) || !std::isfinite(l.temperature)) {
      invalid("{} is {}, expected a finite number >= 0", where(rows.temperature, "temperature", row),
              l.temperature);
    }
    if (o.probabilities && l.temperature != 1) {
      invalid("{} is {}, expected 1 with probabilities, which a temperature has made",
              where(rows.temperature, "temperature", row), l.temperature);
    }
    if (l.top_k < 0) {
      invalid("{} is {}, expected >= 0 (0: all)", where(rows.top_k, "top_k", row), l.top_k);
    }
    if (!(l.top_p >= 0 && l.top_p <= 1)) {
      invalid("{} is {}, expected 0 to 1", where(rows.top_p, "top_p", row), l.top_p);
    }
    if (!(l.min_p >= 0 && l.min_p <= 1)) {
      invalid("{} is {}, expected 0 to 1", where(rows.min_p, "min_p", row), l.min_p);
    }
  }
}

/// Every score is one, and with `one_possible` every row has a token that is possible. `t` has rank 2 or 3.
void check_values(const TensorView& t, const char* name, bool probabilities, bool one_possible, int threads) {
  const std::int64_t inner = t.rank == 3 ? t.size(1) : 1, vocab = t.size(t.rank - 1);
  parallel_for(t.size(0) * inner, threads, [&](std::int64_t i) {
    const std::int64_t at = i / inner * t.stride(0) + (t.rank == 3 ? i % inner * t.stride(1) : 0);
    const auto row_name = [&] {
      return t.rank == 3 ? fmt::format("{}[{}][{}]", name, i / inner, i % inner)
                         : fmt::format("{}[{}]", name, i);
    };
    visit_float_type(t.dtype, [&](auto element) {
      const auto* row = t.ptr<const decltype(element)>() + at;
      const auto infinity = std::numeric_limits<double>::infinity();
      bool possible = false;
      for (std::int64_t c = 0; c < vocab; ++c) {
        const auto x = static_cast<double>(to_float(row[c]));
        const bool good = probabilities ? x >= 0 && x < infinity : x < infinity;
        if (!good) {
          invalid("{}[{}] is {}, expected {}", row_name(), c, x,
                  probabilities ? "a probability: finite and >= 0" : "a logit: a number below infinity");
        }
        possible |= probabilities ? x > 0 : x > -infinity;
      }
      if (one_possible && !possible) {
        invalid("{} has no token that is possible, expected one at least", row_name());
      }
    });
  });
}

int threads_of(const SamplingOptions& options) { return cpu::threads_of_call(options.num_threads); }

}  // namespace
}  // namespace api

void sample_tokens(const SampleArgs& a, const SamplingOptions& options) {
  using namespace api;
  check_scores(a.scores, "scores", 2);
  const bool gpu = on_gpu(a.scores, "scores", options);
  check_tensor(a.tokens, "tokens", 1, {DType::kInt32, DType::kInt64});
  const std::int64_t n = a.scores.size(0), m = a.tokens.size(0);
  if (!a.rows.defined()) check_size(a.tokens, "tokens", 0, n, "scores.shape[0] (n)");
  check_vector(a.rows, "rows", m, "tokens.shape[0] (m)", {DType::kInt32, DType::kInt64}, a.scores, "scores");
  check_vector(a.valid, "valid", m, "tokens.shape[0] (m)", {DType::kUInt8}, a.scores, "scores");
  check_no_overlap(a.tokens, "tokens");
  check_same_device(a.tokens, "tokens", a.scores, "scores");
  if (a.valid.defined()) check_no_overlap(a.valid, "valid");
  check_rows(a.options, n, a.scores, "scores");
  check_keys(a.keys, m, a.scores, "scores");
  check_limits(a.options, options, n, gpu);
  if (gpu) return sm90::sample_tokens(a, options);
  for (std::int64_t i = 0; a.rows.defined() && i < m; ++i) {
    const std::int64_t row = integer_at(a.rows, i);
    if (row < 0 || row >= n) {
      invalid("rows[{}] is {}, expected 0 to scores.shape[0] - 1 = {}", i, row, n - 1);
    }
  }
  check_values(a.scores, "scores", options.probabilities, !a.valid.defined(), threads_of(options));
  cpu::sample_tokens(a, options, threads_of(options));
}

void filter_tokens(const TensorView& scores, const SamplingRows& rows, const TensorView& out,
                   const SamplingOptions& options) {
  using namespace api;
  check_scores(scores, "scores", 2);
  const bool gpu = on_gpu(scores, "scores", options);
  check_tensor(out, "out", 2, {scores.dtype});
  check_size(out, "out", 0, scores.size(0), "scores.shape[0] (n)");
  check_size(out, "out", 1, scores.size(1), "scores.shape[1] (vocab)");
  check_last_dim_contiguous(out, "out");
  check_no_overlap(out, "out");
  check_same_device(out, "out", scores, "scores");
  check_rows(rows, scores.size(0), scores, "scores");
  check_limits(rows, options, scores.size(0), gpu);
  if (gpu) return sm90::filter_tokens(scores, rows, out, options);
  check_values(scores, "scores", options.probabilities, /*one_possible=*/true, threads_of(options));
  cpu::filter_tokens(scores, rows, out, options, threads_of(options));
}

void token_probabilities(const TensorView& logits, const SamplingRows& rows, const TensorView& out,
                         const SamplingOptions& options) {
  using namespace api;
  check_scores(logits, "logits", 2);
  const bool gpu = on_gpu(logits, "logits", options);
  check_tensor(out, "out", 2, {logits.dtype, DType::kFloat32});
  check_size(out, "out", 0, logits.size(0), "logits.shape[0] (n)");
  check_size(out, "out", 1, logits.size(1), "logits.shape[1] (vocab)");
  check_last_dim_contiguous(out, "out");
  check_no_overlap(out, "out");
  check_same_device(out, "out", logits, "logits");
  if (options.probabilities) invalid("probabilities is true, expected logits");
  check_rows(rows, logits.size(0), logits, "logits");
  check_limits(rows, options, logits.size(0), gpu);
  if (gpu) return sm90::token_probabilities(logits, rows, out, options);
  check_values(logits, "logits", /*probabilities=*/false, /*one_possible=*/true, threads_of(options));
  cpu::token_probabilities(logits, rows, out, options, threads_of(options));
}

void speculative_sampling(const SpeculativeArgs& a, const SamplingOptions& options) {
  using namespace api;
  check_scores(a.draft_probs, "draft_probs", 3);
  const bool gpu = on_gpu(a.draft_probs, "draft_probs", options);
  const std::int64_t b = a.draft_probs.size(0), n = a.draft_probs.size(1), vocab = a.draft_probs.size(2);
  check_tensor(a.target_probs, "target_probs", 3, {a.draft_probs.dtype});
  check_last_dim_contiguous(a.target_probs, "target_probs");
  check_size(a.target_probs, "target_probs", 0, b, "draft_probs.shape[0] (b)");
  check_size(a.target_probs, "target_probs", 1, n + 1, "draft_probs.shape[1] (n) + 1");
  check_size(a.target_probs, "target_probs", 2, vocab, "draft_probs.shape[2] (vocab)");
  check_same_device(a.target_probs, "target_probs", a.draft_probs, "draft_probs");
  check_tensor(a.draft_tokens, "draft_tokens", 2, {DType::kInt32, DType::kInt64});
  check_size(a.draft_tokens, "draft_tokens", 0, b, "draft_probs.shape[0] (b)");
  check_size(a.draft_tokens, "draft_tokens", 1, n, "draft_probs.shape[1] (n)");
  check_same_device(a.draft_tokens, "draft_tokens", a.draft_probs, "draft_probs");
  check_tensor(a.tokens, "tokens", 2, {DType::kInt32, DType::kInt64});
  check_size(a.tokens, "tokens", 0, b, "draft_probs.shape[0] (b)");
  check_size(a.tokens, "tokens", 1, n + 1, "draft_probs.shape[1] (n) + 1");
  check_no_overlap(a.tokens, "tokens");
  check_same_device(a.tokens, "tokens", a.draft_probs, "draft_probs");
  for (const auto& [t, name] : {std::pair(a.accepted, "accepted"), std::pair(a.emitted, "emitted")}) {
    check_vector(t, name, b, "draft_probs.shape[0] (b)", {DType::kInt32}, a.draft_probs, "draft_probs");
    if (t.defined()) check_no_overlap(t, name);
  }
  check_keys(a.keys, b, a.draft_probs, "draft_probs");
  if (gpu) return sm90::speculative_sampling(a, options);
  for (std::int64_t i = 0; i < b * n; ++i) {
    TensorView chain = a.draft_tokens;
    chain.data = a.draft_tokens.ptr<std::uint8_t>() +
                 static_cast<std::size_t>(i / n * chain.stride(0)) * dtype_size(chain.dtype);
    chain.strides[0] = chain.stride(1);
    const std::int64_t token = integer_at(chain, i % n);
    if (token < 0 || token >= vocab) {
      invalid("draft_tokens[{}][{}] is {}, expected 0 to {} (vocab - 1)", i / n, i % n, token, vocab - 1);
    }
  }
  check_values(a.draft_probs, "draft_probs", /*probabilities=*/true, /*one_possible=*/false,
               threads_of(options));
  check_values(a.target_probs, "target_probs", /*probabilities=*/true, /*one_possible=*/true,
               threads_of(options));
  cpu::speculative_sampling(a, options, threads_of(options));
}

}  // namespace flash_mla
