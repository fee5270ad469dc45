#include "bench/dtype.h"

#include <fmt/format.h>

#include "flash_mla/error.h"

namespace flash_mla::bench {

std::optional<DType> find_dtype(const std::string& text) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    if (text == short_dtype(dtype) || text == dtype_name(dtype)) return dtype;
  }
  return std::nullopt;
}

DType parse_dtype(const std::string& text) {
  const std::optional<DType> dtype = find_dtype(text);
  if (!dtype) throw InvalidArgument(fmt::format("dtype is \"{}\", expected {}", text, kDtypeNames));
  return *dtype;
}

const char* short_dtype(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat16:
      return "fp16";
    case DType::kFloat32:
      return "fp32";
    default:
      return dtype_name(dtype);
  }
}

}  // namespace flash_mla::bench
