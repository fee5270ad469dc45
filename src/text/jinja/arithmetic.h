#pragma once

#include "text/jinja/ast.h"

namespace flash_mla::text::jinja {

// Operators on values, as Python has them. All throw Problem for kinds that do not go together, and for
// integers that leave 64 bits.

/// kAdd to kModulo.
Value arithmetic(Operator op, const Value& a, const Value& b);
/// kEqual to kNotIn.
bool compare(Operator op, const Value& a, const Value& b);
/// -x or +x.
Value signed_value(const Value& x, bool negate);
/// self[begin:end:step] of a list or string; a bound that is none is left out.
Value slice(const Value& self, const Value& begin, const Value& end, const Value& step);

}  // namespace flash_mla::text::jinja
