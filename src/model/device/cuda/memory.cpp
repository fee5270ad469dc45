#include "model/device/cuda/memory.h"

#include <algorithm>
#include <new>
#include <utility>

#include "base/cuda/check.h"

namespace flash_mla::model {
namespace {

constexpr std::size_t kSmallest = 512;

std::size_t rounded(std::size_t bytes) {
  const std::size_t granule = bytes < (std::size_t{1} << 20) ? kSmallest : std::size_t{1} << 20;
  return std::max(kSmallest, (bytes + granule - 1) / granule * granule);
}

}  // namespace

DevicePool::~DevicePool() {
  for (const auto& [bytes, data] : free_) cudaFree(data);
}

void* DevicePool::take(std::size_t bytes) {
  // What is much larger than asked for is better kept for who needs it.
  const auto found = free_.lower_bound(bytes);
  if (found != free_.end() && found->first <= bytes + bytes / 4) {
    void* data = found->second;
    free_.erase(found);
    return data;
  }
  void* data = nullptr;
  cudaError_t error = cudaMalloc(&data, bytes);
  if (error == cudaErrorMemoryAllocation && !free_.empty()) {
    cudaGetLastError();
    for (const auto& [size, unused] : free_) cudaFree(unused);
    free_.clear();
    error = cudaMalloc(&data, bytes);
  }
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw std::bad_alloc();
  }
  check(error, "cudaMalloc");
  return data;
}

Buffer DevicePool::allocate(std::size_t bytes) {
  ++allocations_;
  const std::size_t size = rounded(bytes);
  void* data = take(size);
  return {std::shared_ptr<std::byte>(
              static_cast<std::byte*>(data),
              [pool = shared_from_this(), size](std::byte* p) { pool->free_.emplace(size, p); }),
          bytes};
}

std::size_t DevicePool::free_memory() const {
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  for (const auto& [size, unused] : free_) free += size;
  return free;
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr) cudaFreeHost(data_);
}

std::byte* PinnedBuffer::grow(std::size_t bytes) {
  if (bytes > bytes_) {
    if (data_ != nullptr) check(cudaFreeHost(data_), "cudaFreeHost");
    data_ = nullptr;
    bytes_ = 0;
    void* data = nullptr;
    const std::size_t size = std::max(bytes, std::size_t{1} << 16);
    check(cudaHostAlloc(&data, size, cudaHostAllocDefault), "cudaHostAlloc");
    data_ = static_cast<std::byte*>(data);
    bytes_ = size;
  }
  return data_;
}

Downloader::Slot::Slot() {
  check(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "cudaEventCreate");
}
Downloader::Slot::~Slot() { cudaEventDestroy(done); }

class Downloader::Copy : public Download {
 public:
  Copy(Downloader& owner, std::unique_ptr<Slot> slot) : owner_(owner), slot_(std::move(slot)) {}
  ~Copy() override {
    cudaEventSynchronize(slot_->done);  // nobody may have waited
    owner_.free_.push_back(std::move(slot_));
  }
  const std::byte* wait() override {
    check(cudaEventSynchronize(slot_->done), "cudaEventSynchronize");
    return slot_->host.data();
  }

 private:
  Downloader& owner_;
  std::unique_ptr<Slot> slot_;
};

std::unique_ptr<Download> Downloader::start(const std::byte* data, std::size_t bytes, cudaStream_t stream) {
  if (free_.empty()) free_.push_back(std::make_unique<Slot>());
  std::unique_ptr<Slot> slot = std::move(free_.back());
  free_.pop_back();
  check(cudaMemcpyAsync(slot->host.grow(bytes), data, bytes, cudaMemcpyDeviceToHost, stream),
        "cudaMemcpyAsync");
  check(cudaEventRecord(slot->done, stream), "cudaEventRecord");
  return std::make_unique<Copy>(*this, std::move(slot));
}

}  // namespace flash_mla::model
