#pragma once

#include <string_view>
#include <utility>
#include <vector>

#include "text/jinja/ast.h"

namespace flash_mla::text::jinja {

/// Runs a program once. What it prints is what Python's Jinja2 would print. Throws InvalidArgument with the
/// template's line for what cannot be computed, and for a rendering that takes too many steps.
MarkedText evaluate(const Program& program, const std::vector<std::pair<std::string, Value>>& variables);

}  // namespace flash_mla::text::jinja
