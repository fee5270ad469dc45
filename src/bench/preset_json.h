#pragma once

// What preset files are read with. Everything throws InvalidArgument, which names `where`, the key and its value.

#include <fmt/format.h>

#include <array>
#include <cstddef>
#include <initializer_list>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "flash_mla/error.h"

namespace flash_mla::bench {

/// The JSON of a preset file, or of the built-in preset of that name; `where` becomes what messages call it.
nlohmann::json load_preset(const std::string& name_or_path, std::string& where);

/// Fetches `key` of an object into `value`, which keeps its default when there is none.
void take_integer(const nlohmann::json& object, const char* key, int lowest, int highest,
                  const std::string& where, int& value);
void take_bool(const nlohmann::json& object, const char* key, const std::string& where, bool& value);
void take_number(const nlohmann::json& object, const char* key, const std::string& where,
                 std::optional<double>& value);
void take_string(const nlohmann::json& object, const char* key, const std::string& where, std::string& value);
/// {"a peer": a time, ...}
void take_times(const nlohmann::json& object, const char* key, const std::string& where,
                std::map<std::string, double>& times);

/// The one of `values` whose name the text under `key` is.
template <class T, std::size_t kCount, class Name>
void take_enum(const nlohmann::json& object, const char* key, const std::array<T, kCount>& values,
               const Name& name, const std::string& where, T& value) {
  std::string text;
  take_string(object, key, where, text);
  if (text.empty()) return;
  std::string names;
  for (const T v : values) {
    if (text == name(v)) {
      value = v;
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(name(v));
  }
  throw InvalidArgument(fmt::format("{}: \"{}\" is \"{}\", expected one of: {}", where, key, text, names));
}

void refuse_unknown_keys(const nlohmann::json& object, std::initializer_list<const char*> known,
                         const std::string& where);

}  // namespace flash_mla::bench
