#pragma once

#include <nanobind/nanobind.h>

namespace flash_mla::python {

/// Adds planner_run and planner_render to the module.
void bind_planner(nanobind::module_& m);

}  // namespace flash_mla::python
