#include "planner_bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include "flash_mla/planner.h"

namespace nb = nanobind;

namespace flash_mla::python {

void bind_planner(nb::module_& m) {
  // Pure arithmetic on its own copies: other Python threads may run meanwhile.
  m.def("planner_run", &planner::run_json, nb::arg("request"), nb::call_guard<nb::gil_scoped_release>(),
        "Runs one planner request in JSON and returns its result in JSON.");
  m.def("planner_render", &planner::render, nb::arg("result"), nb::arg("format"),
        nb::call_guard<nb::gil_scoped_release>(), "A planner result as text: table, csv or json.");
}

}  // namespace flash_mla::python
