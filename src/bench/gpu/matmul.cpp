#include "bench/gpu/matmul.h"

#include <fmt/format.h>
#include <library_types.h>

#include <cstdint>
#include <stdexcept>

#include "kernels/gemm/sm90/cublaslt_library.h"

namespace flash_mla::bench::gpu {
namespace {

// The few declarations of cublasLt.h that a product needs. They are part of the library's binary interface.
using Opaque = void*;
using Status = int;
constexpr int kCompute32F = 68;         // CUBLAS_COMPUTE_32F
constexpr int kTransposeA = 3;          // CUBLASLT_MATMUL_DESC_TRANSA
constexpr std::int32_t kTranspose = 1;  // CUBLAS_OP_T

constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;  // what NVIDIA recommends for Hopper

struct Library {
  std::size_t (*get_version)() = nullptr;
  Status (*create)(Opaque*) = nullptr;
  Status (*desc_create)(Opaque*, int compute_type, int scale_type) = nullptr;
  Status (*desc_set)(Opaque, int attribute, const void* value, std::size_t bytes) = nullptr;
  Status (*layout_create)(Opaque*, int type, std::uint64_t rows, std::uint64_t columns,
                          std::int64_t stride) = nullptr;
  // With no algorithm given (the null pointer before the workspace) the library takes the one it thinks best.
  Status (*matmul)(Opaque handle, Opaque desc, const void* alpha, const void* a, Opaque a_layout,
                   const void* b, Opaque b_layout, const void* beta, const void* c, Opaque c_layout, void* d,
                   Opaque d_layout, const void* algorithm, void* workspace, std::size_t workspace_bytes,
                   cudaStream_t stream) = nullptr;
};

void check_lt(Status status, const char* what) {
  if (status != 0) throw std::runtime_error(fmt::format("{}: cuBLAS status {}", what, status));
}

}  // namespace

// The library's objects live as long as the process.
struct Matmul::Impl {
  Library library;
  Opaque handle = nullptr, desc = nullptr, layout = nullptr;
  DeviceArray<std::byte> workspace;
};

Matmul::Matmul(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Matmul::~Matmul() = default;

std::unique_ptr<Matmul> Matmul::load(int n, std::string& why) {
  auto impl = std::make_unique<Impl>();
  Library& l = impl->library;
  const auto& library = sm90::CublasLtLibrary::get();
  why.clear();
  library.find("cublasLtGetVersion", l.get_version, why);
  library.find("cublasLtCreate", l.create, why);
  library.find("cublasLtMatmulDescCreate", l.desc_create, why);
  library.find("cublasLtMatmulDescSetAttribute", l.desc_set, why);
  library.find("cublasLtMatrixLayoutCreate", l.layout_create, why);
  library.find("cublasLtMatmul", l.matmul, why);
  if (!why.empty()) return nullptr;
  check_lt(l.create(&impl->handle), "cublasLtCreate");
  check_lt(l.desc_create(&impl->desc, kCompute32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
  check_lt(l.desc_set(impl->desc, kTransposeA, &kTranspose, sizeof kTranspose),
           "cublasLtMatmulDescSetAttribute");
  const auto size = static_cast<std::uint64_t>(n);
  check_lt(l.layout_create(&impl->layout, CUDA_R_16BF, size, size, n), "cublasLtMatrixLayoutCreate");
  impl->workspace = DeviceArray<std::byte>(kWorkspaceBytes);
  return std::unique_ptr<Matmul>(new Matmul(std::move(impl)));
}

std::string Matmul::version() const {
  const std::size_t v = impl_->library.get_version();
  return fmt::format("cuBLASLt {}.{}.{}", v / 10000, v / 100 % 100, v % 100);
}

void Matmul::run(const void* a, const void* b, void* out, const Stream& stream) {
  const Opaque layout = impl_->layout;
  // Column-major, so that row-major matrices are seen transposed: out^T = b·a^T.
  const float one = 1.0f, zero = 0.0f;
  check_lt(
      impl_->library.matmul(impl_->handle, impl_->desc, &one, b, layout, a, layout, &zero, out, layout, out,
                            layout, nullptr, impl_->workspace.data(), kWorkspaceBytes, stream.get()),
      "cublasLtMatmul");
}

}  // namespace flash_mla::bench::gpu
