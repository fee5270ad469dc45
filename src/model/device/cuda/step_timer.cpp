#include "model/device/cuda/step_timer.h"

#include <utility>

#include "base/cuda/check.h"

namespace flash_mla::model {

StepTimer::StepTimer() {
  for (Span& span : spans_) {
    check(cudaEventCreate(&span.begin), "cudaEventCreate");
    check(cudaEventCreate(&span.end), "cudaEventCreate");
  }
}

StepTimer::~StepTimer() {
  for (const Span& span : spans_) {
    cudaEventDestroy(span.begin);
    cudaEventDestroy(span.end);
  }
}

void StepTimer::begin(cudaStream_t stream) {
  Span& span = spans_[next_];
  if (span.pending) check(cudaEventSynchronize(span.end), "cudaEventSynchronize");
  add(span);
  check(cudaEventRecord(span.begin, stream), "cudaEventRecord");
}

void StepTimer::end(cudaStream_t stream) {
  Span& span = spans_[next_];
  check(cudaEventRecord(span.end, stream), "cudaEventRecord");
  span.pending = true;
  next_ = (next_ + 1) % kSpans;
}

double StepTimer::seconds() {
  for (Span& span : spans_) {
    if (span.pending && cudaEventQuery(span.end) == cudaSuccess) add(span);
  }
  return seconds_;
}

void StepTimer::add(Span& span) {
  if (!std::exchange(span.pending, false)) return;
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, span.begin, span.end), "cudaEventElapsedTime");
  seconds_ += static_cast<double>(milliseconds) * 1e-3;
}

}  // namespace flash_mla::model
