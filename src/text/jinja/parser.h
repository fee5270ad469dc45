#pragma once

#include <string_view>

#include "text/jinja/ast.h"

namespace flash_mla::text::jinja {

/// Throws SyntaxProblem for what is no Jinja, or is outside the subset: an unknown tag, filter, test,
/// function or method among them. So whatever is rendered was understood in full.
Program parse(std::string_view source);

}  // namespace flash_mla::text::jinja
