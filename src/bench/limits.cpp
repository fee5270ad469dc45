#include "bench/limits.h"

#include <immintrin.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "bench/machine.h"
#include "bench/problem.h"
#include "flash_mla/info.h"

namespace flash_mla::bench {
namespace {

using Clock = std::chrono::steady_clock;

// Sixteen accumulators cover the latency (4 or 5 clocks) of two FMA units.
constexpr int kAccumulators = 16;
constexpr std::int64_t kPeakSteps = 20000;
// Results go here so that nothing measured is optimised away.
volatile float sink;

// Each returns the FLOP it did.
double fma_sse2() {
  __m128 acc[kAccumulators];
  for (auto& x : acc) x = _mm_set1_ps(1.0f);
  const __m128 a = _mm_set1_ps(0.999f), b = _mm_set1_ps(0.001f);
  for (std::int64_t i = 0; i < kPeakSteps; ++i) {
    for (auto& x : acc) x = _mm_add_ps(_mm_mul_ps(x, a), b);
  }
  for (auto& x : acc) sink = _mm_cvtss_f32(x);
  return 2.0 * 4 * kAccumulators * static_cast<double>(kPeakSteps);
}

__attribute__((target("avx2,fma"))) double fma_avx2() {
  constexpr int kCount = 12;  // of 16 registers
  __m256 acc[kCount];
  for (auto& x : acc) x = _mm256_set1_ps(1.0f);
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
  for (std::int64_t i = 0; i < kPeakSteps; ++i) {
    for (auto& x : acc) x = _mm256_fmadd_ps(x, a, b);
  }
  for (auto& x : acc) sink = _mm256_cvtss_f32(x);
  return 2.0 * 8 * kCount * static_cast<double>(kPeakSteps);
}

__attribute__((target("avx512f"))) double fma_avx512() {
  __m512 acc[kAccumulators];
  for (auto& x : acc) x = _mm512_set1_ps(1.0f);
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
  for (std::int64_t i = 0; i < kPeakSteps; ++i) {
    for (auto& x : acc) x = _mm512_fmadd_ps(x, a, b);
  }
  for (auto& x : acc) sink = _mm512_cvtss_f32(x);
  return 2.0 * 16 * kAccumulators * static_cast<double>(kPeakSteps);
}

__attribute__((target("avx512f,avx512bf16"))) double dot_avx512_bf16() {
  __m512 acc[kAccumulators];
  for (auto& x : acc) x = _mm512_set1_ps(0.0f);
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3C003C00);  // pairs of 2^-7
  for (std::int64_t i = 0; i < kPeakSteps; ++i) {
    for (auto& x : acc) x = _mm512_dpbf16_ps(x, a, a);
  }
  for (auto& x : acc) sink = _mm512_cvtss_f32(x);
  return 2.0 * 32 * kAccumulators * static_cast<double>(kPeakSteps);
}

// Four sums of tiles cover the latency of the matrix unit; tiles stay in their registers.
__attribute__((target("amx-tile,amx-bf16"))) double dot_amx() {
  struct alignas(64) Config {
    std::uint8_t palette = 1, rest[15] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
  };
  static constexpr Config kConfig;
  _tile_loadconfig(&kConfig);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (std::int64_t i = 0; i < kPeakSteps; ++i) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_release();
  return 2.0 * 4 * 16 * 16 * 32 * static_cast<double>(kPeakSteps);
}

// Sums `bytes` (a multiple of 256) from `data`.
float read_sse2(const char* data, std::size_t bytes) {
  __m128i acc[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
  for (std::size_t i = 0; i < bytes; i += 64) {
    for (std::size_t j = 0; j < 4; ++j) {
      acc[j] = _mm_xor_si128(acc[j], _mm_load_si128(reinterpret_cast<const __m128i*>(data + i + 16 * j)));
    }
  }
  const __m128i all = _mm_xor_si128(_mm_xor_si128(acc[0], acc[1]), _mm_xor_si128(acc[2], acc[3]));
  return static_cast<float>(_mm_cvtsi128_si32(all));
}

__attribute__((target("avx2"))) float read_avx2(const char* data, std::size_t bytes) {
  __m256i acc[8];
  for (auto& x : acc) x = _mm256_setzero_si256();
  for (std::size_t i = 0; i < bytes; i += 256) {
    for (std::size_t j = 0; j < 8; ++j) {
      acc[j] =
          _mm256_xor_si256(acc[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + i + 32 * j)));
    }
  }
  for (std::size_t j = 1; j < 8; ++j) acc[0] = _mm256_xor_si256(acc[0], acc[j]);
  return static_cast<float>(_mm_cvtsi128_si32(_mm256_castsi256_si128(acc[0])));
}

// Runs `work` (returns units done) over and over on every thread at once for `seconds`; best round's units
// per second, all threads together.
double rate(int threads, double seconds, const std::function<double(int thread)>& work) {
  std::barrier sync(threads);
  std::vector<double> units(static_cast<std::size_t>(threads));
  double best = 0;
  bool stop = false;
  const auto body = [&](int thread) {
    Clock::time_point begin{}, started{};
    if (thread == 0) begin = Clock::now();
    for (;;) {
      sync.arrive_and_wait();
      if (stop) return;
      if (thread == 0) started = Clock::now();
      units[static_cast<std::size_t>(thread)] = work(thread);
      sync.arrive_and_wait();
      if (thread == 0) {
        const auto now = Clock::now();
        double sum = 0;
        for (const double u : units) sum += u;
        best = std::max(best, sum / std::chrono::duration<double>(now - started).count());
        // A round that only prepared (rate 0) never ends it.
        stop = best > 0 && std::chrono::duration<double>(now - begin).count() > seconds;
      }
    }
  };
  std::vector<std::jthread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
  body(0);
  return best;
}

double measure_read(int threads, double seconds) {
  constexpr std::size_t kGrain = 4096;
  const Machine& m = machine();
  std::size_t bytes = std::max<std::size_t>(8 * m.l3_bytes, std::size_t{256} << 20);
  bytes = std::min(bytes, m.memory_bytes / 8);
  const std::size_t share = bytes / static_cast<std::size_t>(threads) / kGrain * kGrain;
  const Buffer buffer(share * static_cast<std::size_t>(threads));
  auto* data = static_cast<char*>(buffer.data());
  const bool avx2 = __builtin_cpu_supports("avx2") != 0;
  // Each thread touches its own share first, so that pages lie near it.
  std::vector<char> touched(static_cast<std::size_t>(threads), 0);
  return rate(threads, seconds,
              [&](int thread) {
                char* mine = data + static_cast<std::size_t>(thread) * share;
                if (touched[static_cast<std::size_t>(thread)] == 0) {
                  touched[static_cast<std::size_t>(thread)] = 1;
                  std::memset(mine, thread + 1, share);
                  return 0.0;
                }
                sink = avx2 ? read_avx2(mine, share) : read_sse2(mine, share);
                return static_cast<double>(share);
              }) /
         1e9;
}

double measure_fma(int threads, double seconds) {
  double (*work)() = fma_sse2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) work = fma_avx2;
  if (__builtin_cpu_supports("avx512f")) work = fma_avx512;
  return rate(threads, seconds, [&](int) { return work(); }) / 1e9;
}

}  // namespace

