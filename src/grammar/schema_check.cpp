#include "grammar/schema_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <span>
#include <vector>

#include "flash_mla/error.h"
#include "grammar/source_check.h"

namespace flash_mla::grammar {
namespace {

using Json = nlohmann::ordered_json;  // properties come up in the order of the schema
using Names = std::span<const std::string_view>;

constexpr int kMaxDepth = 64;
constexpr std::size_t kMaxSchemas = 4096;  // of one schema, itself among them

// They say something to readers and nothing to a validator.
constexpr std::string_view kAnnotations[] = {"title",      "description", "default",   "examples",
                                             "example",    "$comment",    "$schema",   "$id",
                                             "deprecated", "readOnly",    "writeOnly", "discriminator"};
constexpr std::string_view kFormats[] = {"email",
                                         "date",
                                         "time",
                                         "date-time",
                                         "duration",
                                         "ipv4",
                                         "ipv6",
                                         "hostname",
                                         "uuid",
                                         "uri",
                                         "uri-reference",
                                         "json-pointer",
                                         "relative-json-pointer",
                                         "uri-template"};

bool is_in(Names names, std::string_view name) { return std::ranges::find(names, name) != names.end(); }

/// One walk over a schema.
class Check {
 public:
  explicit Check(const Json& root) : root_(root) {}

  /// `schema` without what is only read, and with what is only understood.
  Json schema(const Json& in, const std::string& where) {
    if (++num_schemas_ > kMaxSchemas) {
      throw InvalidArgument(fmt::format("json_schema has more than {} schemas in it", kMaxSchemas));
    }
    if (in.is_boolean()) {
      if (!in.get<bool>()) fail(where, "false, which allows nothing");
      return in;
    }
    if (!in.is_object()) fail(where, "no object");
    Json out = Json::object();
    for (const auto& [name, value] : in.items()) {
      if (std::ranges::find(kAnnotations, name) != std::end(kAnnotations)) continue;
      if (name == "$defs" || name == "definitions") {
        out[name] = schemas(value, where, name);
      } else {
        out[name] = value;
      }
    }
    body(out, where);
    return out;
  }

 private:
  [[noreturn]] static void fail(const std::string& where, const std::string& what) {
    throw InvalidArgument(fmt::format("{} is {}, expected a JSON schema", where, what));
  }
  [[noreturn]] static void refuse(const std::string& where, std::string_view keyword,
                                  std::string_view why = {}) {
    throw Unsupported(
        fmt::format("{}.{} is not supported{}{}", where, keyword, why.empty() ? "" : ": ", why));
  }

  /// All keywords besides the definitions must be among these.
  static void only(const Json& s, const std::string& where, Names names, std::string_view why = {}) {
    for (const auto& [name, value] : s.items()) {
      if (name != "$defs" && name != "definitions" && !is_in(names, name)) refuse(where, name, why);
    }
  }

  Json schemas(const Json& in, const std::string& where, const std::string& name) {
    if (!in.is_object()) fail(fmt::format("{}.{}", where, name), "no object");
    Json out = Json::object();
    for (const auto& [key, value] : in.items()) {
      out[key] = schema(value, fmt::format("{}.{}.{}", where, name, key));
    }
    return out;
  }
  Json list(const Json& in, const std::string& where, std::string_view name) {
    const std::string here = fmt::format("{}.{}", where, name);
    if (!in.is_array() || in.empty()) fail(here, "no array, or empty");
    Json out = Json::array();
    for (std::size_t i = 0; i < in.size(); ++i) out.push_back(schema(in[i], fmt::format("{}[{}]", here, i)));
    return out;
  }

