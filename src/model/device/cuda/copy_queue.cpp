#include "model/device/cuda/copy_queue.h"

#include <algorithm>
#include <memory>
#include <new>
#include <utility>

#include "base/cuda/check.h"
#include "base/cuda/device.h"

namespace flash_mla::model {
namespace {

class Event : public CopyMark {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate"); }
  ~Event() override { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  cudaEvent_t get() const { return event_; }

  bool done() override {
    const cudaError_t state = cudaEventQuery(event_);
    if (state == cudaErrorNotReady) return false;
    check(state, "cudaEventQuery");
    return true;
  }
  void wait() override { check(cudaEventSynchronize(event_), "cudaEventSynchronize"); }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace

CudaCopyQueue::CudaCopyQueue(cudaStream_t steps, int device) : steps_(steps), device_(device) {
  const DeviceGuard guard(device);
  stream_ = std::make_unique<Stream>();
}

void CudaCopyQueue::wait_for_steps() {
  const DeviceGuard guard(device_);
  Event behind;
  behind.record(steps_);
  check(cudaStreamWaitEvent(*stream_, behind.get(), 0), "cudaStreamWaitEvent");
}

void CudaCopyQueue::copy(std::byte* to, const std::byte* from, std::size_t bytes) {
  while (bytes > 0) {
    const std::size_t some = std::min(bytes, kBatchBytes - bytes_);
    to_.push_back(to);
    from_.push_back(from);
    sizes_.push_back(some);
    to += some;
    from += some;
    bytes -= some;
    bytes_ += some;
    if (bytes_ == kBatchBytes) flush();
  }
}

void CudaCopyQueue::flush() {
  if (bytes_ == 0) return;
  const DeviceGuard guard(device_);
  if (under_way_[0]) under_way_[0]->wait();
#if CUDART_VERSION >= 13000
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  std::size_t first = 0;
  check(cudaMemcpyBatchAsync(to_.data(), from_.data(), sizes_.data(), to_.size(), &attributes, &first, 1,
                             *stream_),
        "cudaMemcpyBatchAsync");
#else
  for (std::size_t i = 0; i < to_.size(); ++i)
    check(cudaMemcpyAsync(to_[i], from_[i], sizes_[i], cudaMemcpyDefault, *stream_), "cudaMemcpyAsync");
#endif
  to_.clear();
  from_.clear();
  sizes_.clear();
  bytes_ = 0;
  auto behind = std::make_unique<Event>();
  behind->record(*stream_);
  under_way_ = {std::move(under_way_[1]), std::move(behind)};
}

std::unique_ptr<CopyMark> CudaCopyQueue::mark() {
  flush();
  const DeviceGuard guard(device_);
  auto out = std::make_unique<Event>();
  out->record(*stream_);
  return out;
}

Buffer allocate_pinned(std::size_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocDefault);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw std::bad_alloc();
  }
  check(error, "cudaHostAlloc");
  return {std::shared_ptr<std::byte>(static_cast<std::byte*>(data), [](std::byte* p) { cudaFreeHost(p); }),
          bytes};
}

}  // namespace flash_mla::model
