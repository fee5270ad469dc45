#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

void bind_mla_cascade(nanobind::module_& m);

}  // namespace flash_mla::python
