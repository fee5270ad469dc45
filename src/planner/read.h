#pragma once

// JSON in: models, hardware profiles and requests, checked key by key. Every error names the file (or
// "request"), the key, the value and what is allowed.

#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "flash_mla/planner.h"

namespace flash_mla::planner {

using Json = nlohmann::ordered_json;

/// A shipped data file, compiled in. `path` is relative to data/, e.g. "models/deepseek-v3.json".
struct DataFile {
  std::string_view path;
  std::string_view text;
};
std::span<const DataFile> data_files();

/// Parses JSON text; `source` is what errors call it.
Json parse_json(std::string_view text, const std::string& source);
Json load_json(const std::string& path);

Model read_model(const Json& json, const std::string& source);
Hardware read_hardware(const Json& json, const std::string& source);
/// A Hugging Face config.json by shipped name ("deepseek-v3"), by path, or as an inline object.
Model find_model(const Json& value, const std::string& key);
Hardware find_hardware(const Json& value, const std::string& key);
/// `model` and `hardware`, when given, are what the request's own keys would be read as.
Request read_request(const Json& json, const std::string& source, const Model* model = nullptr,
                     const Hardware* hardware = nullptr);

/// A reader of one JSON object that knows which keys were asked for.
class ObjectReader {
 public:
  ObjectReader(const Json& json, std::string source, std::string where = "");
  bool has(const char* key);
  const Json* find(const char* key);
  std::int64_t integer(const char* key, std::int64_t fallback, std::int64_t low, std::int64_t high);
  std::int64_t integer(const char* key, std::int64_t low, std::int64_t high);  ///< required
  double number(const char* key, double fallback, double low, double high);
  double number(const char* key, double low, double high);  ///< required
  std::string choice(const char* key, const std::string& fallback, const std::vector<std::string>& allowed);
  std::string text(const char* key, const std::string& fallback);
  bool boolean(const char* key, bool fallback);
  ObjectReader object(const char* key);
  /// Refuses keys that no call above asked for.
  void finish() const;
  [[noreturn]] void fail(const std::string& key, const std::string& value, const std::string& expected) const;
  std::string path(const std::string& key) const { return where_.empty() ? key : where_ + "." + key; }
  const std::string& source() const { return source_; }

 private:
  const Json& require(const char* key, const std::string& expected);

  const Json& json_;
  std::string source_, where_;
  std::vector<std::string> known_;
};

}  // namespace flash_mla::planner
