#pragma once

#include <map>
#include <string>
#include <string_view>

#include "server/api_error.h"

namespace flash_mla::server {

/// The types of JSON that the tools of a call allow for their parameters.
class ToolSchemas {
 public:
  enum Type : unsigned { kString = 1, kNumber = 2, kBoolean = 4, kNull = 8, kObject = 16, kArray = 32 };
  static constexpr unsigned kAny = 63;
  /// Beside kString: one of known texts, or of a pattern. White space around it is the notation's, not its own.
  static constexpr unsigned kTrimmed = 64;

  /// `tools`: an array in OpenAI's form. Whatever is not understood in a schema allows every type.
  explicit ToolSchemas(const Json& tools);
  ToolSchemas() = default;

  bool knows(std::string_view tool) const { return types_.find(tool) != types_.end(); }
  /// Some of Type, or kAny for what no schema knows.
  unsigned types(std::string_view tool, std::string_view parameter) const;

 private:
  std::map<std::string, std::map<std::string, unsigned, std::less<>>, std::less<>> types_;
};

/// `text`, which is what a model wrote for a parameter, as JSON: a number, list or the like where the types
/// allow it and it is one, else a string.
std::string parameter_json(std::string_view text, unsigned types);

/// Appends `text` as it stands within the quotes of a JSON string.
void append_escaped(std::string_view text, std::string& out);

}  // namespace flash_mla::server
