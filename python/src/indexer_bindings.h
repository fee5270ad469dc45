#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

void bind_indexer(nanobind::module_& m);

}  // namespace flash_mla::python
