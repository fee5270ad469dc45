#include "kernels/ptx/tensor_map.h"

#include <cuda_runtime.h>
#include <fmt/format.h>

#include "base/cuda/check.h"
#include "flash_mla/error.h"

namespace flash_mla::sm90 {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled kFunction = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
    if (result != cudaDriverEntryPointSuccess)
      throw Unsupported("the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(f);
  }();
  return kFunction;
}

}  // namespace

CUtensorMap encode_tensor_map(const char* name, const TensorView& t, std::span<const MapDim> dims) {
  constexpr std::size_t kMaxRank = 5;
  constexpr std::int64_t kSoundStride = 1152;  // a dimension of one element may carry any stride
  CUtensorMap map;
  std::array<cuuint64_t, kMaxRank> shape{};
  std::array<cuuint64_t, kMaxRank - 1> strides{};
  std::array<cuuint32_t, kMaxRank> box{}, steps{};
  for (std::size_t i = 0; i < dims.size(); ++i) {
    shape[i] = static_cast<cuuint64_t>(dims[i].size);
    box[i] = static_cast<cuuint32_t>(dims[i].box);
    steps[i] = 1;
    if (i > 0)
      strides[i - 1] = static_cast<cuuint64_t>(dims[i].size > 1 ? dims[i].stride_bytes : kSoundStride);
  }
  const CUresult r = encode_tiled()(
      &map, t.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      static_cast<cuuint32_t>(dims.size()), t.data, shape.data(), strides.data(), box.data(), steps.data(),
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) {
    throw InvalidArgument(fmt::format("{} is {} with a layout that no tensor map can describe (CUresult {})",
                                      name, t.describe(), static_cast<int>(r)));
  }
  return map;
}

void require_stride(const TensorView& t, const char* name) {
  for (int i = 0; i + 1 < t.rank; ++i) {
    if (t.size(i) > 1 && (t.stride(i) % 8 != 0 || t.stride(i) == 0)) {
      throw InvalidArgument(
          fmt::format("{}.stride[{}] is {}, expected a positive multiple of 8 elements (16 bytes)", name, i,
                      t.stride(i)));
    }
  }
  if (reinterpret_cast<std::uintptr_t>(t.data) % 16 != 0) {
    throw InvalidArgument(fmt::format("{}.data is {}, expected a pointer aligned to 16 bytes", name, t.data));
  }
}

}  // namespace flash_mla::sm90
