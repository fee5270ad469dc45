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

const Body* find(const Body& json, const char* key) {
  const auto it = json.find(key);
  return it == json.end() || it->is_null() ? nullptr : &*it;
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
