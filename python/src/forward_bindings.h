#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

/// The forward pass of a model directory.
void bind_forward(nanobind::module_& m);

}  // namespace flash_mla::python
