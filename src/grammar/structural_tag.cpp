#include "grammar/structural_tag.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "flash_mla/error.h"
#include "grammar/schema_check.h"

namespace flash_mla::grammar {
namespace {

using Json = nlohmann::ordered_json;  // properties come up in the order of the schema
using Kind = TextFormat::Kind;
using Arguments = CallNotation::Arguments;

constexpr const char* kAnyObject = R"({"type": "object", "additionalProperties": true})";
constexpr const char* kMaxCallNumber = "[0-9]{1,4}";

Json literal(std::string text) { return {{"type", "const_string"}, {"value", std::move(text)}}; }
Json sequence(Json elements) {
  return elements.size() == 1 ? elements[0] : Json{{"type", "sequence"}, {"elements", std::move(elements)}};
}
Json one_of(Json elements) {
  return elements.size() == 1 ? elements[0] : Json{{"type", "or"}, {"elements", std::move(elements)}};
}
Json json_text(std::string_view schema) {
  return {
      {"type", "json_schema"}, {"json_schema", Json::parse(schema)}, {"max_whitespace_cnt", kMaxJsonBlanks}};
}

// Of so many characters without the bracket that begins the tag behind them; the first and the last are no white
// space, which may stand around a value and is no part of it.
std::string bounded(std::int64_t least, std::int64_t most) {
  constexpr std::string_view kInner = "[^<]", kOuter = "[^< \\n\\r\\t]";
  if (most == 0) return "^$";
  const std::string middle =
      most < 0 ? fmt::format("{}{{{},}}", kInner, std::max<std::int64_t>(least - 2, 0))
               : fmt::format("{}{{{},{}}}", kInner, std::max<std::int64_t>(least - 2, 0), most - 2);
  std::string out(kOuter);
  if (most < 0 || most > 1) out += fmt::format("({}{}){}", middle, kOuter, least < 2 ? "?" : "");
  return least < 1 ? fmt::format("^({})?$", out) : fmt::format("^{}$", out);
}

// Strings that have no quotes around them are bounded by patterns: XGrammar knows no other way that keeps the tag
// behind them apart.
void bound_by_patterns(Json& schema) {
  if (!schema.contains("properties")) return;
  for (auto& [name, value] : schema["properties"].items()) {
    if (!value.is_object() || !value.contains("type") || value["type"] != "string") continue;
    if (!value.contains("minLength") && !value.contains("maxLength")) continue;
    const auto least = value.value("minLength", std::int64_t{0}),
               most = value.value("maxLength", std::int64_t{-1});
    if (most >= 0 && least > most)
      throw InvalidArgument(fmt::format("json_schema.properties.{}: minLength is above maxLength", name));
    value["pattern"] = bounded(least, most);
    value.erase("minLength");
    value.erase("maxLength");
  }
}

// Of one call. What ends a value in a notation of tags must not stand in it.
Json arguments(const CallNotation& calls, const CallNotation::Function& function) {
  const bool any = function.parameters.empty();
  Json out = json_text(any ? std::string(kAnyObject) : checked_schema(function.parameters));
  if (calls.arguments != Arguments::kJson) bound_by_patterns(out["json_schema"]);
  if (calls.arguments == Arguments::kDsml) {
    out["style"] = "deepseek_xml";
    out["excludes"] = {"</｜DSML｜parameter>"};
  } else if (calls.arguments == Arguments::kGlm) {
    out["style"] = "glm_xml";
    out["excludes"] = {"</arg_value>"};
    out["max_whitespace_cnt"] = 1;
  }
  return out;
}

// Behind a function's `begin`.
Json numbered(const CallNotation& calls, const Json& content) {
  if (calls.number_end.empty()) return content;
  return sequence({{{"type", "regex"}, {"pattern", kMaxCallNumber}}, literal(calls.number_end), content});
}

Json tag(const CallNotation& calls, std::string begin, const Json& content) {
  return {{"type", "tag"}, {"begin", std::move(begin)}, {"content", content}, {"end", calls.end}};
}

// Calls from the first to the last, and nothing else.
Json only_calls(const CallNotation& calls) {
  Json first = Json::array(), any = Json::array();
  for (const CallNotation::Function& function : calls.functions) {
    const Json content = arguments(calls, function);
    const std::string begin = calls.section_begin + function.begin;
    if (begin.starts_with(calls.opened)) {
      first.push_back(tag(calls, begin.substr(calls.opened.size()), numbered(calls, content)));
    } else if (!calls.number_end.empty() && calls.opened.starts_with(begin) &&
               calls.opened.ends_with(calls.number_end)) {
      first.push_back(tag(calls, "", content));
    }
    any.push_back(tag(calls, calls.separator + function.begin, numbered(calls, content)));
  }
  if (first.empty()) {
    throw InvalidArgument(fmt::format(
        "opened is \"{}\", expected what a call of one of the functions begins with", calls.opened));
  }
  Json all = Json::array({one_of(std::move(first))});
  if (calls.parallel) all.push_back({{"type", "star"}, {"content", one_of(std::move(any))}});
  if (!calls.section_end.empty()) all.push_back(literal(calls.section_end));
  return sequence(std::move(all));
}

// A text that is free up to where a call begins.
Json free_text(const CallNotation& calls) {
  Json tags = Json::array();
  for (const CallNotation::Function& function : calls.functions) {
    if (!function.begin.starts_with(calls.trigger)) {
      throw InvalidArgument(
          fmt::format("begin is \"{}\", expected the trigger \"{}\" first", function.begin, calls.trigger));
    }
    tags.push_back(tag(calls, function.begin, numbered(calls, arguments(calls, function))));
  }
  return {{"type", "triggered_tags"},
          {"triggers", {calls.trigger}},
          {"tags", std::move(tags)},
          {"at_least_one", false},
          {"stop_after_first", !calls.parallel}};
}

Json words(const TextFormat& format) {
  switch (format.kind) {
    case Kind::kJsonObject:
      return json_text(kAnyObject);
    case Kind::kJsonSchema:
      return json_text(checked_schema(format.source));
    case Kind::kRegex:
      return {{"type", "regex"}, {"pattern", format.source}};
    case Kind::kGrammar:
      return {{"type", "grammar"}, {"grammar", format.source}};
    case Kind::kChoice:
      return {{"type", "grammar"}, {"grammar", alternatives(format.choices)}};
    case Kind::kFree:
      break;
  }
  throw InvalidArgument("the format of a text: expected one that is not free");
}

}  // namespace

std::string structural_tag(const TextFormat& format) {
  const CallNotation& calls = format.calls;
  for (const CallNotation::Function& function : calls.functions) {
    if (function.begin.empty()) throw InvalidArgument("begin of a call is empty, expected a text");
  }
  Json content;
  if (format.kind != Kind::kFree) {
    content = one_of({words(format), only_calls(calls)});
  } else {
    content = calls.trigger.empty() ? only_calls(calls) : free_text(calls);
  }
  return Json{{"type", "structural_tag"}, {"format", std::move(content)}}.dump();
}

// Every byte that is not plain as an escape.
std::string grammar_literal(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (static_cast<unsigned char>(c) < ' ') {
      throw Unsupported("choice is not supported: control characters in it");
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string alternatives(const std::vector<std::string>& choices) {
  std::string out = "root ::= ";
  for (std::size_t i = 0; i < choices.size(); ++i) {
    out += i > 0 ? " | " : "";
    out += grammar_literal(choices[i]);
  }
  return out;
}

}  // namespace flash_mla::grammar
