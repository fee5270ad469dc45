#pragma once

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "backend.h"
#include "base/element.h"
#include "guarded.h"

namespace flash_mla::conformance {

/// A dense tensor of a backend, and its bytes on the host. What a call writes is there after download().
class Tensor {
 public:
  Tensor(BackendUnderTest& backend, DType dtype, const std::vector<std::int64_t>& shape)
      : view(dense(dtype, shape)),
        bytes(static_cast<std::size_t>(view.numel()) * dtype_size(dtype), 0xFF),
        memory_(std::make_unique<Guarded>(backend, bytes.size())) {
    view.data = memory_->data();
    view.device = backend.device();
    upload();
  }
  /// Numbers of any type, converted.
  template <class T>
  Tensor(BackendUnderTest& backend, DType dtype, const std::vector<std::int64_t>& shape,
         const std::vector<T>& values)
      : Tensor(backend, dtype, shape) {
    for (std::size_t i = 0; i < values.size(); ++i) put(i, static_cast<double>(values[i]));
    upload();
  }
  /// Normally distributed numbers.
  static Tensor random(BackendUnderTest& backend, DType dtype, const std::vector<std::int64_t>& shape,
                       unsigned seed, float spread = 1.0f) {
    Tensor t(backend, dtype, shape);
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(0, spread);
    for (std::size_t i = 0; i < t.size(); ++i) t.put(i, static_cast<double>(normal(rng)));
    t.upload();
    return t;
  }

  std::size_t size() const { return bytes.size() / dtype_size(view.dtype); }
  double operator[](std::size_t i) const {
    const std::uint8_t* at = bytes.data() + i * dtype_size(view.dtype);
    const auto read = [&](auto x) {
      std::memcpy(&x, at, sizeof(x));
      return x;
    };
    switch (view.dtype) {
      case DType::kInt32:
        return static_cast<double>(read(std::int32_t{}));
      case DType::kInt64:
        return static_cast<double>(read(std::int64_t{}));
      case DType::kUInt8:
        return static_cast<double>(read(std::uint8_t{}));
      default:
        return visit_float_type(view.dtype, [&](auto x) { return static_cast<double>(to_float(read(x))); });
    }
  }
  std::vector<double> values() const {
    std::vector<double> all(size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = (*this)[i];
    return all;
  }
  void put(std::size_t i, double value) {
    std::uint8_t* at = bytes.data() + i * dtype_size(view.dtype);
    const auto write = [&](auto x) { std::memcpy(at, &x, sizeof(x)); };
    switch (view.dtype) {
      case DType::kInt32:
        return write(static_cast<std::int32_t>(value));
      case DType::kInt64:
        return write(static_cast<std::int64_t>(value));
      case DType::kUInt8:
        return write(static_cast<std::uint8_t>(value));
      default:
        visit_float_type(view.dtype, [&](auto x) { write(from_double<decltype(x)>(value)); });
    }
  }
  void upload() { memory_->upload(bytes.data()); }
  void download() { bytes = memory_->download(); }
  /// The same numbers on the host, for a reference.
  TensorView host() {
    TensorView v = view;
    v.data = bytes.data();
    v.device = {};
    return v;
  }

 private:
  static TensorView dense(DType dtype, const std::vector<std::int64_t>& shape) {
    TensorView v;
    v.dtype = dtype;
    v.rank = static_cast<int>(shape.size());
    std::int64_t stride = 1;
    for (std::size_t i = shape.size(); i-- > 0;) {
      v.shape[i] = shape[i];
      v.strides[i] = stride;
      stride *= shape[i];
    }
    return v;
  }

 public:
  TensorView view;
  std::vector<std::uint8_t> bytes;

 private:
  std::unique_ptr<Guarded> memory_;
};

}  // namespace flash_mla::conformance
