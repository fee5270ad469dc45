#include "bench/blas.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <cstdlib>
#include <vector>

namespace flash_mla::bench {
namespace {

// OpenBLAS reads these when it is loaded. An environment that pins older kernels or another cache size (some
// set them to get the same bits everywhere) would make it a weaker opponent than the machine allows: with
// AVX2 kernels on an AVX-512 machine it loses almost half of its speed.
void choose_kernels(const std::string& core) {
  unsetenv("OPENBLAS_L2_SIZE");
  if (core.empty()) {
    unsetenv("OPENBLAS_CORETYPE");
  } else {
    setenv("OPENBLAS_CORETYPE", core.c_str(), /*overwrite=*/1);
  }
}

}  // namespace

std::optional<Blas> Blas::load(const std::string& library, const std::string& core, std::string& why) {
  const std::vector<std::string> names =
      library.empty() ? std::vector<std::string>{"libopenblas.so.0", "libopenblas.so"} : std::vector{library};
  choose_kernels(core);
  void* handle = nullptr;
  for (const std::string& name : names) {
    handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle != nullptr) break;
    why = dlerror();
  }
  if (handle == nullptr) return std::nullopt;
  Blas blas;
  blas.sgemm_ = reinterpret_cast<Sgemm>(dlsym(handle, "cblas_sgemm"));
  blas.set_num_threads_ = reinterpret_cast<SetThreads>(dlsym(handle, "openblas_set_num_threads"));
  if (blas.sgemm_ == nullptr || blas.set_num_threads_ == nullptr) {
    why = fmt::format("{} has no cblas_sgemm and openblas_set_num_threads", names.back());
    return std::nullopt;
  }
  const auto config = reinterpret_cast<const char* (*)()>(dlsym(handle, "openblas_get_config"));
  const auto core_name = reinterpret_cast<const char* (*)()>(dlsym(handle, "openblas_get_corename"));
  blas.description_ = fmt::format("{}, {} kernels", config != nullptr ? config() : names.front(),
                                  core_name != nullptr ? core_name() : "unknown");
  return blas;
}

void Blas::sgemm(bool trans_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                 int ldb, float* c, int ldc) const {
  constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112;
  sgemm_(kRowMajor, kNoTrans, trans_b ? kTrans : kNoTrans, m, n, k, alpha, a, lda, b, ldb, 0.0f, c, ldc);
}

}  // namespace flash_mla::bench
