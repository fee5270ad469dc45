#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

/// Tokenizer and chat template.
void bind_model(nanobind::module_& m);

}  // namespace flash_mla::python
