// Problems of append_kv and merge_states.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/element.h"
#include "bench/gpu/kernels.h"
#include "bench/gpu/sparse_problem.h"
#include "bench/problem.h"
#include "flash_mla/merge.h"
#include "kv/format.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr int kDimV = 512;
constexpr std::size_t kHalf = 2;

/// Tokens of a prompt, norm and RoPE included, to random slots: latent and rope as parts of one row, as a
/// projection leaves them.
class AppendProblem : public CaseProblem {
 public:
  AppendProblem(const SparseCase& c, std::uint64_t seed, const Stream& stream) : shape_(c) {
    const int d_qk = c.d_qk();
    const std::int64_t n = std::int64_t{c.b} * c.s_q, latent = d_qk - kv::kRopeWidth;
    const std::int64_t width = kv::is_fp8(c.format) ? kv::token_bytes(c.format, d_qk) : d_qk;
    const std::int64_t pages = (c.s_kv + c.page_size - 1) / c.page_size;
    Random random(seed);
    rows_.gpu = DeviceArray<std::uint16_t>(size(n * d_qk));
    fill_normal(rows_.gpu.data(), DType::kBFloat16, n * d_qk, 2 * seed + 1, stream.get());
    stream.wait();
    rows_.host = to_host(rows_.gpu);
    std::vector<std::int64_t> slots(size(c.s_kv)), positions(size(n));
    std::iota(slots.begin(), slots.end(), 0);
    for (std::int64_t i = 0; i < n; ++i)
      std::swap(slots[size(i)], slots[size(random.integer(i, c.s_kv - 1))]);
    slots.resize(size(n));
    std::iota(positions.begin(), positions.end(), random.integer(0, c.s_kv - n));
    std::vector<float> weight(size(latent)), cos_sin(size(std::int64_t{c.s_kv} * kv::kRopeWidth));
    for (float& w : weight) w = 1.0f + random.normal() / 4;
    for (std::int64_t at = 0; at < static_cast<std::int64_t>(cos_sin.size()); ++at) {
      const std::int64_t position = at / kv::kRopeWidth, i = at % kv::kRopeWidth, pairs = kv::kRopeWidth / 2;
      const double angle = static_cast<double>(position) *
                           std::pow(10000.0, -static_cast<double>(i % pairs) / static_cast<double>(pairs));
      cos_sin[size(at)] = static_cast<float>(i < pairs ? std::cos(angle) : std::sin(angle));
    }
    slots_ = Both(std::move(slots));
    positions_ = Both(std::move(positions));
    weight_ = Both(std::move(weight));
    cos_sin_ = Both(std::move(cos_sin));
    cache_ = Both(std::vector<std::uint8_t>(
        size(pages * c.page_size * width) * (kv::is_fp8(c.format) ? 1 : kHalf), 0xFF));
    args_ = arguments(true);
    // The copies above are on another stream than what follows.
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  void call(const Stream& stream) const override { append_kv(args_, {.stream = stream.get()}); }
  std::string wrong(double&, const Stream&) const override {
    AppendProblem& self = const_cast<AppendProblem&>(*this);  // its host memory is written
    append_kv(self.arguments(false));
    const std::vector<std::uint8_t> got = to_host(cache_.gpu);
    const auto at = std::mismatch(got.begin(), got.end(), cache_.host.begin()).first - got.begin();
    if (at == static_cast<std::ptrdiff_t>(got.size())) return "";
    return fmt::format("byte {} of the cache is {}, expected {}, the CPU's", at, got[size(at)],
                       cache_.host[size(at)]);
  }

 private:
  KvAppendArgs arguments(bool on_gpu) {
    const int d_qk = shape_.d_qk();
    const std::int64_t n = std::int64_t{shape_.b} * shape_.s_q, latent = d_qk - kv::kRopeWidth;
    KvAppendArgs a;
    a.latent = a.rope = rows_.view(on_gpu, DType::kBFloat16, {n, d_qk});
    a.latent.shape[1] = latent;
    a.rope.shape[1] = kv::kRopeWidth;
    a.rope.data = a.latent.ptr<std::uint16_t>() + latent;
    a.slot_mapping = slots_.view(on_gpu, DType::kInt64, {n});
    a.positions = positions_.view(on_gpu, DType::kInt64, {n});
    a.norm_weight = weight_.view(on_gpu, DType::kFloat32, {latent});
    a.cos_sin = cos_sin_.view(on_gpu, DType::kFloat32, {shape_.s_kv, kv::kRopeWidth});
    a.cache.format = shape_.format;
    const bool fp8 = kv::is_fp8(shape_.format);
    const std::int64_t pages = (shape_.s_kv + shape_.page_size - 1) / shape_.page_size;
    a.cache.data =
        cache_.view(on_gpu, fp8 ? DType::kUInt8 : DType::kBFloat16,
                    {pages, shape_.page_size, 1, fp8 ? kv::token_bytes(shape_.format, d_qk) : d_qk});
    return a;
  }

  SparseCase shape_;
  Both<std::uint16_t> rows_;
  Both<std::int64_t> slots_, positions_;
  Both<float> weight_, cos_sin_;
  Both<std::uint8_t> cache_;
  KvAppendArgs args_;
};

class MergeProblem : public CaseProblem {
 public:
  MergeProblem(const SparseCase& c, std::uint64_t seed, const Stream& stream) : shape_(c) {
    const std::int64_t rows = std::int64_t{c.b} * c.s_q * c.h_q;
    Random random(seed);
    for (int i = 0; i < 3; ++i) {
      out_[i] = DeviceArray<std::uint16_t>(size(rows * kDimV));
      lse_[i] = DeviceArray<float>(size(rows));
      out_[i].set(0xFF);
      lse_[i].set(0xFF);
      if (i == kResult) continue;
      fill_normal(out_[i].data(), DType::kBFloat16, rows * kDimV, 3 * seed + static_cast<std::uint64_t>(i),
                  stream.get());
      std::vector<float> lse(size(rows));
      for (float& x : lse) x = 8.0f + random.normal();
      lse_[i] = DeviceArray<float>::of(lse);
    }
    stream.wait();
    // The copies and fills above are on another stream than what follows.
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  void call(const Stream& stream) const override {
    const auto out = [&](int i) {
      return TensorView::contiguous(out_[i].data(), DType::kBFloat16,
                                    {shape_.b, shape_.s_q, shape_.h_q, kDimV}, kFirstGpu);
    };
    const auto lse = [&](int i) {
      return TensorView::contiguous(lse_[i].data(), DType::kFloat32, {shape_.b, shape_.h_q, shape_.s_q},
                                    kFirstGpu);
    };
    merge_states(out(0), lse(0), out(1), lse(1), out(kResult), lse(kResult), LseBase::kE, stream.get());
  }
  std::string wrong(double& max_abs_error, const Stream&) const override {
    std::vector<std::uint16_t> out[3];
    std::vector<float> lse[3];
    for (int i = 0; i < 3; ++i) {
      out[i] = to_host(out_[i]);
      lse[i] = to_host(lse_[i]);
    }
    for (std::size_t row = 0; row < lse[0].size(); ++row) {
      // Of out's order (b, s_q, h_q); lse is (b, h_q, s_q).
      const auto s_q = size(shape_.s_q), h_q = size(shape_.h_q), i = row / h_q % s_q;
      const std::size_t at = (row / h_q / s_q * h_q + row % h_q) * s_q + i;
      const double a = std::exp(double{lse[0][at]}), b = std::exp(double{lse[1][at]});
      if (!(std::abs(double{lse[kResult][at]} - std::log(a + b)) < 1e-5)) {
        return fmt::format("lse of row {} is {}, expected {}", row, lse[kResult][at], std::log(a + b));
      }
      for (std::size_t d = row * kDimV; d < (row + 1) * kDimV; ++d) {
        const auto value = [&](int state) { return double{to_float(Bf16{out[state][d]})}; };
        const double want = (a * value(0) + b * value(1)) / (a + b), off = std::abs(value(kResult) - want);
        max_abs_error = std::max(max_abs_error, off);
        if (!(off <= 0x1p-8 * std::abs(want) + 1e-6))
          return fmt::format("element {} of row {} is {}, expected {}", d % kDimV, row, value(kResult), want);
      }
    }
    return "";
  }

 private:
  static constexpr int kResult = 2;

  SparseCase shape_;
  DeviceArray<std::uint16_t> out_[3];
  DeviceArray<float> lse_[3];
};

}  // namespace

std::unique_ptr<CaseProblem> make_append_problem(const SparseCase& c, std::uint64_t seed,
                                                 const Stream& stream) {
  return std::make_unique<AppendProblem>(c, seed, stream);
}
std::unique_ptr<CaseProblem> make_merge_problem(const SparseCase& c, std::uint64_t seed,
                                                const Stream& stream) {
  return std::make_unique<MergeProblem>(c, seed, stream);
}

}  // namespace flash_mla::bench::gpu
