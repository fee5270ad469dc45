#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

/// Sparse attention, decode over FP8 caches, cache operations and quantisers.
void bind_sparse(nanobind::module_& m);

}  // namespace flash_mla::python
