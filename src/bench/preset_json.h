#pragma once

// What preset files are read with. Everything throws InvalidArgument, which names `where`, the key and its value.

#include <initializer_list>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

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

void refuse_unknown_keys(const nlohmann::json& object, std::initializer_list<const char*> known,
                         const std::string& where);

}  // namespace flash_mla::bench
