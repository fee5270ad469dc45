#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "base/buffer.h"
#include "base/cuda/check.h"
#include "model/device/cuda/memory.h"

namespace flash_mla::model {

/// Places arrays one behind the other: first to learn the size (host == nullptr), then to write.
class Packer {
 public:
  Packer(std::byte* host, std::byte* device) : host_(host), device_(device) {}

  /// Room for `count` values; `write(to)` fills it. Returns their place on the device, or null.
  template <class T, class F>
  T* place(std::size_t count, const F& write) {
    constexpr std::size_t kAlignment = 256;
    const std::size_t offset = bytes_;
    bytes_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    if (host_ == nullptr) return nullptr;
    write(reinterpret_cast<T*>(host_ + offset));
    return reinterpret_cast<T*>(device_ + offset);
  }
  template <class T>
  T* place(const std::vector<T>& values) {
    return place<T>(values.size(), [&](T* to) { std::copy(values.begin(), values.end(), to); });
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* host_;
  std::byte* device_;
  std::size_t bytes_ = 0;
};

/// Packs arrays into page-locked memory and sends them to the device in one copy. Their places there are the same for
/// arrays of the same sizes, until they have outgrown the memory.
class PackedUpload {
 public:
  PackedUpload() { check(cudaEventCreateWithFlags(&sent_, cudaEventDisableTiming), "cudaEventCreate"); }
  ~PackedUpload() { cudaEventDestroy(sent_); }
  PackedUpload(const PackedUpload&) = delete;
  PackedUpload& operator=(const PackedUpload&) = delete;

  /// Makes room for that many bytes.
  void reserve(std::size_t bytes, DevicePool& pool) {
    if (bytes > host_.bytes()) host_.grow(bytes);
    if (bytes > device_.bytes()) device_ = pool.allocate(bytes);
  }

  /// `pack(packer)` places the arrays, twice. What it wrote is on the device for what is queued behind.
  template <class F>
  void send(DevicePool& pool, cudaStream_t stream, const F& pack) {
    Packer measure(nullptr, nullptr);
    pack(measure);
    const std::size_t bytes = measure.bytes();
    check(cudaEventSynchronize(sent_), "cudaEventSynchronize");
    // Twice what is needed, since a batch that has grown grows on.
    if (bytes > std::min(host_.bytes(), device_.bytes())) reserve(2 * bytes, pool);
    Packer write(host_.data(), device_.data());
    pack(write);
    check(cudaMemcpyAsync(device_.data(), host_.data(), bytes, cudaMemcpyHostToDevice, stream),
          "cudaMemcpyAsync");
    check(cudaEventRecord(sent_, stream), "cudaEventRecord");
  }

 private:
  PinnedBuffer host_;
  Buffer device_;
  cudaEvent_t sent_ = nullptr;  // the last copy has read host_
};

}  // namespace flash_mla::model
