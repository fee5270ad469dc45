#pragma once

// The one loader of cuBLASLt, for the engine's products and for those that benchmarks measure against. Needs
// none of its headers.

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fmt/format.h>
#include <link.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "kernels/gemm/sm90/cublaslt_path.h"

namespace flash_mla::sm90 {

/// libcublasLt.so of the CUDA runtime's major version, from the path in the environment variable
/// FLASH_MLA_CUBLASLT if it is set, else from where the system finds libraries, else from the Python package
/// nvidia-cublas that is installed beside ours (cublaslt_path.h). Opened by the first who asks and never closed:
/// its own threads and device state do not survive that.
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
    const std::vector<std::string> paths = given != nullptr && *given != '\0'
                                               ? std::vector<std::string>{given}
                                               : cublaslt_paths(own_file(), kMajor);
    std::string reasons;
    for (const std::string& path : paths) {
      handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
      path_ = path;
      if (handle_ != nullptr) return;
      reasons += fmt::format("{}{}", reasons.empty() ? "" : "; ", dlerror());
    }
    error_ = fmt::format(
        "{} cannot be opened ({}): install cuBLAS {} (Debian package libcublas-13-0 or Python package "
        "nvidia-cublas), or set FLASH_MLA_CUBLASLT to the library's path",
        paths.front(), reasons, kMajor);
  }

  /// The file that this code was loaded from: the Python extension or the program.
  static std::filesystem::path own_file() {
    Dl_info info{};
    link_map* map = nullptr;
    std::error_code ignored;
    if (dladdr1(reinterpret_cast<const void*>(&own_file), &info, reinterpret_cast<void**>(&map),
                RTLD_DL_LINKMAP) == 0)
      return {};
    // The program itself has no name there, and the one in `info` is what it was called as.
    if (map->l_name == nullptr || *map->l_name == '\0')
      return std::filesystem::read_symlink("/proc/self/exe", ignored);
    return std::filesystem::absolute(map->l_name, ignored);
  }

  std::string path_, error_;
  void* handle_ = nullptr;
};

}  // namespace flash_mla::sm90
