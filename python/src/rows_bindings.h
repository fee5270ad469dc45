#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

/// Norms, gates and rotations of rows.
void bind_rows(nanobind::module_& m);

}  // namespace flash_mla::python
