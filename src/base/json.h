#pragma once

// JSON files of a model directory: reading with errors that name file, field, value and what was expected.

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace flash_mla {

using Json = nlohmann::json;

/// The bytes of a file. Throws InvalidArgument if it cannot be read.
std::string read_file(const std::filesystem::path& path);

/// Throws InvalidArgument if `text`, the beginning of a file that errors call `origin`, is a Git LFS pointer:
/// what a clone without git-lfs has in place of a large file.
void refuse_lfs_pointer(std::string_view text, std::string_view origin);

/// Throws InvalidArgument, naming `origin`, if `text` is not JSON, names a field of an object twice or is
/// nested more than 64 deep.
Json parse_json(std::string_view text, std::string_view origin);

/// A value as errors show it: its JSON, shortened.
std::string shown(const Json& value);

/// One JSON object of a file. `where` is its place in the file ("rope_scaling."), empty for the top level.
class JsonObject {
 public:
  /// Throws InvalidArgument if `json` is not an object. Keeps a reference to it.
  JsonObject(const Json& json, std::string origin, std::string where = "");
  JsonObject(Json&& json, std::string origin, std::string where = "") = delete;

  const Json& json() const { return json_; }
  const std::string& origin() const { return origin_; }
  /// File and field, as errors name them.
  std::string path(const char* name) const { return origin_ + ": " + where_ + name; }
  /// The field, or nullptr if it is missing or null.
  const Json* find(const char* name) const;
  bool has(const char* name) const { return find(name) != nullptr; }

  /// Missing and null fields throw, as do values of another kind or outside [low, high].
  std::int64_t integer(const char* name, std::int64_t low, std::int64_t high) const;
  double number(const char* name, double low, double high) const;
  bool boolean(const char* name) const;
  std::string string(const char* name) const;
  JsonObject object(const char* name) const;
  const Json& array(const char* name) const;

  std::int64_t integer_or(const char* name, std::int64_t fallback, std::int64_t low, std::int64_t high) const;
  double number_or(const char* name, double fallback, double low, double high) const;
  bool boolean_or(const char* name, bool fallback) const;
  std::string string_or(const char* name, const std::string& fallback) const;

  /// InvalidArgument: the field has a value that cannot be right.
  [[noreturn]] void fail(const char* name, std::string_view expected) const;
  /// Unsupported: the field asks for something that this library does not do.
  [[noreturn]] void refuse(const char* name, std::string_view expected) const;

 private:
  const Json& require(const char* name, std::string_view expected) const;
  std::string complaint(const char* name, std::string_view expected) const;

  const Json& json_;
  std::string origin_;
  std::string where_;
};

}  // namespace flash_mla
