#pragma once

#include <nanobind/nanobind.h>

#include "flash_mla/engine.h"

namespace flash_mla::python {

/// What a server of another's makes of the engine: TransferOptions, EventQueue.
void bind_serving(nanobind::module_& m);
/// Engine's members that need them.
void bind_serving(nanobind::class_<Engine>& engine);

nanobind::dict transfer_of(const TransferStats& stats);

}  // namespace flash_mla::python
