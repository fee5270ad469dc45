#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <tuple>

#include "model/device/cuda/memory.h"
#include "model/step.h"

namespace flash_mla::model {

/// Steps that are recorded as CUDA graphs the first time they come in their shape, and replayed from then on.
class GraphCache {
 public:
  /// Tokens, width of the block table, batch-invariant, whether any token is drawn, masked, whether an indexer chooses, the
  /// states that it reads (those of a module for multi-token prediction read some), whether one kernel does all layers,
  /// tokens of a request of attention: steps that agree in it make the same launches with the same arguments.
  using Key =
      std::tuple<std::int64_t, std::int64_t, bool, bool, bool, bool, ModuleStates, bool, std::int64_t>;

  /// Replays the step of that shape, or runs and records what `pass` queues on `stream`. Memory that it takes
  /// from `pool` the first time may not be taken for anything else.
  void run(const Key& key, const DevicePool& pool, cudaStream_t stream, const std::function<void()>& pass);

 private:
  class Graph {
   public:
    explicit Graph(cudaGraph_t graph);
    ~Graph();
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    void launch(cudaStream_t stream) const;

   private:
    cudaGraphExec_t exec_ = nullptr;
  };

  // Drops the graphs where something was allocated since they were made: what they point to may have moved.
  void check_memory(const DevicePool& pool);

  std::map<Key, Graph> graphs_;
  std::size_t allocations_ = 0;  // of the pool when graphs_ were made
};

}  // namespace flash_mla::model
