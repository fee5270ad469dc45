#include "server/body.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "server/limits.h"

namespace flash_mla::server {
namespace {

// Exact for JSON; what is none is refused either way.
bool nested_deeper_than(int limit, std::string_view text) {
  int depth = 0;
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '"') {
      quoted = !quoted;
    } else if (quoted) {
      if (c == '\\') ++i;
    } else if (c == '[' || c == '{') {
      if (++depth > limit) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

/// Past the string that begins at `at`.
std::size_t end_of_string(std::string_view json, std::size_t at) {
  for (++at; json[at] != '"'; ++at) at += json[at] == '\\';
  return at + 1;
}

/// Past the value that begins at `at`.
std::size_t end_of_value(std::string_view json, std::size_t at) {
  int depth = 0;
  do {
    const char c = json[at];
    if (c == '"') {
      at = end_of_string(json, at);
      continue;
    }
    depth += (c == '[' || c == '{') - (c == ']' || c == '}');
    ++at;
  } while (depth > 0 || (json[at] != ',' && json[at] != '}'));
  return at;
}

}  // namespace

Body parse_body(std::string_view text) {
  // Not with a callback of the parser: it searches all of an array whenever an object in it ends.
  if (nested_deeper_than(kMaxNesting, text)) {
    throw bad_request(fmt::format("the body is nested more than {} deep", kMaxNesting));
  }
  Body body = Body::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!body.is_object()) throw bad_request("the body is not a JSON object");
  return body;
}

void check_width(const Body& json, const std::string& param) {
  if (json.is_object() && json.size() > kMaxOrderedFields) {
    throw bad_request(fmt::format("{}{}an object of the body has {} fields, expected at most {}", param,
                                  param.empty() ? "" : ": ", json.size(), kMaxOrderedFields),
                      param);
  }
  if (!json.is_structured()) return;
  for (const Body& value : json) check_width(value, param);
}

const Body* find(const Body& json, const char* key) {
  const auto it = json.find(key);
  return it == json.end() || it->is_null() ? nullptr : &*it;
}

std::string_view raw_field(std::string_view json, std::string_view key) {
  constexpr std::string_view kBlank = " \t\r\n";
  std::string_view out;
  for (std::size_t at = json.find('"'); at != json.npos;) {
    const std::size_t key_end = end_of_string(json, at);
    // A key may be spelled with escapes.
    const std::string name = Body::parse(json.substr(at, key_end - at)).get<std::string>();
    const std::size_t begin = json.find_first_not_of(kBlank, json.find(':', key_end) + 1);
    const std::size_t end = end_of_value(json, begin);
    // Of equal keys the last counts, as in a Body.
    if (name == key) out = json.substr(begin, end - begin);
    at = json[end] == ',' ? json.find('"', end) : json.npos;
  }
  return out;
}

ApiError wrong_type(const char* key, const Body& value, const char* expected) {
  return bad_request(fmt::format("{} is {}, expected {}", key, value.type_name(), expected), key);
}

void read(const Body& json, const char* key, double& out) {
  if (const Body* v = find(json, key)) {
    if (!v->is_number()) throw wrong_type(key, *v, "a number");
    out = v->get<double>();
  }
}

std::int64_t integer(const Body& v, const char* key) {
  if (!v.is_number_integer()) throw wrong_type(key, v, "an integer");
  if (v.is_number_unsigned() && v.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max()) {
    throw bad_request(fmt::format("{} is {}, expected less than 2^63", key, v.get<std::uint64_t>()), key);
  }
  return v.get<std::int64_t>();
}

void read(const Body& json, const char* key, int& out) {
  if (const Body* v = find(json, key)) {
    const std::int64_t value = integer(*v, key);
    if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
      throw bad_request(fmt::format("{} is {}, expected a 32-bit integer", key, value), key);
    }
    out = static_cast<int>(value);
  }
}

void read(const Body& json, const char* key, bool& out) {
  if (const Body* v = find(json, key)) {
    if (!v->is_boolean()) throw wrong_type(key, *v, "true or false");
    out = v->get<bool>();
  }
}

std::vector<std::int32_t> token_ids(const Body& v, const char* key) {
  std::vector<std::int32_t> out;
  for (const Body& id : v) {
    const std::int64_t value = integer(id, key);
    // Out of the vocabulary either way: the engine's message says what was expected.
    out.push_back(static_cast<std::int32_t>(
        std::clamp<std::int64_t>(value, -1, std::numeric_limits<std::int32_t>::max())));
  }
  return out;
}

}  // namespace flash_mla::server
