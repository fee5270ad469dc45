#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>

#include "base/buffer.h"
#include "model/device.h"
#include "model/device/cuda/stream.h"

namespace flash_mla::model {

/// Copies on a stream of their own, which waits for the steps' stream where it is told to and holds up none of them.
class CudaCopyQueue : public CopyQueue {
 public:
  /// `steps`: a stream of the GPU of that CUDA index.
  CudaCopyQueue(cudaStream_t steps, int device);
  ~CudaCopyQueue() override { cudaStreamSynchronize(*stream_); }

  void wait_for_steps() override;
  void copy(std::byte* to, const std::byte* from, std::size_t bytes) override;
  std::unique_ptr<CopyMark> mark() override;

 private:
  cudaStream_t steps_;
  int device_;
  std::unique_ptr<Stream> stream_;
};

/// Page-locked memory of the host. Throws std::bad_alloc.
Buffer allocate_pinned(std::size_t bytes);

}  // namespace flash_mla::model
