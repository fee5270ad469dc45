#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

/// Attention over keys and values of their own.
void bind_gqa(nanobind::module_& m);

}  // namespace flash_mla::python