  /// The keyword that says what a value is; the others must have nothing to add.
  void body(Json& s, const std::string& where) {
    if (s.contains("$ref")) return reference(s, where);
    if (s.contains("const") || s.contains("enum")) return values(s, where);
    for (const char* name : {"anyOf", "oneOf", "allOf"}) {
      if (!s.contains(name)) continue;
      const std::string_view alone[] = {name};
      only(s, where, alone, fmt::format("beside {}; put it into each of its schemas", name));
      s[name] = list(s[name], where, name);
      // The engine knows which schemas cannot overlap by less than their types.
      if (name == std::string_view("oneOf") && of_other_types(s[name])) {
        s["anyOf"] = std::move(s[name]);
        s.erase(name);
        return;
      }
      if (name == std::string_view("allOf") && s[name].size() != 1) {
        refuse(where, name, "of more than one schema; merge them");
      }
      return;
    }
    typed(s, where);
  }

  /// Whether no value is of the types of two of them.
  static bool of_other_types(const Json& options) {
    std::vector<std::string> seen;
    for (const Json& option : options) {
      if (!option.is_object() || !option.contains("type")) return false;
      const Json& type = option["type"];
      for (const Json& one : type.is_array() ? type : Json::array({type})) {
        const std::string name = one == "integer" ? "number" : one.get<std::string>();
        if (std::ranges::find(seen, name) != seen.end()) return false;
        seen.push_back(name);
      }
    }
    return true;
  }

  void reference(const Json& s, const std::string& where) {
    constexpr std::string_view kAlone[] = {"$ref"};
    only(s, where, kAlone, "beside $ref");
    const std::string to = s["$ref"].is_string() ? s["$ref"].get<std::string>() : "";
    if (to == "#") return;
    if (!to.starts_with("#/")) refuse(where, "$ref", fmt::format("\"{}\"; it must begin with #/", to));
    try {
      const Json& target = root_.at(Json::json_pointer(to.substr(1)));
      if (target.is_object() && target.contains("$ref") && target["$ref"] == s["$ref"]) {
        fail(where, "a reference to itself");
      }
    } catch (const Json::exception&) {
      throw InvalidArgument(fmt::format("{}.$ref is \"{}\", expected a place in the schema", where, to));
    }
  }

  static bool has_type(const Json& value, const Json& type) {
    if (type.is_array()) return std::ranges::any_of(type, [&](const Json& t) { return has_type(value, t); });
    const std::string name = type.is_string() ? type.get<std::string>() : "";
    return (name == "string" && value.is_string()) || (name == "number" && value.is_number()) ||
           (name == "integer" && value.is_number_integer()) || (name == "boolean" && value.is_boolean()) ||
           (name == "null" && value.is_null()) || (name == "array" && value.is_array()) ||
           (name == "object" && value.is_object());
  }

  /// const or enum, which may have a type beside them if all their values have it.
  static void values(const Json& s, const std::string& where) {
    const bool one = s.contains("const");
    const std::string_view allowed[] = {one ? "const" : "enum", "type"};
    only(s, where, allowed, one ? "beside const" : "beside enum");
    if (!one && (!s["enum"].is_array() || s["enum"].empty())) fail(where + ".enum", "no array, or empty");
    if (!s.contains("type")) return;
    const Json all = one ? Json::array({s["const"]}) : s["enum"];
    if (!std::ranges::all_of(all, [&](const Json& value) { return has_type(value, s["type"]); })) {
      throw InvalidArgument(fmt::format("{} has values that are not of its type", where));
    }
  }

  static constexpr std::string_view kOfStrings[] = {"minLength", "maxLength", "pattern", "format"};
  static constexpr std::string_view kOfNumbers[] = {"minimum", "maximum", "exclusiveMinimum",
                                                    "exclusiveMaximum", "multipleOf"};
  static constexpr std::string_view kOfArrays[] = {"items", "prefixItems", "minItems", "maxItems",
                                                   "uniqueItems"};
  static constexpr std::string_view kOfObjects[] = {
      "properties",    "required",      "additionalProperties", "patternProperties",
      "propertyNames", "minProperties", "maxProperties"};

