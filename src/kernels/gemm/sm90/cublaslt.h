#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "base/matrix.h"

namespace flash_mla::sm90 {

/// Products of many rows by cuBLASLt, whose library (libcublasLt.so.13) is opened at run time: from the path
/// in the environment variable FLASH_MLA_CUBLASLT if it is set, else from where cublaslt_path.h says.
class CublasLt {
 public:
  /// Throws Unsupported, saying what to install, where the library is missing or too old.
  CublasLt();
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  /// out = x·weight^T, or out += with `accumulate`. x (m, k) bfloat16; weight (n, k) bfloat16, dense; out
  /// (m, n) bfloat16 or float32; sums in fp32. The algorithm for a shape is looked up once.
  void gemm(Matrix x, const std::byte* weight, Matrix out, bool accumulate, cudaStream_t stream);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Why the library cannot be used, or "".
std::string why_no_cublaslt();

}  // namespace flash_mla::sm90
