#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

/// Hyper-connections.
void bind_mhc(nanobind::module_& m);

}  // namespace flash_mla::python
