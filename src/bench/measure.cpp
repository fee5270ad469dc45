#include "bench/measure.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "bench/machine.h"

namespace flash_mla::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRounds = 3;

// Reads more than the last-level cache holds, so that the next repetition starts without its data there.
class CacheFlusher {
 public:
  CacheFlusher() : buffer_(std::max<std::size_t>(2 * machine().l3_bytes, std::size_t{64} << 20)) {
    std::memset(buffer_.data(), 1, buffer_.bytes());
  }
  void flush() {
    auto* words = static_cast<volatile std::uint64_t*>(buffer_.data());
    for (std::size_t i = 0; i < buffer_.bytes() / 8; i += 8) words[i] = words[i] + 1;
  }

 private:
  Buffer buffer_;
};

// Appends the times of at least `reps` calls that take at least `min_seconds` together.
void time_calls(const std::function<void()>& call, int reps, double min_seconds, CacheFlusher* flusher,
                std::vector<double>& times) {
  double total = 0;
  for (int i = 0; i < reps || total < min_seconds; ++i) {
    if (flusher != nullptr) flusher->flush();
    const auto start = Clock::now();
    call();
    times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    total += times.back();
  }
}

Timing summarise(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const std::size_t n = times.size();
  return {n % 2 == 1 ? times[n / 2] : (times[n / 2 - 1] + times[n / 2]) / 2, times.front(),
          static_cast<int>(n)};
}

// The two matrix products of attention as fp32 GEMMs, per request and latent head: S = Q K^T and O = S V with
// V the first 512 columns of K. No softmax, no paging, no conversion: the arithmetic alone.
class Products {
 public:
  Products(const Blas& blas, const ProblemSpec& spec)
      : blas_(blas),
        spec_(spec),
        rows_(spec.s_q * (spec.h_q / spec.h_kv)),
        longest_(*std::max_element(spec.cache_seqlens.begin(), spec.cache_seqlens.end())) {
    const std::int64_t problems = spec.batch() * spec.h_kv;
    q_ = random_floats(problems * rows_ * spec.d_qk());
    k_ = random_floats(spec.tokens() * spec.h_kv * spec.d_qk());
    s_ = Buffer(sizeof(float) * static_cast<std::size_t>(rows_) * static_cast<std::size_t>(longest_));
    o_ = Buffer(sizeof(float) * static_cast<std::size_t>(problems * rows_ * spec.d_v));
    std::memset(s_.data(), 0, s_.bytes());
    std::memset(o_.data(), 0, o_.bytes());
  }
  void run() const {
    const int d_qk = spec_.d_qk(), d_v = spec_.d_v;
    const auto* q = static_cast<const float*>(q_.data());
    const auto* k = static_cast<const float*>(k_.data());
    auto* s = static_cast<float*>(s_.data());
    auto* o = static_cast<float*>(o_.data());
    for (const std::int32_t length : spec_.cache_seqlens) {
      for (int head = 0; head < spec_.h_kv; ++head) {
        blas_.sgemm(true, rows_, length, d_qk, 1.0f / 24, q, d_qk, k, d_qk, s, length);
        blas_.sgemm(false, rows_, d_v, length, 1.0f, s, length, k, d_qk, o, d_v);
        q += static_cast<std::ptrdiff_t>(rows_) * d_qk;
        k += static_cast<std::ptrdiff_t>(length) * d_qk;
        o += static_cast<std::ptrdiff_t>(rows_) * d_v;
      }
    }
  }

 private:
  Buffer random_floats(std::int64_t count) const {
    Buffer buffer(sizeof(float) * static_cast<std::size_t>(count));
    Random random(spec_.seed + 1);
    for (std::int64_t i = 0; i < count; ++i) static_cast<float*>(buffer.data())[i] = random.normal() / 10.0f;
    return buffer;
  }

  const Blas& blas_;
  const ProblemSpec& spec_;
  int rows_, longest_;
  Buffer q_, k_, s_, o_;
};

// Worker threads of OpenMP and of OpenBLAS spin for some milliseconds after their last work; let them fall
// asleep before the other side is timed.
void settle() { std::this_thread::sleep_for(std::chrono::milliseconds(60)); }

}  // namespace

bool Row::memory_bound() const {
  return bytes / (limits.read_gbps * 1e9) > flop / (limits.peak_gflops(shape.dtype) * 1e9);
}

nlohmann::ordered_json to_json(const Row& row) {
  const Shape& s = row.shape;
  nlohmann::ordered_json json = {
      {"name", s.name},
      {"b", s.b},
      {"s_q", s.s_q},
      {"h_q", s.h_q},
      {"h_kv", s.h_kv},
      {"s_k", s.s_k},
      {"tokens", row.tokens},
      {"varlen", s.varlen},
      {"causal", s.causal},
      {"dtype", dtype_name(s.dtype)},
      {"page_size", s.page_size},
      {"threads", row.threads},
      {"cache", row.cold ? "cold" : "warm"},
      {"reps", row.time.reps},
      {"ms", row.time.median * 1e3},
      {"ms_best", row.time.best * 1e3},
      {"gflops", row.gflops()},
      {"gbps", row.gbps()},
      {"intensity", row.flop / row.bytes},
      {"sgemm_ms", nullptr},
      {"sgemm_gflops", nullptr},
      {"ratio_sgemm", nullptr},
      {"limit_fraction", row.limit_fraction()},
      {"limited_by", row.memory_bound() ? "memory" : "arithmetic"},
      {"workspace_bytes", row.workspace_bytes},
      {"peak_rss_bytes", row.peak_rss_bytes},
  };
  if (row.sgemm.reps > 0) {
    json["sgemm_ms"] = row.sgemm.median * 1e3;
    json["sgemm_gflops"] = row.sgemm_gflops();
    json["ratio_sgemm"] = row.gflops() / row.sgemm_gflops();
  }
  return json;
}

Row measure_shape(const Shape& shape, const Problem& problem, const Limits& limits, const Blas* blas,
                  const MeasureOptions& options) {
  Row row;
  row.shape = shape;
  row.tokens = problem.spec().tokens();
  row.threads = limits.threads;
  row.cold = options.cold;
  row.flop = problem.spec().flop();
  row.bytes = problem.spec().bytes();
  row.limits = limits;

  reset_peak_rss();
  const DecodeRun decode(problem, limits.threads);
  row.workspace_bytes = decode.workspace_bytes();
  decode.run();  // touches the pages and starts the threads
  row.peak_rss_bytes = peak_rss_bytes();

  std::optional<Products> products;
  if (blas != nullptr) {
    blas->set_num_threads(limits.threads);
    products.emplace(*blas, problem.spec());
    products->run();
  }
  std::optional<CacheFlusher> flusher;
  if (options.cold) flusher.emplace();
  CacheFlusher* flush = flusher ? &*flusher : nullptr;
  const int reps = (options.reps + kRounds - 1) / kRounds;
  std::vector<double> ours, theirs;
  for (int round = 0; round < kRounds; ++round) {
    settle();
    time_calls([&] { decode.run(); }, reps, options.min_seconds / kRounds, flush, ours);
    if (!products) continue;
    settle();
    time_calls([&] { products->run(); }, reps, options.min_seconds / kRounds, flush, theirs);
  }
  row.time = summarise(ours);
  if (products) row.sgemm = summarise(theirs);
  return row;
}

}  // namespace flash_mla::bench