  void typed(Json& s, const std::string& where) {
    if (!s.contains("type")) infer_type(s, where);
    if (!s.contains("type")) return;  // anything
    const Json types = s["type"].is_array() ? s["type"] : Json::array({s["type"]});
    std::vector<std::string_view> allowed = {"type"};
    const auto allow = [&](Names names) { allowed.insert(allowed.end(), names.begin(), names.end()); };
    for (const Json& type : types) {
      const std::string name = type.is_string() ? type.get<std::string>() : "";
      if (name == "string") {
        allow(kOfStrings);
        string(s, where);
      } else if (name == "number" || name == "integer") {
        allow(kOfNumbers);
        number(s, where, name == "integer");
      } else if (name == "array") {
        allow(kOfArrays);
        array(s, where);
      } else if (name == "object") {
        allow(kOfObjects);
        object(s, where);
      } else if (name != "boolean" && name != "null") {
        fail(where + ".type", s["type"].dump());
      }
    }
    for (const auto& [name, value] : s.items()) {
      if (name == "$defs" || name == "definitions" || std::ranges::find(allowed, name) != allowed.end())
        continue;
      const bool known = is_in(kOfStrings, name) || is_in(kOfNumbers, name) || is_in(kOfArrays, name) ||
                         is_in(kOfObjects, name);
      if (known) {
        throw InvalidArgument(
            fmt::format("{}.{} says nothing of the type {}", where, name, s["type"].dump()));
      }
      refuse(where, name);
    }
  }

  /// The type that a schema's keywords speak of.
  static void infer_type(Json& s, const std::string& where) {
    const char* type = nullptr;
    for (const auto& [name, value] : s.items()) {
      if (name == "$defs" || name == "definitions") continue;
      const char* of = is_in(kOfStrings, name)   ? "string"
                       : is_in(kOfNumbers, name) ? "number"
                       : is_in(kOfArrays, name)  ? "array"
                       : is_in(kOfObjects, name) ? "object"
                                                 : nullptr;
      if (of == nullptr) refuse(where, name);
      if (type != nullptr && type != std::string_view(of)) {
        throw InvalidArgument(fmt::format("{} has no type, and keywords of several", where));
      }
      type = of;
    }
    if (type != nullptr) s["type"] = type;
  }

  static void count(const Json& s, const std::string& where, const char* name) {
    if (!s.contains(name)) return;
    if (!s[name].is_number_unsigned() || s[name].get<std::uint64_t>() > kMaxRepetitions) {
      throw InvalidArgument(
          fmt::format("{}.{} is {}, expected 0 to {}", where, name, s[name].dump(), kMaxRepetitions));
    }
  }

  static void string(const Json& s, const std::string& where) {
    count(s, where, "minLength");
    count(s, where, "maxLength");
    const bool lengths = s.contains("minLength") || s.contains("maxLength");
    if (s.contains("pattern")) {
      if (!s["pattern"].is_string()) fail(where + ".pattern", "no string");
      if (lengths || s.contains("format"))
        refuse(where, "pattern", "beside a format or bounds of the length");
      pattern(s["pattern"].get<std::string>(), where + ".pattern");
    }
    if (!s.contains("format")) return;
    const std::string format = s["format"].is_string() ? s["format"].get<std::string>() : "";
    if (std::ranges::find(kFormats, format) == std::end(kFormats))
      refuse(where, "format", s["format"].dump());
    if (lengths) refuse(where, "format", "beside bounds of the length");
  }

  /// What stands in a JSON string has to be escaped there: patterns that could ask for such a character are
  /// beyond the engine.
  static void pattern(const std::string& regex, const std::string& where) {
    check_regex(regex, where);
    const bool ascii = std::ranges::all_of(regex, [](char c) { return c >= ' ' && c <= '~'; });
    if (!ascii) throw Unsupported(where + " is not supported: characters beyond ASCII");
    if (regex.find('"') != std::string::npos || regex.find("\\\\") != std::string::npos) {
      throw Unsupported(where + " is not supported: characters that JSON escapes");
    }
  }

