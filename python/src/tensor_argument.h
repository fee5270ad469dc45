#pragma once

#include <dlpack/dlpack.h>
#include <nanobind/nanobind.h>

#include "flash_mla/tensor.h"

namespace flash_mla::python {

/// A tensor that Python passed, as a TensorView for the length of a call. Takes anything that speaks DLPack,
/// by the quickest door the type offers:
///   - DLPack's C exchange API (torch 2.10 and later): no Python call, no capsule;
///   - __array_interface__ of a NumPy array, read-only ones and those of ml_dtypes.bfloat16 included;
///   - __dlpack__(), version 1 or older.
class TensorArgument {
 public:
  /// `name` is used in error messages; throws InvalidArgument when `object` is no tensor.
  TensorArgument(nanobind::handle object, const char* name);
  TensorArgument(const TensorArgument&) = delete;
  TensorArgument& operator=(const TensorArgument&) = delete;

  const TensorView& view() const { return view_; }

 private:
  TensorView view_;
  nanobind::object capsule_;  // keeps a __dlpack__ export alive
};

}  // namespace flash_mla::python
