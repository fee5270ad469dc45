#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <memory>
#include <vector>

#include "base/buffer.h"
#include "model/device.h"
#include "model/device/cuda/stream.h"

namespace flash_mla::model {

/// Copies on a stream of their own, which waits for the steps' stream where it is told to and holds up none of them.
///
/// They are queued by batches of kBatchBytes, of which two are under way: a step's own few bytes stand in the same engine's
/// line, behind no more than these, and a call for each page and layer would take longer than its copy.
class CudaCopyQueue : public CopyQueue {
 public:
  /// `steps`: a stream of the GPU of that CUDA index.
  CudaCopyQueue(cudaStream_t steps, int device);
  ~CudaCopyQueue() override { cudaStreamSynchronize(*stream_); }

  void wait_for_steps() override;
  /// May wait for earlier copies.
  void copy(std::byte* to, const std::byte* from, std::size_t bytes) override;
  std::unique_ptr<CopyMark> mark() override;

 private:
  static constexpr std::size_t kBatchBytes = 2 << 20;

  void flush();

  cudaStream_t steps_;
  int device_;
  std::unique_ptr<Stream> stream_;
  // What is to be queued next.
  std::vector<void*> to_;
  std::vector<const void*> from_;
  std::vector<std::size_t> sizes_;
  std::size_t bytes_ = 0;
  std::array<std::unique_ptr<CopyMark>, 2> under_way_;  ///< the older batch first
};

/// Page-locked memory of the host. Throws std::bad_alloc.
Buffer allocate_pinned(std::size_t bytes);

}  // namespace flash_mla::model
