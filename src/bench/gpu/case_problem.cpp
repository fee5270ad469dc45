#include "bench/gpu/case_problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "bench/gpu/kernels.h"
#include "bench/gpu/timing.h"
#include "bench/machine.h"
#include "flash_mla/error.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr int kGraphCalls = 20;
constexpr double kMostHostTimed = 500;    // us: a thousand calls in half a second
constexpr double kMostGraphTimed = 5000;  // us: 80 calls in under half a second

/// A copy of so many bytes, read and written together.
void time_copy(CaseRow& row, double read_and_written, const ColdTimer& timer, const Stream& stream) {
  const std::size_t bytes = static_cast<std::size_t>(read_and_written / 2) / 16 * 16;
  const DeviceArray<std::byte> from(bytes), to(bytes);
  fill_normal(from.data(), DType::kBFloat16, static_cast<std::int64_t>(bytes / 2), 1, stream.get());
  const auto copy = [&] { copy_all(from.data(), to.data(), bytes, stream.get()); };
  settle(stream);
  row.copy_us = 1e3 * median(timer.times(copy, row.reps));
  row.copy_graph_us = 1e3 * graph_time(copy, kGraphCalls, stream);
}

}  // namespace

void require_memory(const std::string& name, std::size_t bytes) {
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  // Some for lists, the workspace and the reference.
  if (bytes + bytes / 8 + (std::size_t{1} << 30) > free) {
    throw std::runtime_error(fmt::format("case {} needs {} of GPU memory, {} are free", name,
                                         format_bytes(static_cast<double>(bytes)),
                                         format_bytes(static_cast<double>(free))));
  }
}

void measure_case(CaseRow& row, const std::function<std::unique_ptr<CaseProblem>(const Stream&)>& make,
                  double copy_bytes, int reps) {
  const Stream stream;
  std::unique_ptr<CaseProblem> problem;
  try {
    problem = make(stream);
    problem->call(stream);
  } catch (const Unsupported& e) {
    row.not_in_build = e.what();
    return;
  }
  row.reps = reps;
  row.workspace_bytes = problem->workspace_bytes();
  const auto call = [&] { problem->call(stream); };
  stream.wait();
  row.failure = problem->wrong(row.max_abs_error, stream);
  row.correct = row.failure.empty();

  const ColdTimer timer(stream);
  settle(stream);
  std::vector<double> times = timer.times(call, reps);
  row.us_least = 1e3 * *std::min_element(times.begin(), times.end());
  row.us = 1e3 * median(std::move(times));
  if (row.us < kMostGraphTimed) row.graph_us = 1e3 * graph_time(call, kGraphCalls, stream);
  if (row.us < kMostHostTimed) row.host_us = host_time(call, stream);
  if (copy_bytes > 0) time_copy(row, copy_bytes, timer, stream);
}

}  // namespace flash_mla::bench::gpu
