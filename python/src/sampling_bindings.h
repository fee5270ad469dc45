#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

/// Choices of tokens and of experts.
void bind_sampling(nanobind::module_& m);

}  // namespace flash_mla::python
