#include "model/device/cuda/graph_cache.h"

#include "base/cuda/check.h"

namespace flash_mla::model {

GraphCache::Graph::Graph(cudaGraph_t graph) {
  const cudaError_t error = cudaGraphInstantiate(&exec_, graph, 0);
  cudaGraphDestroy(graph);
  check(error, "cudaGraphInstantiate");
}

GraphCache::Graph::~Graph() { cudaGraphExecDestroy(exec_); }

void GraphCache::Graph::launch(cudaStream_t stream) const {
  check(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch");
}

void GraphCache::check_memory(const DevicePool& pool) {
  if (allocations_ == pool.allocations()) return;
  graphs_.clear();
  allocations_ = pool.allocations();
}

void GraphCache::run(const Key& key, const DevicePool& pool, cudaStream_t stream,
                     const std::function<void()>& pass) {
  check_memory(pool);
  if (const auto found = graphs_.find(key); found != graphs_.end()) {
    found->second.launch(stream);
    return;
  }
  // Whatever the step allocates or looks up for the first time, it does now.
  pass();
  check_memory(pool);
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    pass();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  graphs_.try_emplace(key, graph);
}

}  // namespace flash_mla::model
