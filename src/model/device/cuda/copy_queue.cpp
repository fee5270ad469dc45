#include "model/device/cuda/copy_queue.h"

#include <memory>
#include <new>

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
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, *stream_), "cudaMemcpyAsync");
}

std::unique_ptr<CopyMark> CudaCopyQueue::mark() {
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
