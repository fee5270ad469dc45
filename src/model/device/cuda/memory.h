#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <memory>
#include <vector>

#include "base/buffer.h"
#include "model/device.h"

namespace flash_mla::model {

/// Device memory that is kept when it is freed and handed out again, by size. All of it is used on one
/// stream, so that what frees a buffer is queued before whatever its next owner does.
class DevicePool : public std::enable_shared_from_this<DevicePool> {
 public:
  DevicePool() = default;
  ~DevicePool();
  DevicePool(const DevicePool&) = delete;
  DevicePool& operator=(const DevicePool&) = delete;

  /// Aligned to 256 bytes; contents are whatever they were. Throws std::bad_alloc.
  Buffer allocate(std::size_t bytes);
  /// How often allocate() was called: a step that leaves it alone can be recorded and replayed.
  std::size_t allocations() const { return allocations_; }
  /// Bytes of the device that nobody has, and those that are kept here.
  std::size_t free_memory() const;

 private:
  void* take(std::size_t bytes);

  std::multimap<std::size_t, void*> free_;  // by size
  std::size_t allocations_ = 0;
};

/// Page-locked host memory, which the copy engines read and write on their own.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  ~PinnedBuffer();
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;

  /// At least `bytes` bytes; contents are lost when it grows, and nothing may use the old ones any more.
  std::byte* grow(std::size_t bytes);
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Starts copies to the host. Their buffers and events are kept and used again; it outlives what it returns.
class Downloader {
 public:
  std::unique_ptr<Download> start(const std::byte* data, std::size_t bytes, cudaStream_t stream);

 private:
  struct Slot {
    Slot();
    ~Slot();
    PinnedBuffer host;
    cudaEvent_t done = nullptr;
  };
  class Copy;

  std::vector<std::unique_ptr<Slot>> free_;
};

}  // namespace flash_mla::model
