#pragma once

// A BLAS sgemm to measure against: OpenBLAS, loaded at run time so that the program does not depend on it.

#include <cstdint>
#include <optional>
#include <string>

namespace flash_mla::bench {

class Blas {
 public:
  /// Loads `library`, or when that is empty libopenblas.so.0 or libopenblas.so, with the kernels of `core`
  /// (e.g. "SkylakeX") or, when that is empty, those OpenBLAS itself takes for this processor:
  /// OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE in the environment are ignored. Empty when there is no such
  /// library; `why` then says so.
  static std::optional<Blas> load(const std::string& library, const std::string& core, std::string& why);

  /// e.g. "OpenBLAS 0.3.21 ..."
  const std::string& description() const { return description_; }
  void set_num_threads(int threads) const { set_num_threads_(threads); }

  /// Row-major C (m, n) = alpha * A (m, k) * op(B); `trans_b`: B is (n, k). Leading dimensions in elements.
  void sgemm(bool trans_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
             float* c, int ldc) const;

 private:
  using SetThreads = void (*)(int);
  using Sgemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int, float,
                         float*, int);
  SetThreads set_num_threads_ = nullptr;
  Sgemm sgemm_ = nullptr;
  std::string description_;
};

}  // namespace flash_mla::bench
