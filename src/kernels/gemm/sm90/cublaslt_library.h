#pragma once

// The one loader of cuBLASLt, for the engine's products and for those that benchmarks measure against. Needs
// none of its headers.

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <cstdlib>
#include <string>

namespace flash_mla::sm90 {

/// libcublasLt.so of the CUDA runtime's major version, from the path in the environment variable
/// FLASH_MLA_CUBLASLT if it is set, else from where the system finds libraries. Opened by the first who asks
/// and never closed: its own threads and device state do not survive that.
class CublasLtLibrary {
 public:
  static const CublasLtLibrary& get() {
    static const CublasLtLibrary kLibrary;
    return kLibrary;
  }

  /// Why it could not be opened, or "".
  const std::string& error() const { return error_; }

  /// Looks a function up, unless `error` already says what is wrong; what is wrong now goes there.
  template <class F>
  void find(const char* name, F& function, std::string& error) const {
    if (error.empty()) error = error_;
    if (!error.empty()) return;
    function = reinterpret_cast<F>(dlsym(handle_, name));
    if (function == nullptr) error = fmt::format("{} lacks the function {}", path_, name);
  }

 private:
  CublasLtLibrary() {
    constexpr int kMajor = CUDART_VERSION / 1000;
    const char* given = std::getenv("FLASH_MLA_CUBLASLT");
    path_ = given != nullptr && *given != '\0' ? given : fmt::format("libcublasLt.so.{}", kMajor);
    handle_ = dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ != nullptr) return;
    error_ = fmt::format(
        "{} cannot be opened ({}): install cuBLAS {} (Debian package libcublas-13-0 or Python package "
        "nvidia-cublas), or set FLASH_MLA_CUBLASLT to the library's path",
        path_, dlerror(), kMajor);
  }

  std::string path_, error_;
  void* handle_ = nullptr;
};

}  // namespace flash_mla::sm90
