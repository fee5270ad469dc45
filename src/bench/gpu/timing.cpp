#include "bench/gpu/timing.h"

#include <chrono>

#include "bench/gpu/kernels.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr std::size_t kFlushBytes = std::size_t{256} << 20;
constexpr long long kSpinClocks = 40000;  // about 22 us, more than the host needs to queue a call
constexpr int kWarmUp = 3;

}  // namespace

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

ColdTimer::ColdTimer(const Stream& stream) : stream_(stream), flush_(kFlushBytes), sink_(1) {
  flush_.set(1);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

std::vector<double> ColdTimer::times(const std::function<void()>& call, int reps) const {
  const Event begin, end;
  std::vector<double> ms;
  for (int i = -kWarmUp; i < reps; ++i) {
    read_all(flush_.data(), kFlushBytes, sink_.data(), stream_.get());
    spin(kSpinClocks, stream_.get());
    begin.record(stream_);
    call();
    end.record(stream_);
    const double time = end.since(begin);
    if (i >= 0) ms.push_back(time);
  }
  return ms;
}

Graph::Graph(const std::function<void()>& call, int calls, const Stream& stream) {
  check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  for (int i = 0; i < calls; ++i) call();
  check(cudaStreamEndCapture(stream.get(), &graph_), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&exec_, graph_, 0), "cudaGraphInstantiate");
}

Graph::~Graph() {
  cudaGraphExecDestroy(exec_);
  cudaGraphDestroy(graph_);
}

void Graph::launch(const Stream& stream) const {
  check(cudaGraphLaunch(exec_, stream.get()), "cudaGraphLaunch");
}

void settle(const Stream& stream) {
  constexpr long long kClocks = 100'000'000;
  spin(kClocks, stream.get());
  stream.wait();
}

double graph_time(const std::function<void()>& call, int calls, const Stream& stream) {
  constexpr int kLaunches = 3;
  const Graph graph(call, calls, stream);
  graph.launch(stream);
  const Event begin, end;
  std::vector<double> ms;
  for (int i = 0; i < kLaunches; ++i) {
    spin(kSpinClocks, stream.get());
    begin.record(stream);
    graph.launch(stream);
    end.record(stream);
    ms.push_back(end.since(begin) / calls);
  }
  return median(std::move(ms));
}

double host_time(const std::function<void()>& call, const Stream& stream) {
  using Clock = std::chrono::steady_clock;
  constexpr int kBatches = 10, kCalls = 100;
  std::vector<double> us;
  for (int batch = 0; batch < kBatches; ++batch) {
    const auto begin = Clock::now();
    for (int i = 0; i < kCalls; ++i) call();
    us.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count() / kCalls);
    stream.wait();
  }
  return median(std::move(us));
}

}  // namespace flash_mla::bench::gpu
