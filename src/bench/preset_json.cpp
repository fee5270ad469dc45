#include "bench/preset_json.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "flash_mla/error.h"
#include "flash_mla_presets.h"

namespace flash_mla::bench {
namespace {

using Json = nlohmann::json;

double positive_number(const Json& value, const std::string& key, const std::string& where) {
  if (!value.is_number() || !(value.get<double>() > 0)) {
    throw InvalidArgument(
        fmt::format("{}: \"{}\" is {}, expected a positive number", where, key, value.dump()));
  }
  return value.get<double>();
}

Json parse(std::string_view text, const std::string& where) {
  try {
    return Json::parse(text);
  } catch (const Json::parse_error& e) {
    throw InvalidArgument(fmt::format("{} is not JSON: {}", where, e.what()));
  }
}

}  // namespace

Json load_preset(const std::string& name_or_path, std::string& where) {
  where = fmt::format("preset {}", name_or_path);
  for (const BuiltInPreset& preset : kBuiltInPresets) {
    if (preset.name == name_or_path) return parse(preset.json, where);
  }
  std::ifstream in(name_or_path);
  if (!in) {
    std::string message = fmt::format("preset {}: {}", name_or_path, std::strerror(errno));
    std::vector<std::string_view> names;
    names.reserve(kBuiltInPresets.size());
    for (const BuiltInPreset& preset : kBuiltInPresets) names.push_back(preset.name);
    throw InvalidArgument(fmt::format("{}; built-in presets are {}", message, fmt::join(names, ", ")));
  }
  return parse(std::string((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>()), where);
}

void take_integer(const Json& object, const char* key, int lowest, int highest, const std::string& where,
                  int& value) {
  const auto found = object.find(key);
  if (found == object.end()) return;
  if (!found->is_number_integer() || found->get<std::int64_t>() < lowest ||
      found->get<std::int64_t>() > highest) {
    throw InvalidArgument(fmt::format("{}: \"{}\" is {}, expected an integer from {} to {}", where, key,
                                      found->dump(), lowest, highest));
  }
  value = found->get<int>();
}

void take_bool(const Json& object, const char* key, const std::string& where, bool& value) {
  const auto found = object.find(key);
  if (found == object.end()) return;
  if (!found->is_boolean()) {
    throw InvalidArgument(fmt::format("{}: \"{}\" is {}, expected true or false", where, key, found->dump()));
  }
  value = found->get<bool>();
}

void take_number(const Json& object, const char* key, const std::string& where,
                 std::optional<double>& value) {
  const auto found = object.find(key);
  if (found != object.end()) value = positive_number(*found, key, where);
}

void take_string(const Json& object, const char* key, const std::string& where, std::string& value) {
  const auto found = object.find(key);
  if (found == object.end()) return;
  if (!found->is_string()) {
    throw InvalidArgument(fmt::format("{}: \"{}\" is {}, expected a string", where, key, found->dump()));
  }
  value = found->get<std::string>();
}

void take_times(const Json& object, const char* key, const std::string& where,
                std::map<std::string, double>& times) {
  const auto found = object.find(key);
  if (found == object.end()) return;
  if (!found->is_object()) {
    throw InvalidArgument(
        fmt::format("{}: \"{}\" is {}, expected an object of numbers", where, key, found->dump()));
  }
  for (const auto& [name, time] : found->items()) {
    times[name] = positive_number(time, fmt::format("{}.{}", key, name), where);
  }
}

void refuse_unknown_keys(const Json& object, std::initializer_list<const char*> known,
                         const std::string& where) {
  for (const auto& [key, value] : object.items()) {
    if (std::find(known.begin(), known.end(), key) == known.end()) {
      throw InvalidArgument(
          fmt::format("{}: unknown key \"{}\", expected one of: {}", where, key, fmt::join(known, ", ")));
    }
  }
}

}  // namespace flash_mla::bench
