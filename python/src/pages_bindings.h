#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

/// Keys and values into pages, and merging into place.
void bind_pages(nanobind::module_& m);

}  // namespace flash_mla::python
