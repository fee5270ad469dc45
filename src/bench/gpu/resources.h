#pragma once

// CUDA objects that clean up behind themselves.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <utility>

#include "base/cuda/check.h"

namespace flash_mla::bench::gpu {

/// Device memory of `count` elements.
template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(std::size_t count) : count_(count) {
    check(cudaMalloc(&data_, std::max(bytes(), std::size_t{256})), "cudaMalloc");
  }
  template <class Container>
  static DeviceArray of(const Container& values) {
    DeviceArray array(values.size());
    check(cudaMemcpy(array.data_, values.data(), array.bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
    return array;
  }
  DeviceArray(DeviceArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return static_cast<T*>(data_); }
  std::size_t bytes() const { return count_ * sizeof(T); }
  /// Every byte; 0xFF makes every floating type NaN.
  void set(int byte) const { check(cudaMemset(data_, byte, bytes()), "cudaMemset"); }

 private:
  void* data_ = nullptr;
  std::size_t count_ = 0;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }
  void wait() const { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(const Stream& stream) const { check(cudaEventRecord(event_, stream.get()), "cudaEventRecord"); }
  /// Waits for this event; milliseconds since `before`.
  double since(const Event& before) const {
    check(cudaEventSynchronize(event_), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, before.event_, event_), "cudaEventElapsedTime");
    return double{ms};
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace flash_mla::bench::gpu
