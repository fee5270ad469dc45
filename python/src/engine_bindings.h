#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

/// Engine and SamplingParams.
void bind_engine(nanobind::module_& m);

}  // namespace flash_mla::python
