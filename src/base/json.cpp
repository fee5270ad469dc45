#include "base/json.h"

#include <fmt/format.h>

#include <fstream>
#include <iterator>
#include <unordered_set>
#include <vector>

#include "flash_mla/error.h"

namespace flash_mla {
namespace {
constexpr int kMaxDepth = 64;
}

std::string read_file(const std::filesystem::path& path) {
  std::error_code error;
  const bool regular = std::filesystem::is_regular_file(path, error);
  std::ifstream file;
  if (regular) file.open(path, std::ios::binary);
  if (!regular || !file) {
    throw InvalidArgument(fmt::format("{}: cannot be read; expected a file", path.string()));
  }
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (file.bad()) throw InvalidArgument(fmt::format("{}: reading failed", path.string()));
  return text;
}

void refuse_lfs_pointer(std::string_view text, std::string_view origin) {
  if (!text.starts_with("version https://git-lfs.github.com/spec/")) return;
  const std::size_t size = text.find("\nsize ");
  const std::string_view bytes =
      size == text.npos ? "?" : text.substr(size + 6, text.find('\n', size + 6) - size - 6);
  throw InvalidArgument(fmt::format(
      "{}: a Git LFS pointer, not the file itself ({} bytes): expected the file; \"git lfs pull\" in "
      "that folder fetches it",
      origin, bytes));
}

Json parse_json(std::string_view text, std::string_view origin) {
  refuse_lfs_pointer(text, origin);
  std::vector<std::unordered_set<std::string>> names;  // of the objects that are open
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kMaxDepth) {
      throw InvalidArgument(fmt::format("{}: JSON is nested more than {} deep", origin, kMaxDepth));
    }
    if (event == Json::parse_event_t::object_start) {
      names.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      names.pop_back();
    } else if (event == Json::parse_event_t::key && !names.back().insert(parsed.get<std::string>()).second) {
      throw InvalidArgument(fmt::format("{}: {} is there twice in one JSON object", origin, shown(parsed)));
    }
    return true;
  };
  try {
    return Json::parse(text, check);
  } catch (const Json::exception& e) {
    throw InvalidArgument(fmt::format("{}: not valid JSON: {}", origin, e.what()));
  }
}

std::string shown(const Json& value) {
  // Invalid UTF-8 cannot come out of the parser, but replaced is what it would be.
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() > 60 ? text.substr(0, 57) + "..." : text;
}

JsonObject::JsonObject(const Json& json, std::string origin, std::string where)
    : json_(json), origin_(std::move(origin)), where_(std::move(where)) {
  if (!json.is_object()) {
    const std::string place = where_.substr(0, where_.find_last_not_of(".: ") + 1);
    throw InvalidArgument(fmt::format("{}: {} = {}: expected a JSON object", origin_,
                                      place.empty() ? "top level" : place, shown(json)));
  }
}

const Json* JsonObject::find(const char* name) const {
  const auto found = json_.find(name);
  return found == json_.end() || found->is_null() ? nullptr : &*found;
}

std::string JsonObject::complaint(const char* name, std::string_view expected) const {
  const auto found = json_.find(name);
  return fmt::format("{} {}: expected {}", path(name),
                     found == json_.end() ? "is missing" : "= " + shown(*found), expected);
}

void JsonObject::fail(const char* name, std::string_view expected) const {
  throw InvalidArgument(complaint(name, expected));
}

void JsonObject::refuse(const char* name, std::string_view expected) const {
  throw Unsupported(complaint(name, expected));
}

const Json& JsonObject::require(const char* name, std::string_view expected) const {
  const Json* value = find(name);
  if (value == nullptr) fail(name, expected);
  return *value;
}

std::int64_t JsonObject::integer(const char* name, std::int64_t low, std::int64_t high) const {
  const std::string expected = fmt::format("an integer from {} to {}", low, high);
  const Json& value = require(name, expected);
  if (!value.is_number_integer()) fail(name, expected);
  // An unsigned number past INT64_MAX would wrap to a negative one.
  const bool large = value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX;
  const std::int64_t number = large ? INT64_MAX : value.get<std::int64_t>();
  if (number < low || number > high || (large && high < INT64_MAX)) fail(name, expected);
  return number;
}

double JsonObject::number(const char* name, double low, double high) const {
  const std::string expected = fmt::format("a number from {} to {}", low, high);
  const Json& value = require(name, expected);
  if (!value.is_number()) fail(name, expected);
  const double number = value.get<double>();
  if (!(number >= low && number <= high)) fail(name, expected);
  return number;
}

bool JsonObject::boolean(const char* name) const {
  const Json& value = require(name, "true or false");
  if (!value.is_boolean()) fail(name, "true or false");
  return value.get<bool>();
}

std::string JsonObject::string(const char* name) const {
  const Json& value = require(name, "a string");
  if (!value.is_string()) fail(name, "a string");
  return value.get<std::string>();
}

JsonObject JsonObject::object(const char* name) const {
  return {require(name, "a JSON object"), origin_, where_ + name + "."};
}

const Json& JsonObject::array(const char* name) const {
  const Json& value = require(name, "an array");
  if (!value.is_array()) fail(name, "an array");
  return value;
}

std::int64_t JsonObject::integer_or(const char* name, std::int64_t fallback, std::int64_t low,
                                    std::int64_t high) const {
  return has(name) ? integer(name, low, high) : fallback;
}

double JsonObject::number_or(const char* name, double fallback, double low, double high) const {
  return has(name) ? number(name, low, high) : fallback;
}

bool JsonObject::boolean_or(const char* name, bool fallback) const {
  return has(name) ? boolean(name) : fallback;
}

std::string JsonObject::string_or(const char* name, const std::string& fallback) const {
  return has(name) ? string(name) : fallback;
}

}  // namespace flash_mla
