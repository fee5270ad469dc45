#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "flash_mla/engine.h"

namespace flash_mla::python {

/// SamplingParams, Request, Engine.
void bind_engine(nanobind::module_& m);

nanobind::list logprobs_of(const std::vector<TokenLogprobs>& logprobs);

}  // namespace flash_mla::python