double Limits::peak_gflops(DType dtype) const {
  return dtype == DType::kBFloat16 ? std::max(fp32_gflops, bf16_gflops) : fp32_gflops;
}

double Limits::seconds(DType dtype, double flop, double bytes) const {
  return std::max(flop / (peak_gflops(dtype) * 1e9), bytes / (read_gbps * 1e9));
}

Limits measure_limits(int threads, double seconds) {
  __builtin_cpu_init();
  Limits limits;
  limits.threads = threads;
  limits.read_gbps = measure_read(threads, seconds);
  limits.fp32_gflops = measure_fma(threads, seconds);
  if (__builtin_cpu_supports("avx512bf16")) {
    // The kernels' choice: the matrix unit where they may use it.
    const std::vector<std::string> isas = cpu_isa().available;
    const bool amx = std::ranges::find(isas, "avx512_amx") != isas.end();
    limits.bf16_gflops =
        rate(threads, seconds, [amx](int) { return amx ? dot_amx() : dot_avx512_bf16(); }) / 1e9;
  }
  return limits;
}

nlohmann::ordered_json to_json(const Limits& limits) {
  return {{"threads", limits.threads},
          {"read_gbps", limits.read_gbps},
          {"fp32_gflops", limits.fp32_gflops},
          {"bf16_gflops", limits.bf16_gflops}};
}

}  // namespace flash_mla::bench
