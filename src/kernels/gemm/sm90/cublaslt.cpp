#include "kernels/gemm/sm90/cublaslt.h"

#include <cublasLt.h>
#include <fmt/format.h>

#include <map>
#include <stdexcept>
#include <tuple>

#include "base/cuda/check.h"
#include "flash_mla/error.h"
#include "kernels/gemm/sm90/cublaslt_library.h"

namespace flash_mla::sm90 {
namespace {

// What NVIDIA recommends for Hopper.
constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

/// The library's functions that are used, by the types that its header gives them.
struct Library {
#define FLASH_MLA_FUNCTION(name) decltype(&::name) name = nullptr;
#define FLASH_MLA_FUNCTIONS(F)            \
  F(cublasLtCreate)                       \
  F(cublasLtDestroy)                      \
  F(cublasLtMatmul)                       \
  F(cublasLtMatmulAlgoGetHeuristic)       \
  F(cublasLtMatmulDescCreate)             \
  F(cublasLtMatmulDescDestroy)            \
  F(cublasLtMatmulDescSetAttribute)       \
  F(cublasLtMatmulPreferenceCreate)       \
  F(cublasLtMatmulPreferenceDestroy)      \
  F(cublasLtMatmulPreferenceSetAttribute) \
  F(cublasLtMatrixLayoutCreate)           \
  F(cublasLtMatrixLayoutDestroy)
  FLASH_MLA_FUNCTIONS(FLASH_MLA_FUNCTION)
#undef FLASH_MLA_FUNCTION
  std::string error;

  Library() {
#define FLASH_MLA_FUNCTION(name) CublasLtLibrary::get().find(#name, name, error);
    FLASH_MLA_FUNCTIONS(FLASH_MLA_FUNCTION)
#undef FLASH_MLA_FUNCTION
#undef FLASH_MLA_FUNCTIONS
  }
};

const Library& library() {
  static const Library kLibrary;
  return kLibrary;
}

void check_lt(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw std::runtime_error(fmt::format("{}: cuBLAS status {}", what, static_cast<int>(status)));
  }
}

template <class T, auto kDestroy>
class Handle {
 public:
  Handle() = default;
  ~Handle() {
    if (value_ != nullptr) (library().*kDestroy)(value_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  T* out() { return &value_; }
  T get() const { return value_; }

 private:
  T value_ = nullptr;
};
using Context = Handle<cublasLtHandle_t, &Library::cublasLtDestroy>;
using MatmulDesc = Handle<cublasLtMatmulDesc_t, &Library::cublasLtMatmulDescDestroy>;
using Layout = Handle<cublasLtMatrixLayout_t, &Library::cublasLtMatrixLayoutDestroy>;
using Preference = Handle<cublasLtMatmulPreference_t, &Library::cublasLtMatmulPreferenceDestroy>;

cudaDataType cuda_type(DType dtype) { return dtype == DType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF; }

// Column-major, so a row-major matrix is seen transposed.
void make_layout(Layout& layout, DType dtype, std::int64_t columns, std::int64_t rows, std::int64_t stride) {
  check_lt(library().cublasLtMatrixLayoutCreate(layout.out(), cuda_type(dtype),
                                                static_cast<std::uint64_t>(columns),
                                                static_cast<std::uint64_t>(rows), stride),
           "cublasLtMatrixLayoutCreate");
}

/// Row counts that share an algorithm.
std::int64_t bucket(std::int64_t m) {
  const std::int64_t step = m <= 256 ? 16 : m <= 2048 ? 128 : 1024;
  return (m + step - 1) / step * step;
}

// m bucket, n, k, stride of x, stride of out, alignment of x and of out, float32 out, accumulate
using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::uint32_t,
                         std::uint32_t, bool, bool>;

std::uint32_t alignment(const void* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  std::uint32_t a = 256;
  while (address % a != 0) a /= 2;
  return a;
}

}  // namespace

struct CublasLt::Impl {
  Context context;
  MatmulDesc desc;
  void* workspace = nullptr;
  std::map<Shape, cublasLtMatmulAlgo_t> algorithms;

