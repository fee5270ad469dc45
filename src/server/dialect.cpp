#include "server/dialect.h"

#include <fmt/format.h>

#include <algorithm>
#include <random>

#include "server/body.h"

namespace flash_mla::server {

std::string sent_event(std::string_view name, const Json& data) {
  return fmt::format("event: {}\ndata: {}\n\n", name, dump(data));
}

std::string new_id(std::string_view prefix) {
  std::random_device random;
  return fmt::format("{}{:08x}{:08x}{:08x}{:08x}", prefix, random(), random(), random(), random());
}

Json parse_ordered(std::string_view text) {
  check_width(parse_body(text));
  return Json::parse(text);
}

const Json* find(const Json& json, const char* key) {
  const auto it = json.find(key);
  return it == json.end() || it->is_null() ? nullptr : &*it;
}

std::string text_of_parts(const Json& content, const std::string& where,
                          std::initializer_list<std::string_view> types) {
  const std::string param = where.substr(0, where.find_first_of("[."));
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) {
    throw bad_request(fmt::format("{} is {}, expected text or parts", where, content.type_name()), param);
  }
  std::string out;
  for (std::size_t i = 0; i < content.size(); ++i) {
    const Json& part = content[i];
    const Json* type = part.is_object() ? find(part, "type") : nullptr;
    const bool known = type != nullptr && type->is_string() &&
                       std::ranges::find(types, type->get_ref<const std::string&>()) != types.end();
    const Json* text = known ? find(part, "text") : nullptr;
    if (text == nullptr || !text->is_string()) {
      throw bad_request(fmt::format("{}[{}] is no text; this model reads text only", where, i), param);
    }
    out += text->get_ref<const std::string&>();
  }
  return out;
}

}  // namespace flash_mla::server
