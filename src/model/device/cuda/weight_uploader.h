#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <initializer_list>

#include "model/device/cuda/memory.h"

namespace flash_mla::model {

/// Weights of the host to the device, through page-locked memory: while one half of it is being sent the
/// other is filled.
class WeightUploader {
 public:
  struct Part {
    std::byte* out = nullptr;  // on the device
    std::size_t bytes = 0;
  };

  explicit WeightUploader(cudaStream_t stream);
  ~WeightUploader();
  WeightUploader(const WeightUploader&) = delete;
  WeightUploader& operator=(const WeightUploader&) = delete;

  /// `fill(host)` writes the parts' bytes, one part behind the other.
  template <class Fill>
  void upload(std::initializer_list<Part> parts, const Fill& fill) {
    std::size_t bytes = 0;
    for (const Part& part : parts) bytes += part.bytes;
    fill(next_half(bytes));
    send(parts);
  }
  /// `data` is free again when this returns.
  void upload(const std::byte* data, std::size_t bytes, std::byte* out);

 private:
  struct Half {
    PinnedBuffer host;
    cudaEvent_t sent = nullptr;
  };

  std::byte* next_half(std::size_t bytes);
  void send(std::initializer_list<Part> parts);

  Half halves_[2];
  std::size_t next_ = 0;  // the half that is filled next
  cudaStream_t stream_;
};

}  // namespace flash_mla::model
