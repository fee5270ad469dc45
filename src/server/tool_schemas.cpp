#include "server/tool_schemas.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "server/markers.h"

namespace flash_mla::server {
namespace {

// Schemas that are looked at, of all tools together: references among few can stand for very many.
constexpr int kMaxSchemas = 10'000;
constexpr int kMaxSchemaDepth = 8;

const Json* field(const Json& json, std::string_view name) {
  if (!json.is_object()) return nullptr;
  const auto it = json.find(std::string(name));
  return it == json.end() ? nullptr : &*it;
}

unsigned type_named(const Json& name) {
  if (name == "string") return ToolSchemas::kString;
  if (name == "number" || name == "integer") return ToolSchemas::kNumber;
  if (name == "boolean") return ToolSchemas::kBoolean;
  if (name == "null") return ToolSchemas::kNull;
  if (name == "object") return ToolSchemas::kObject;
  if (name == "array") return ToolSchemas::kArray;
  return ToolSchemas::kAny;
}

template <class Value>
unsigned type_of(const Value& value) {
  if (value.is_string()) return ToolSchemas::kString;
  if (value.is_number()) return ToolSchemas::kNumber;
  if (value.is_boolean()) return ToolSchemas::kBoolean;
  if (value.is_null()) return ToolSchemas::kNull;
  return value.is_array() ? ToolSchemas::kArray : ToolSchemas::kObject;
}

// What "#/$defs/NAME" and the like refer to, within the schema of all parameters.
const Json* referred(const Json& root, const Json& reference) {
  if (!reference.is_string()) return nullptr;
  const auto& path = reference.get_ref<const std::string&>();
  for (const std::string_view folder : {"$defs", "definitions"}) {
    const std::string prefix = fmt::format("#/{}/", folder);
    const Json* definitions = path.starts_with(prefix) ? field(root, folder) : nullptr;
    if (definitions != nullptr) return field(*definitions, path.substr(prefix.size()));
  }
  return nullptr;
}

// `types` of a schema, and whether white space around a text of it is none of its own.
unsigned trimmed(unsigned types, const Json& schema) {
  const bool known =
      std::ranges::any_of(std::array{"enum", "const", "pattern", "format", "minLength", "maxLength"},
                          [&](const char* name) { return field(schema, name) != nullptr; });
  return known && (types & ToolSchemas::kString) != 0 ? types | ToolSchemas::kTrimmed : types;
}

unsigned types_of(const Json& root, const Json& schema, int depth, int& budget) {
  if (depth > kMaxSchemaDepth || --budget < 0) return ToolSchemas::kAny;
  if (const Json* reference = field(schema, "$ref")) {
    const Json* target = referred(root, *reference);
    return target == nullptr ? ToolSchemas::kAny : types_of(root, *target, depth + 1, budget);
  }
  const auto all_of = [](const Json& list, const auto& f) {
    unsigned out = 0;
    for (const Json& one : list) out |= f(one);
    return out == 0 ? ToolSchemas::kAny : out;
  };
  if (const Json* type = field(schema, "type")) {
    return trimmed(type->is_array() ? all_of(*type, type_named) : type_named(*type), schema);
  }
  if (const Json* constant = field(schema, "const")) return trimmed(type_of(*constant), schema);
  if (const Json* list = field(schema, "enum"); list != nullptr && list->is_array()) {
    return trimmed(all_of(*list, type_of<Json>), schema);
  }
  for (const std::string_view name : {"anyOf", "oneOf"}) {
    if (const Json* list = field(schema, name); list != nullptr && list->is_array()) {
      return all_of(*list, [&](const Json& one) { return types_of(root, one, depth + 1, budget); });
    }
  }
  const Json* all = field(schema, "allOf");
  return all != nullptr && all->is_array() && all->size() == 1
             ? types_of(root, all->front(), depth + 1, budget)
             : ToolSchemas::kAny;
}

std::string quoted(std::string_view text) {
  std::string out = "\"";
  append_escaped(text, out);
  return out + '"';
}

}  // namespace

ToolSchemas::ToolSchemas(const Json& tools) {
  int budget = kMaxSchemas;
  for (const Json& tool : tools) {
    const Json* function = field(tool, "function");
    const Json* name = function == nullptr ? nullptr : field(*function, "name");
    const Json* parameters = function == nullptr ? nullptr : field(*function, "parameters");
    if (name == nullptr || !name->is_string()) continue;
    auto& types = types_[name->get<std::string>()];
    const Json* properties = parameters == nullptr ? nullptr : field(*parameters, "properties");
    if (properties == nullptr || !properties->is_object()) continue;
    for (const auto& [key, schema] : properties->items())
      types[key] = types_of(*parameters, schema, 0, budget);
  }
}

unsigned ToolSchemas::types(std::string_view tool, std::string_view parameter) const {
  const auto found = types_.find(tool);
  if (found == types_.end()) return kAny;
  const auto type = found->second.find(parameter);
  return type == found->second.end() ? kAny : type->second;
}

std::string parameter_json(std::string_view text, unsigned types) {
  if (types == ToolSchemas::kString) return quoted(text);
  const std::size_t begin = std::min(text.find_first_not_of(kWhiteSpace), text.size());
  std::string_view value = text.substr(begin);
  value = value.substr(0, value.find_last_not_of(kWhiteSpace) + 1);
  if ((types & ToolSchemas::kTrimmed) != 0) text = value;
  if ((types & ToolSchemas::kAny) == ToolSchemas::kString) return quoted(text);
  // As Python writes them; models mix it up.
  if (value == "True") value = "true";
  if (value == "False") value = "false";
  if (value == "None") value = "null";
  const Body json = Body::parse(value, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return quoted(text);
  const unsigned type = type_of(json);
  const bool may_be_text = (types & ToolSchemas::kString) != 0;
  if (type == ToolSchemas::kString ? !may_be_text : (types & type) != 0 || !may_be_text) {
    return std::string(value);
  }
  return quoted(text);
}

void append_escaped(std::string_view text, std::string& out) {
  constexpr std::string_view kSpecial = "\"\\\n\r\t\f\b", kLetters = "\"\\nrtfb";
  for (const char c : text) {
    if (const std::size_t known = kSpecial.find(c); known != kSpecial.npos) {
      out += '\\';
      out += kLetters[known];
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned char>(c));
    } else {
      out += c;
    }
  }
}

}  // namespace flash_mla::server
