#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace flash_mla::model {

/// Device time of steps, of which several may be on their way.
class StepTimer {
 public:
  StepTimer();
  ~StepTimer();
  StepTimer(const StepTimer&) = delete;
  StepTimer& operator=(const StepTimer&) = delete;

  void begin(cudaStream_t stream);
  void end(cudaStream_t stream);
  /// Of the steps that have run.
  double seconds();

 private:
  struct Span {
    cudaEvent_t begin = nullptr, end = nullptr;
    bool pending = false;
  };
  static constexpr std::size_t kSpans = 4;

  void add(Span& span);

  Span spans_[kSpans];
  std::size_t next_ = 0;
  double seconds_ = 0;
};

}  // namespace flash_mla::model
