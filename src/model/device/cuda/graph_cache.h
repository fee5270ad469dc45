#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <tuple>

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

  /// Replays the step of that shape, or runs and records what `pass` queues on `stream`. `allocations()`: a number that
  /// changes whenever memory is taken that `pass` may use (DevicePool::allocations). `ranks`: kernels of several graphs will
  /// wait for each other.
  void run(const Key& key, const std::function<std::size_t()>& allocations, cudaStream_t stream,
           const std::function<void()>& pass, bool ranks = false);

 private:
  class Graph {
   public:
    explicit Graph(cudaGraph_t graph);
    ~Graph();
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    void launch(cudaStream_t stream) const;
    /// Does what the first launch would do, which may take memory.
    void upload(cudaStream_t stream) const;

   private:
    cudaGraphExec_t exec_ = nullptr;
  };

  // Drops the graphs where something was allocated since they were made: what they point to may have moved.
  void check_memory(std::size_t allocations);

  std::map<Key, Graph> graphs_;
  std::size_t allocations_ = 0;  // when graphs_ were made
};

}  // namespace flash_mla::model
