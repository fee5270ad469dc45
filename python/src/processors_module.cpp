#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "base/processors.h"

// A module of its own, because its answer is needed before the library is loaded: with the library comes libgomp, which
// reads its environment once.

namespace nb = nanobind;

NB_MODULE(_processors, m) {
  m.def("choose_threads", [] {
    const flash_mla::Processors processors = flash_mla::read_processors();
    const flash_mla::Threading t = flash_mla::with_environment(flash_mla::choose_threading(processors));
    nb::dict out;
    out["threads"] = t.threads;
    out["waiting"] = flash_mla::waiting_name(t.waiting);
    out["why_threads"] = t.why_threads;
    out["why_waiting"] = t.why_waiting;
    out["usable"] = processors.usable;
    return out;
  });
}
