#pragma once

// How a call is timed on the GPU.

#include <functional>

#include "bench/gpu/resources.h"

namespace flash_mla::bench::gpu {

double median(std::vector<double> values);

/// Times calls that find none of their data in L2.
class ColdTimer {
 public:
  explicit ColdTimer(const Stream& stream);
  /// Milliseconds of `reps` calls. Each follows a read pass over 256 MiB and is queued behind a spin kernel,
  /// so that the host is ahead; events stand around it.
  std::vector<double> times(const std::function<void()>& call, int reps) const;

 private:
  const Stream& stream_;
  DeviceArray<std::byte> flush_;
  DeviceArray<std::uint32_t> sink_;
};

/// A call captured `calls` times in a row.
class Graph {
 public:
  Graph(const std::function<void()>& call, int calls, const Stream& stream);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(const Stream& stream) const;

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

/// Keeps the GPU busy with next to nothing for about 50 ms: what ran before may have lowered its clocks.
void settle(const Stream& stream);

/// Milliseconds per call of a CUDA graph of `calls` back-to-back calls: the median of a few launches, the
/// caches as the call before left them.
double graph_time(const std::function<void()>& call, int calls, const Stream& stream);

/// Microseconds that a call takes the host, over 1000 calls in batches that the GPU's queue has room for.
double host_time(const std::function<void()>& call, const Stream& stream);

}  // namespace flash_mla::bench::gpu
