#include "flash_mla/mhc.h"

#include <cmath>

#include "api/call.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/mhc/call.h"

namespace flash_mla {
namespace {

using api::check_last_dim_contiguous;
using api::check_no_overlap;
using api::check_same_device;
using api::check_size;
using api::check_tensor;
using api::invalid;

constexpr const char* kTokens = "residual.shape[0] (tokens)";
constexpr const char* kStreams = "residual.shape[1] (n)";
constexpr const char* kWidth = "residual.shape[2] (d)";

/// A call's tensors against its residual. `reference`: outputs are float64, and inputs may be.
class Checks {
 public:
  Checks(const TensorView& residual, bool reference) : residual_(residual), reference_(reference) {
    if (reference) {
      check_tensor(residual, "residual", 3,
                   {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64});
    } else {
      check_tensor(residual, "residual", 3, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
    }
    check_last_dim_contiguous(residual, "residual");
    if (n() < 1 || n() > kMaxMhcStreams) {
      invalid("residual.shape[1] (n) is {}, expected 1 to {}", n(), kMaxMhcStreams);
    }
    if (d() < 1 || d() > (std::int64_t{1} << 40)) invalid("residual.shape[2] (d) is {}, expected >= 1", d());
  }
  std::int64_t n() const { return residual_.size(1); }
  std::int64_t d() const { return residual_.size(2); }

  void weights(const MhcWeights& w) const {
    small(w.fn, "fn", 2);
    check_size(w.fn, "fn", 0, n() * (n() + 2), "n * (n + 2)");
    check_size(w.fn, "fn", 1, n() * d(), "n * d");
    check_last_dim_contiguous(w.fn, "fn");
    small(w.scale, "scale", 1);
    check_size(w.scale, "scale", 0, 3, "pre, post and comb:");
    small(w.base, "base", 1);
    check_size(w.base, "base", 0, n() * (n() + 2), "n * (n + 2)");
    if (!w.norm.defined()) return;
    check_tensor(w.norm, "norm", 1, {DType::kFloat32, residual_.dtype});
    check_size(w.norm, "norm", 0, d(), kWidth);
    check_last_dim_contiguous(w.norm, "norm");
    check_same_device(w.norm, "norm", residual_, "residual");
  }

  /// Of every token: n numbers, and n x n.
  void mix_tensors(const TensorView& post, const TensorView& comb, bool written) const {
    const DType dtype = written && reference_ ? DType::kFloat64 : DType::kFloat32;
    check_tensor(post, "post", 2, {dtype, reference_ ? DType::kFloat64 : dtype});
    check_size(post, "post", 0, residual_.size(0), kTokens);
    check_size(post, "post", 1, n(), kStreams);
    check_tensor(comb, "comb", 3, {dtype, reference_ ? DType::kFloat64 : dtype});
    check_size(comb, "comb", 0, residual_.size(0), kTokens);
    check_size(comb, "comb", 1, n(), kStreams);
    check_size(comb, "comb", 2, n(), kStreams);
    check_same_device(post, "post", residual_, "residual");
    check_same_device(comb, "comb", residual_, "residual");
    if (!written) return;
    check_no_overlap(post, "post");
    check_no_overlap(comb, "comb");
  }

  void mixes(const MhcMixes& m) const {
    mix_tensors(m.post, m.comb, /*written=*/true);
    row(m.layer_input, "layer_input", output());
    check_no_overlap(m.layer_input, "layer_input");
  }

  void post(const MhcPostCall& c) const {
    mix_tensors(c.post, c.comb, /*written=*/false);
    row(c.x, "x", residual_.dtype);
    check_tensor(c.out, "out", 3, {output()});
    check_size(c.out, "out", 0, residual_.size(0), kTokens);
    check_size(c.out, "out", 1, n(), kStreams);
    check_size(c.out, "out", 2, d(), kWidth);
    check_last_dim_contiguous(c.out, "out");
    check_no_overlap(c.out, "out");
    check_same_device(c.out, "out", residual_, "residual");
  }

 private:
  DType output() const { return reference_ ? DType::kFloat64 : residual_.dtype; }

  void row(const TensorView& t, const char* name, DType dtype) const {
    check_tensor(t, name, 2, {dtype});
    check_size(t, name, 0, residual_.size(0), kTokens);
    check_size(t, name, 1, d(), kWidth);
    check_last_dim_contiguous(t, name);
    check_same_device(t, name, residual_, "residual");
  }
  void small(const TensorView& t, const char* name, int rank) const {
    check_tensor(t, name, rank, {DType::kFloat32, reference_ ? DType::kFloat64 : DType::kFloat32});
    check_same_device(t, name, residual_, "residual");
  }

  const TensorView& residual_;
  bool reference_;
};

void check_options(const MhcOptions& o) {
  const auto eps = [](float value, const char* name) {
    if (!(value >= 0) || !std::isfinite(value))
      invalid("{} is {}, expected a finite number >= 0", name, value);
  };
  eps(o.rms_eps, "rms_eps");
  eps(o.pre_eps, "pre_eps");
  eps(o.sinkhorn_eps, "sinkhorn_eps");
  eps(o.norm_eps, "norm_eps");
  if (!std::isfinite(o.post_mult)) invalid("post_mult is {}, expected a finite number", o.post_mult);
  if (o.sinkhorn_repeat < 1 || o.sinkhorn_repeat > 1000) {
    invalid("sinkhorn_repeat is {}, expected 1 to 1000", o.sinkhorn_repeat);
  }
  if (o.num_threads < 0) invalid("num_threads is {}, expected >= 0", o.num_threads);
}

bool on_gpu(const TensorView& residual, const MhcOptions& o) {
  return api::backend_of(o.backend, residual, "residual") == Backend::kSm90;
}

/// A reference's tensors are the host's.
void check_on_host(const TensorView& residual, const MhcOptions& o) {
  if (!on_gpu(residual, o)) return;
  throw Unsupported(fmt::format("residual is {}; the reference runs on the CPU", residual.describe()));
}

}  // namespace

void mhc_pre(const TensorView& residual, const MhcWeights& weights, const MhcMixes& mixes,
             const MhcOptions& options) {
  const Checks checks(residual, /*reference=*/false);
  checks.weights(weights);
  checks.mixes(mixes);
  check_options(options);
  if (on_gpu(residual, options)) return sm90::mhc_pre(residual, weights, mixes, options);
  cpu::mhc_pre(residual, weights, mixes, options, cpu::threads_of_call(options.num_threads));
}

void mhc_post(const TensorView& x, const TensorView& residual, const TensorView& post, const TensorView& comb,
              const TensorView& out, const MhcOptions& options) {
  const MhcPostCall call{x, residual, post, comb, out};
  Checks(residual, /*reference=*/false).post(call);
  check_options(options);
  if (on_gpu(residual, options)) return sm90::mhc_post(call, options);
  cpu::mhc_post(call, cpu::threads_of_call(options.num_threads));
}

void mhc_post_pre(const TensorView& x, const TensorView& residual, const TensorView& post,
                  const TensorView& comb, const TensorView& out, const MhcWeights& weights,
                  const MhcMixes& mixes, const MhcOptions& options) {
  const MhcPostCall call{x, residual, post, comb, out};
  const Checks checks(residual, /*reference=*/false);
  checks.post(call);
  checks.weights(weights);
  checks.mixes(mixes);
  check_options(options);
  if (on_gpu(residual, options)) return sm90::mhc_post_pre(call, weights, mixes, options);
  cpu::mhc_post_pre(call, weights, mixes, options, cpu::threads_of_call(options.num_threads));
}

namespace reference {

void mhc_pre(const TensorView& residual, const MhcWeights& weights, const MhcMixes& mixes,
             const MhcOptions& options) {
  const Checks checks(residual, /*reference=*/true);
  checks.weights(weights);
  checks.mixes(mixes);
  check_options(options);
  check_on_host(residual, options);
  mhc_pre_unchecked(residual, weights, mixes, options);
}

void mhc_post(const TensorView& x, const TensorView& residual, const TensorView& post, const TensorView& comb,
              const TensorView& out, const MhcOptions& options) {
  const MhcPostCall call{x, residual, post, comb, out};
  Checks(residual, /*reference=*/true).post(call);
  check_options(options);
  check_on_host(residual, options);
  mhc_post_unchecked(call);
}

}  // namespace reference
}  // namespace flash_mla
