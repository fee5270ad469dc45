#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/api_error.h"

// A body's fields, by name and type. Everything throws ApiError (400) that names the field.

namespace flash_mla::server {

/// Parses what a client sent. Throws ApiError if it is not a JSON object or nested more than 32 deep: copying
/// a JSON value takes as much stack as it is nested.
Body parse_body(std::string_view text);

/// Throws ApiError if an object within has more than kMaxOrderedFields fields: one that keeps their order is searched from
/// its beginning whenever a field is added or looked up. The error names `param`, where that is not empty.
void check_width(const Body& json, const std::string& param = {});

/// A field's value if it is there and not null.
const Body* find(const Body& json, const char* key);

/// The text of a field's value, as it stands in a body that parse_body took: a Body sorts the keys of objects, and
/// a chat template may print them. Empty if there is no such field.
std::string_view raw_field(std::string_view body, std::string_view key);

ApiError wrong_type(const char* key, const Body& value, const char* expected);

/// Leave `out` alone where the field is missing or null.
void read(const Body& json, const char* key, double& out);
void read(const Body& json, const char* key, int& out);
void read(const Body& json, const char* key, bool& out);

std::int64_t integer(const Body& value, const char* key);
/// Of an array. What is no token is left to the engine to refuse.
std::vector<std::int32_t> token_ids(const Body& value, const char* key);

}  // namespace flash_mla::server
