#include <nlohmann/json.hpp>

#include "flash_mla/error.h"
#include "flash_mla/text_format.h"

namespace flash_mla {
namespace {

using Json = nlohmann::ordered_json;

Json parameters_of(const FunctionShape& function) {
  if (function.parameters.empty()) return {{"type", "object"}};
  Json out = Json::parse(function.parameters, nullptr, /*allow_exceptions=*/false);
  if (!out.is_object()) {
    throw InvalidArgument("parameters of the function \"" + function.name +
                          "\" are no JSON schema, expected an object");
  }
  return out;
}

// References of a function's schema begin at its root, which is no longer that of the whole.
void move_references(Json& in, const std::string& root) {
  if (in.is_object()) {
    for (auto& [name, value] : in.items()) {
      if (name == "$ref" && value.is_string() && value.get_ref<const std::string&>().starts_with('#')) {
        value = root + value.get_ref<const std::string&>().substr(1);
      } else {
        move_references(value, root);
      }
    }
  } else if (in.is_array()) {
    for (Json& value : in) move_references(value, root);
  }
}

}  // namespace

TextFormat function_call_format(const std::vector<FunctionShape>& functions, bool parallel) {
  if (functions.empty()) throw InvalidArgument("functions are empty, expected at least one");
  Json calls = Json::array(), definitions = Json::object();
  for (std::size_t i = 0; i < functions.size(); ++i) {
    const std::string name = "function" + std::to_string(i);
    definitions[name] = parameters_of(functions[i]);
    move_references(definitions[name], "#/$defs/" + name);
    calls.push_back(
        {{"type", "object"},
         {"properties",
          {{"name", {{"const", functions[i].name}}}, {"arguments", {{"$ref", "#/$defs/" + name}}}}},
         {"required", {"name", "arguments"}},
         {"additionalProperties", false}});
  }
  Json call = calls.size() == 1 ? calls[0] : Json{{"anyOf", calls}};
  Json schema = parallel ? Json{{"type", "array"}, {"items", call}, {"minItems", 1}} : call;
  schema["$defs"] = definitions;
  return {TextFormat::Kind::kJsonSchema, schema.dump(), {}};
}

TextFormat arguments_format(const FunctionShape& function) {
  return {TextFormat::Kind::kJsonSchema, parameters_of(function).dump(), {}};
}

}  // namespace flash_mla
