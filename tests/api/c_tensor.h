#pragma once

#include <cstdint>
#include <initializer_list>

#include "flash_mla/dlpack.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// A contiguous tensor of the host as the C ABI takes it.
struct Tensor {
  Tensor(void* data, DType dtype, std::initializer_list<std::int64_t> shape)
      : view(TensorView::contiguous(data, dtype, shape)), tensor(to_dlpack(view)) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  TensorView view;
  DLTensor tensor;
};

}  // namespace flash_mla
