#include "server/format_fields.h"

#include <fmt/format.h>

#include <span>
#include <vector>

#include "server/body.h"
#include "server/fields.h"
#include "server/raw_value.h"

namespace flash_mla::server {
namespace {

using Kind = TextFormat::Kind;
using Path = std::vector<std::string_view>;

std::string dotted(const Path& path) { return fmt::format("{}", fmt::join(path, ".")); }

/// Looks for formats in a body; a second one is an error.
class Reader {
 public:
  Reader(const Body& json, std::string_view text) : json_(json), text_(text) {}

  FormatField read() {
    response_format();
    top_level();
    structured_outputs();
    return std::move(out_);
  }

 private:
  void set(const Path& path, Kind kind, std::string source, std::vector<std::string> choices = {}) {
    if (!out_.name.empty()) {
      throw bad_request(fmt::format("{} and {}: expected one format of the text", out_.name, path[0]),
                        std::string(path[0]));
    }
    out_ = {{kind, std::move(source), std::move(choices)}, std::string(path[0])};
  }
  [[noreturn]] static void wrong(const Path& path, const Body& value, const char* expected) {
    throw bad_request(fmt::format("{} is {}, expected {}", dotted(path), value.type_name(), expected),
                      std::string(path[0]));
  }

  /// A schema as an object, or as the text of one.
  void schema(const Path& path, const Body& value) {
    if (value.is_string()) return set(path, Kind::kJsonSchema, value.get<std::string>());
    if (!value.is_object() && !value.is_boolean()) wrong(path, value, "a JSON schema");
    const std::string_view raw = raw_value(text_, path);
    set(path, Kind::kJsonSchema, raw.empty() ? value.dump() : std::string(raw));
  }
  void source(const Path& path, Kind kind, const Body& value) {
    if (!value.is_string()) wrong(path, value, "a string");
    if (!value.get_ref<const std::string&>().empty()) set(path, kind, value.get<std::string>());
  }
  void choice(const Path& path, const Body& value) {
    if (!value.is_array()) wrong(path, value, "an array of strings");
    std::vector<std::string> choices;
    for (const Body& one : value) {
      if (!one.is_string()) wrong(path, one, "an array of strings");
      choices.push_back(one.get<std::string>());
    }
    if (!choices.empty()) set(path, Kind::kChoice, {}, std::move(choices));
  }

  void response_format() {
    const Body* format = find(json_, "response_format");
    if (format == nullptr || is_text(*format)) return;
    if (!format->is_object()) wrong({"response_format"}, *format, "an object");
    const Body* type = find(*format, "type");
    if (type != nullptr && *type == "json_object") {
      // A schema beside it is how llama.cpp's server and others of its kind take one.
      const Body* beside = find(*format, "schema");
      if (beside != nullptr) return schema({"response_format", "schema"}, *beside);
      return set({"response_format"}, Kind::kJsonObject, {});
    }
    if (type == nullptr || *type != "json_schema") {
      throw bad_request(
          "response_format.type is not supported, expected \"text\", \"json_object\" or \"json_schema\"",
          "response_format");
    }
    const Body* inner = find(*format, "json_schema");
    const Body* value = inner != nullptr && inner->is_object() ? find(*inner, "schema") : nullptr;
    if (value == nullptr)
      throw bad_request("response_format.json_schema.schema is missing", "response_format");
    schema({"response_format", "json_schema", "schema"}, *value);
  }

  void top_level() {
    for (const char* name : {"guided_json", "json_schema"}) {
      if (const Body* value = find(json_, name)) schema({name}, *value);
    }
    for (const char* name : {"guided_regex", "regex"}) {
      if (const Body* value = find(json_, name)) source({name}, Kind::kRegex, *value);
    }
    for (const char* name : {"guided_grammar", "grammar", "ebnf"}) {
      if (const Body* value = find(json_, name)) source({name}, Kind::kGrammar, *value);
    }
    if (const Body* value = find(json_, "guided_choice")) choice({"guided_choice"}, *value);
  }

  void structured_outputs() {
    const Body* all = find(json_, "structured_outputs");
    if (all == nullptr) return;
    if (!all->is_object()) wrong({"structured_outputs"}, *all, "an object");
    for (const auto& [name, value] : all->items()) {
      if (value.is_null() || value == false) continue;
      const Path path = {"structured_outputs", name};
      if (name == "json") {
        schema(path, value);
      } else if (name == "regex") {
        source(path, Kind::kRegex, value);
      } else if (name == "grammar") {
        source(path, Kind::kGrammar, value);
      } else if (name == "choice") {
        choice(path, value);
      } else if (name == "json_object") {
        set(path, Kind::kJsonObject, {});
      } else {
        throw bad_request(
            fmt::format("structured_outputs.{} is not supported by this server", name.substr(0, 64)),
            "structured_outputs");
      }
    }
  }

  const Body& json_;
  std::string_view text_;
  FormatField out_;
};

}  // namespace

FormatField read_format(const Body& json, std::string_view text) { return Reader(json, text).read(); }

}  // namespace flash_mla::server