  Impl() {
    if (!library().error.empty()) throw Unsupported("device cuda: " + library().error);
    check_lt(library().cublasLtCreate(context.out()), "cublasLtCreate");
    check_lt(library().cublasLtMatmulDescCreate(desc.out(), CUBLAS_COMPUTE_32F, CUDA_R_32F),
             "cublasLtMatmulDescCreate");
    const cublasOperation_t transposed = CUBLAS_OP_T;
    check_lt(library().cublasLtMatmulDescSetAttribute(desc.get(), CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                                      sizeof transposed),
             "cublasLtMatmulDescSetAttribute");
    check(cudaMalloc(&workspace, kWorkspaceBytes), "cudaMalloc");
  }
  ~Impl() { cudaFree(workspace); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  const cublasLtMatmulAlgo_t& algorithm(const Shape& shape, DType out_type, const Layout& w,
                                        std::int64_t x_stride, std::int64_t out_stride) {
    const auto found = algorithms.find(shape);
    if (found != algorithms.end()) return found->second;
    const auto [m, n, k, unused1, unused2, x_alignment, out_alignment, unused3, unused4] = shape;
    Layout x, out;
    make_layout(x, DType::kBFloat16, k, m, x_stride);
    make_layout(out, out_type, n, m, out_stride);
    Preference preference;
    check_lt(library().cublasLtMatmulPreferenceCreate(preference.out()), "cublasLtMatmulPreferenceCreate");
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      check_lt(
          library().cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value),
          "cublasLtMatmulPreferenceSetAttribute");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x_alignment);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out_alignment);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out_alignment);
    cublasLtMatmulHeuristicResult_t result{};
    int count = 0;
    check_lt(library().cublasLtMatmulAlgoGetHeuristic(context.get(), desc.get(), w.get(), x.get(), out.get(),
                                                      out.get(), preference.get(), 1, &result, &count),
             fmt::format("cublasLtMatmulAlgoGetHeuristic for m={} n={} k={}", m, n, k).c_str());
    if (count == 0)
      throw std::runtime_error(fmt::format("cuBLAS has no product for m={} n={} k={}", m, n, k));
    return algorithms.emplace(shape, result.algo).first->second;
  }
};

CublasLt::CublasLt() : impl_(std::make_unique<Impl>()) {}
CublasLt::~CublasLt() = default;

void CublasLt::gemm(Matrix x, const std::byte* weight, Matrix out, bool accumulate, cudaStream_t stream) {
  if (x.rows == 0) return;
  const std::int64_t m = x.rows, n = out.columns, k = x.columns;
  Layout w, xs, outs;
  make_layout(w, DType::kBFloat16, k, n, k);
  make_layout(xs, DType::kBFloat16, k, m, x.stride);
  make_layout(outs, out.dtype, n, m, out.stride);
  const Shape shape{bucket(m),
                    n,
                    k,
                    x.stride,
                    out.stride,
                    alignment(x.data),
                    alignment(out.data),
                    out.dtype == DType::kFloat32,
                    accumulate};
  const cublasLtMatmulAlgo_t& algo = impl_->algorithm(shape, out.dtype, w, x.stride, out.stride);
  const float one = 1.0f, beta = accumulate ? 1.0f : 0.0f;
  check_lt(library().cublasLtMatmul(impl_->context.get(), impl_->desc.get(), &one, weight, w.get(), x.data,
                                    xs.get(), &beta, out.data, outs.get(), out.data, outs.get(), &algo,
                                    impl_->workspace, kWorkspaceBytes, stream),
           "cublasLtMatmul");
}

std::string why_no_cublaslt() { return library().error; }

}  // namespace flash_mla::sm90
