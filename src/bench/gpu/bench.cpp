#include "bench/gpu/bench.h"

#include <fmt/format.h>

#include <chrono>
#include <fstream>

#include "bench/gpu/kernels.h"
#include "bench/gpu/matmul.h"
#include "bench/gpu/timing.h"
#include "bench/gpu/verify.h"
#include "flash_mla/info.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr int kGraphCalls = 20;
constexpr int kLimitReps = 30;

std::string driver_version() {
  std::string version;
  std::getline(std::ifstream("/sys/module/nvidia/version"), version);
  if (!version.empty()) return version;
  // "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  ..."
  std::ifstream in("/proc/driver/nvidia/version");
  for (std::string word; in >> word;) {
    if (!word.empty() && word.find_first_not_of("0123456789.") == std::string::npos) return word;
  }
  return "unknown";
}

double milliseconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

double measure_read(std::size_t bytes) {
  const Stream stream;
  const DeviceArray<std::byte> data(bytes);
  const DeviceArray<std::uint32_t> sink(1);
  data.set(1);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  const double ms =
      graph_time([&] { read_all(data.data(), bytes, sink.data(), stream.get()); }, kLimitReps, stream);
  return static_cast<double>(bytes) / ms / 1e6;
}

double measure_copy(std::size_t bytes) {
  const Stream stream;
  const DeviceArray<std::byte> from(bytes), to(bytes);
  fill_normal(from.data(), DType::kBFloat16, static_cast<std::int64_t>(bytes / 2), 1, stream.get());
  const double ms =
      graph_time([&] { copy_all(from.data(), to.data(), bytes, stream.get()); }, kLimitReps, stream);
  return 2 * static_cast<double>(bytes) / ms / 1e6;
}

void measure_matmul(Limits& limits) {
  constexpr int kSize = 8192;
  const std::unique_ptr<Matmul> matmul = Matmul::load(kSize, limits.why_no_matmul);
  if (!matmul) return;
  limits.matmul_library = matmul->version();
  constexpr std::int64_t kCount = std::int64_t{kSize} * kSize;
  const Stream stream;
  const DeviceArray<std::byte> a(2 * kCount), b(2 * kCount), out(2 * kCount);
  fill_normal(a.data(), DType::kBFloat16, kCount, 1, stream.get());
  fill_normal(b.data(), DType::kBFloat16, kCount, 2, stream.get());
  const auto product = [&] { matmul->run(a.data(), b.data(), out.data(), stream); };
  product();  // loads what it needs, which a graph's capture would not allow
  stream.wait();
  // As a graph, since the library takes the host longer than the spin kernel lasts.
  const Graph graph(product, 1, stream);
  const ColdTimer timer(stream);
  settle(stream);
  const double gflop = 2.0 * kSize * kSize * kSize / 1e9;
  limits.matmul_gflops = gflop / (1e-3 * median(timer.times([&] { graph.launch(stream); }, kLimitReps)));
  limits.matmul_graph_gflops = gflop / (1e-3 * graph_time(product, kGraphCalls, stream));
}

}  // namespace

std::string why_unusable() {
  for (const BackendInfo& b : backends()) {
    // The first GPU is the one the benchmark runs on.
    if (b.backend == Backend::kSm90) return b.available ? "" : b.detail;
  }
  return "this library has no sm90 backend";
}

Device device() {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  return {properties.name, driver_version(),
          fmt::format("{}.{}", CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10),
          properties.multiProcessorCount, properties.totalGlobalMem};
}

FirstCall measure_first_call() {
  FirstCall times;
  times.context_ms = milliseconds_of([] { check(cudaFree(nullptr), "cudaFree"); });
  Shape shape;
  shape.name = "first call";
  shape.b = 1;
  shape.s_k = 1024;
  const Stream stream;
  const Problem problem(shape, lengths_of(shape, 0), 0, stream);
  const auto schedule = [&] {
    problem.build_schedule(stream);
    stream.wait();
  };
  const auto decode = [&] {
    problem.decode(stream);
    stream.wait();
  };
  times.schedule_ms = milliseconds_of(schedule);
  times.decode_ms = milliseconds_of(decode);
  times.second_schedule_ms = milliseconds_of(schedule);
  times.second_decode_ms = milliseconds_of(decode);
  return times;
}

Limits measure_limits() {
  Limits limits;
  limits.read_bytes = std::size_t{4} << 30;
  limits.read_gbps = measure_read(limits.read_bytes);
  limits.copy_gbps = measure_copy(limits.read_bytes / 2);
  measure_matmul(limits);
  return limits;
}

Row measure_row(const Shape& shape, const RowOptions& options) {
  Row row;
  row.shape = shape;
  row.reps = options.reps;
  const std::vector<std::int32_t> lengths = lengths_of(shape, options.seed);
  ProblemSpec spec = shape.problem(options.seed);
  spec.cache_seqlens = lengths;
  row.tokens = spec.tokens();
  row.flop = spec.flop();
  row.bytes = spec.bytes();

  const Stream stream;
  Problem problem(shape, lengths, options.seed, stream);
  row.workspace_bytes = problem.workspace_bytes();
  const auto decode = [&] { problem.decode(stream); };
  problem.build_schedule(stream);
  decode();
  stream.wait();
  const Comparison comparison = check_output(problem, options.seed, stream);
  row.correct = comparison.ok;
  row.failure = comparison.failure;
  row.max_abs_error = comparison.out_max_abs;

  const ColdTimer timer(stream);
  settle(stream);
  std::vector<double> times = timer.times(decode, options.reps);
  row.ms_least = *std::min_element(times.begin(), times.end());
  row.ms = median(std::move(times));
  row.schedule_us = 1e3 * graph_time([&] { problem.build_schedule(stream); }, kGraphCalls, stream);
  row.graph_us = 1e3 * graph_time(decode, kGraphCalls, stream);
  problem.empty_requests(stream);
  row.host_us = host_time(decode, stream);
  return row;
}

}  // namespace flash_mla::bench::gpu
