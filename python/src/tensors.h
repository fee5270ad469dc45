#pragma once

// Tensors come as a dict of names, None where one is not given: the structs of the C++ API have many that are optional.

#include <nanobind/nanobind.h>

#include <list>
#include <string>
#include <utility>

#include "arguments.h"
#include "flash_mla/flash_mla.h"
#include "tensor_argument.h"

namespace flash_mla::python {

/// The tensors of a call by name, for its length.
class Tensors {
 public:
  explicit Tensors(nanobind::dict given) : given_(std::move(given)) {}

  /// Not defined where it is None.
  TensorView operator()(const char* name) {
    const nanobind::object value = given_.contains(name) ? nanobind::object(given_[name]) : nanobind::none();
    if (value.is_none()) return {};
    arguments_.emplace_back(value, name);
    TensorView view = arguments_.back().view();
    // Rank 0 would read as "not given".
    if (view.rank == 0)
      throw InvalidArgument(std::string(name) + " has rank 0, expected a tensor of rank >= 1");
    return view;
  }

  /// A cache in the format that its dtype and width tell; tokens (n, 1, width) are pages of one token.
  KvCacheView cache(const char* name, float scale) {
    KvCacheView cache;
    cache.data = (*this)(name);
    cache.scale = scale;
    TensorView& v = cache.data;
    if (!v.defined()) return cache;
    if (v.rank == 3) {
      v.rank = 4;
      v.shape = {v.size(0), 1, v.size(1), v.size(2)};
      v.strides = {v.stride(0), v.stride(0), v.stride(1), v.stride(2)};
    }
    const std::int64_t width = v.size(v.rank - 1);
    if (v.dtype == DType::kUInt8 && width == 656) {
      cache.format = KvFormat::kFp8V32;
    } else if (v.dtype == DType::kUInt8 && width == 584) {
      cache.format = KvFormat::kFp8V4;
    } else if (v.dtype == DType::kUInt8 && width == 576) {
      cache.format = KvFormat::kFp8Tensor;
    } else if (v.dtype == DType::kBFloat16) {
      cache.format = KvFormat::kBFloat16;
    } else if (v.dtype == DType::kFloat16) {
      cache.format = KvFormat::kFloat16;
    } else {
      throw InvalidArgument(std::string(name) + " is " + v.describe() +
                            ", expected bfloat16 or float16, or 656, 584 or 576 bytes per token");
    }
    return cache;
  }

 private:
  nanobind::dict given_;
  std::list<TensorArgument> arguments_;
};

/// run(workspace) with memory of the caller's allocator, which knows when it may be used again, or the thread's own.
template <class Run>
void with_workspace(nanobind::handle allocate, std::size_t bytes, const Run& run) {
  if (allocate.is_none()) {
    nanobind::gil_scoped_release release;
    run(thread_workspace().get(bytes));
  } else if (bytes == 0) {
    run(nullptr);
  } else {
    const nanobind::object memory = allocate(bytes);
    const TensorArgument workspace(memory, "workspace");
    run(workspace.view().data);
  }
}

}  // namespace flash_mla::python
