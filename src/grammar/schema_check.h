#pragma once

#include <string>
#include <string_view>

namespace flash_mla::grammar {

/// A JSON schema as XGrammar is to read it: without annotations, every value with a type, and open where nothing
/// is said of properties or items. Throws InvalidArgument for what is no schema, Unsupported for a keyword, or a
/// combination of them, that would not be enforced; both name it and where it stands.
std::string checked_schema(std::string_view text);

}  // namespace flash_mla::grammar
