#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "server/api_error.h"

// What becomes of a body's fields: those that this server obeys are read where their meaning is; those that
// would change the answer and that it does not know how to obey are refused by name; those that change
// nothing here pass; and what no API defines passes with a warning in the log.

namespace flash_mla::server {

/// An object whose type is "text".
bool is_text(const Body& value);

/// Throws ApiError that names a field of a completion's body which asks for something not supported. Values
/// that ask for nothing (null, false, an empty list, the default) pass.
void refuse_unsupported(const Body& json, bool chat);
/// The same for a message, the `index`th of its conversation. The last may say that it is not over.
void refuse_unsupported_message(const Body& message, std::size_t index, bool last);

/// Names of fields that neither this server nor, as far as it knows, any other defines, in a completion's
/// body; at most kMaxUnknownFields, none longer than 64 bytes.
std::vector<std::string> unknown_fields(const Body& json);

}  // namespace flash_mla::server
