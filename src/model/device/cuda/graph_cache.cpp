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

void GraphCache::Graph::upload(cudaStream_t stream) const {
  check(cudaGraphUpload(exec_, stream), "cudaGraphUpload");
}

void GraphCache::check_memory(std::size_t allocations) {
  if (allocations_ == allocations) return;
  graphs_.clear();
  allocations_ = allocations;
}

void GraphCache::run(const Key& key, const std::function<std::size_t()>& allocations, cudaStream_t stream,
                     const std::function<void()>& pass, bool ranks) {
  check_memory(allocations());
  if (const auto found = graphs_.find(key); found != graphs_.end()) {
    found->second.launch(stream);
    return;
  }
  // Whatever the step allocates or looks up for the first time, it does now.
  pass();
  check_memory(allocations());
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
  const Graph& made = graphs_.try_emplace(key, graph).first->second;
  if (ranks) made.upload(stream);
}

}  // namespace flash_mla::model
