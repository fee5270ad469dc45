#pragma once

// A case of a benchmark as a problem in the GPU's memory, and how it is measured.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/gpu/case_row.h"
#include "bench/gpu/resources.h"
#include "flash_mla/tensor.h"

namespace flash_mla::bench::gpu {

/// One problem: inputs that are random, outputs and workspace that are poison, everything in place.
class CaseProblem {
 public:
  CaseProblem() = default;
  virtual ~CaseProblem() = default;
  CaseProblem(const CaseProblem&) = delete;
  CaseProblem& operator=(const CaseProblem&) = delete;

  /// Queues the operation.
  virtual void call(const Stream& stream) const = 0;
  /// What is wrong with what the first call wrote, "" when nothing; `max_abs_error` of outputs in floating point.
  virtual std::string wrong(double& max_abs_error, const Stream& stream) const = 0;
  virtual std::size_t workspace_bytes() const { return 0; }
};

/// Makes the problem, checks its output, then takes the times, whatever the check said; of cases whose floor is a copy's,
/// `copy_bytes` (read and written) > 0, also of such a copy. What throws Unsupported becomes CaseRow::not_in_build.
void measure_case(CaseRow& row, const std::function<std::unique_ptr<CaseProblem>(const Stream&)>& make,
                  double copy_bytes, int reps);

/// Throws std::runtime_error where the GPU has less than `bytes` free.
void require_memory(const std::string& name, std::size_t bytes);

inline std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

inline constexpr flash_mla::Device kFirstGpu{DeviceType::kCuda, 0};

template <class T>
std::vector<T> to_host(const DeviceArray<T>& array) {
  std::vector<T> values(array.bytes() / sizeof(T));
  check(cudaMemcpy(values.data(), array.data(), array.bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
  return values;
}

/// A tensor on both sides.
template <class T>
struct Both {
  Both() = default;
  explicit Both(std::vector<T> values) : host(std::move(values)), gpu(DeviceArray<T>::of(host)) {}
  TensorView view(bool on_gpu, DType dtype, std::initializer_list<std::int64_t> shape) {
    return TensorView::contiguous(on_gpu ? gpu.data() : host.data(), dtype, shape,
                                  on_gpu ? kFirstGpu : flash_mla::Device{});
  }
  std::vector<T> host;
  DeviceArray<T> gpu;
};

}  // namespace flash_mla::bench::gpu