  static void number(const Json& s, const std::string& where, bool integer) {
    for (const char* name : {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}) {
      if (!s.contains(name)) continue;
      if (!s[name].is_number()) fail(fmt::format("{}.{}", where, name), "no number");
      const auto value = s[name].get<double>();
      if (!(value >= -1e15 && value <= 1e15)) {
        throw InvalidArgument(
            fmt::format("{}.{} is {}, expected -1e15 to 1e15", where, name, s[name].dump()));
      }
    }
    if (!s.contains("multipleOf")) return;
    if (!integer) refuse(where, "multipleOf", "of numbers that are no integers");
    if (!s["multipleOf"].is_number_unsigned() || s["multipleOf"].get<std::uint64_t>() > 1000) {
      refuse(where, "multipleOf", "expected an integer up to 1000");
    }
  }

  void array(Json& s, const std::string& where) {
    count(s, where, "minItems");
    count(s, where, "maxItems");
    if (s.contains("uniqueItems")) {
      if (s["uniqueItems"] != false) refuse(where, "uniqueItems");
      s.erase("uniqueItems");
    }
    if (s.contains("prefixItems")) s["prefixItems"] = list(s["prefixItems"], where, "prefixItems");
    if (s.contains("items")) {
      if (s["items"].is_array()) refuse(where, "items", "an array; use prefixItems");
      if (s["items"] != false) s["items"] = schema(s["items"], where + ".items");
    } else if (!s.contains("prefixItems")) {
      s["items"] = true;
    }
  }

  void object(Json& s, const std::string& where) {
    count(s, where, "minProperties");
    count(s, where, "maxProperties");
    const bool named = s.contains("properties");
    if (named) s["properties"] = schemas(s["properties"], where, "properties");
    for (const char* name : {"patternProperties", "propertyNames"}) {
      if (!s.contains(name)) continue;
      if (named || s.contains("additionalProperties")) refuse(where, name, "beside other properties");
    }
    if (s.contains("patternProperties")) {
      for (const auto& [regex, value] : s["patternProperties"].items())
        pattern(regex, where + ".patternProperties");
      s["patternProperties"] = schemas(s["patternProperties"], where, "patternProperties");
      s["additionalProperties"] = false;
    }
    if (s.contains("propertyNames"))
      s["propertyNames"] = schema(s["propertyNames"], where + ".propertyNames");
    if (s.contains("additionalProperties")) {
      if (!s["additionalProperties"].is_boolean()) {
        s["additionalProperties"] = schema(s["additionalProperties"], where + ".additionalProperties");
      }
    } else if (!named) {
      s["additionalProperties"] = true;
    }
    required(s, where);
  }

  static void required(const Json& s, const std::string& where) {
    if (!s.contains("required")) return;
    if (!s["required"].is_array()) fail(where + ".required", "no array");
    for (const Json& name : s["required"]) {
      if (!name.is_string()) fail(where + ".required", "no array of strings");
      if (!s.contains("properties") || !s["properties"].contains(name.get<std::string>())) {
        refuse(where, "required", fmt::format("\"{}\", which properties lacks", name.get<std::string>()));
      }
    }
  }

  const Json& root_;
  std::size_t num_schemas_ = 0;
};

}  // namespace

std::string checked_schema(std::string_view text) {
  bool deep = false;
  const auto check = [&](int depth, Json::parse_event_t, Json&) {
    deep = deep || depth > kMaxDepth;
    return !deep;
  };
  const Json root = Json::parse(text, check, /*allow_exceptions=*/false);
  if (deep) throw InvalidArgument(fmt::format("json_schema is nested more than {} deep", kMaxDepth));
  if (root.is_discarded()) throw InvalidArgument("json_schema is no JSON");
  Check walk(root);
  return walk.schema(root, "json_schema").dump();
}

}  // namespace flash_mla::grammar
