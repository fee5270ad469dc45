#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

/// Dense prefill.
void bind_prefill(nanobind::module_& m);

}  // namespace flash_mla::python
