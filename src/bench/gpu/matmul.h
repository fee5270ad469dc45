#pragma once

#include <memory>
#include <string>

#include "bench/gpu/resources.h"

namespace flash_mla::bench::gpu {

/// A bf16 matrix product by cuBLASLt, to measure against. Its library (libcublasLt.so of the CUDA runtime's
/// major version) is opened at run time, from the path in the environment variable FLASH_MLA_CUBLASLT if it
/// is set, else from where kernels/gemm/sm90/cublaslt_path.h says: the program does not depend on it, nor
/// its build on the headers.
class Matmul {
 public:
  /// For matrices of n x n. Null where there is no such library; `why` then says so.
  static std::unique_ptr<Matmul> load(int n, std::string& why);
  ~Matmul();
  Matmul(const Matmul&) = delete;
  Matmul& operator=(const Matmul&) = delete;

  /// e.g. "cuBLASLt 13.1.0"
  std::string version() const;
  /// out = a·b^T; a, b and out (n, n) bfloat16, dense; sums in fp32.
  void run(const void* a, const void* b, void* out, const Stream& stream);

 private:
  struct Impl;
  explicit Matmul(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace flash_mla::bench::gpu
