#include "server/tool_syntax.h"

#include <fmt/format.h>

#include <algorithm>

#include "server/markers.h"

namespace flash_mla::server {
namespace {

using Arguments = ToolSyntax::Arguments;

constexpr ToolSyntax kSyntaxes[] = {
    {ToolFormat::kDeepSeekV3, Arguments::kJson, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
     "<｜tool▁call▁begin｜>", "```json", "<｜tool▁call▁end｜>", "", ""},
    {ToolFormat::kDeepSeekV31, Arguments::kJson, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
     "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "", ""},
    {ToolFormat::kDeepSeekV32, Arguments::kDsml, "<｜DSML｜function_calls>", "</｜DSML｜function_calls>",
     "<｜DSML｜invoke", ">", "</｜DSML｜invoke>", "<｜DSML｜parameter", "</｜DSML｜parameter>"},
    {ToolFormat::kDeepSeekV4, Arguments::kDsml, "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>",
     "<｜DSML｜invoke", ">", "</｜DSML｜invoke>", "<｜DSML｜parameter", "</｜DSML｜parameter>"},
    {ToolFormat::kGlm45, Arguments::kGlm, "", "", "<tool_call>", "<arg_key>", "</tool_call>", "<arg_key>",
     "</arg_value>"},
    {ToolFormat::kGlm47, Arguments::kGlm, "", "", "<tool_call>", "<arg_key>", "</tool_call>", "<arg_key>",
     "</arg_value>"},
    {ToolFormat::kKimiK2, Arguments::kJson, "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
     "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "", ""},
};

constexpr std::string_view kSeparator = "<｜tool▁sep｜>", kFunctions = "functions.";

std::string_view trimmed(std::string_view text) {
  const std::size_t begin = text.find_first_not_of(kWhiteSpace);
  if (begin == text.npos) return {};
  return text.substr(begin, text.find_last_not_of(kWhiteSpace) - begin + 1);
}

// The value of NAME="..." in a tag; false if it is not there.
bool read_attribute(std::string_view tag, std::string_view name, std::string& out) {
  const std::string key = fmt::format("{}=\"", name);
  const std::size_t begin = tag.find(key);
  if (begin == tag.npos) return false;
  const std::size_t end = tag.find('"', begin + key.size());
  if (end == tag.npos) return false;
  out = tag.substr(begin + key.size(), end - begin - key.size());
  return true;
}

// A name that a client could have declared.
std::string checked(std::string_view name) {
  const bool fits = std::ranges::none_of(
      name, [](char c) { return static_cast<unsigned char>(c) <= ' ' || c == '<' || c == '>' || c == '"'; });
  return fits ? std::string(name) : "";
}

}  // namespace

const ToolSyntax* tool_syntax(ToolFormat format) {
  const auto* found = std::ranges::find(kSyntaxes, format, &ToolSyntax::format);
  return found == std::end(kSyntaxes) ? nullptr : found;
}

ToolHeader read_tool_header(const ToolSyntax& syntax, std::string_view text) {
  switch (syntax.format) {
    case ToolFormat::kDeepSeekV3: {  // function<｜tool▁sep｜>NAME
      const std::size_t at = text.find(kSeparator);
      return {at == text.npos ? "" : checked(trimmed(text.substr(at + kSeparator.size()))), ""};
    }
    case ToolFormat::kKimiK2: {  // functions.NAME:INDEX
      const std::string_view id = trimmed(text);
      std::string_view name = id.substr(0, id.rfind(':'));
      if (name.starts_with(kFunctions)) name.remove_prefix(kFunctions.size());
      return {checked(name), std::string(id)};
    }
    case ToolFormat::kDeepSeekV32:
    case ToolFormat::kDeepSeekV4: {  // name="NAME"
      std::string name;
      return {read_attribute(text, "name", name) ? checked(trimmed(name)) : "", ""};
    }
    default:
      return {checked(trimmed(text)), ""};
  }
}

DsmlParameter read_dsml_parameter(std::string_view text) {
  DsmlParameter out;
  std::string is_string;
  read_attribute(text, "name", out.name);
  if (read_attribute(text, "string", is_string)) {
    out.kind = is_string == "true" ? DsmlParameter::Kind::kString : DsmlParameter::Kind::kJson;
  }
  return out;
}

std::string tool_call_begin(const ToolSyntax& syntax, std::string_view name) {
  const std::string out(syntax.call_begin);
  switch (syntax.format) {
    case ToolFormat::kDeepSeekV3:
      return out + fmt::format("function{}{}\n```json\n", kSeparator, name);
    case ToolFormat::kDeepSeekV31:
      return out + fmt::format("{}{}", name, kSeparator);
    case ToolFormat::kDeepSeekV32:
    case ToolFormat::kDeepSeekV4:
      return out + fmt::format(" name=\"{}\">\n", name);
    case ToolFormat::kKimiK2:
      return out + fmt::format("{}{}:", kFunctions, name);
    case ToolFormat::kGlm45:
      return out + fmt::format("{}\n", name);
    default:
      return out + std::string(name);
  }
}

std::string tool_call_opening(const ToolSyntax& syntax, std::string_view name, int num_calls) {
  std::string out =
      fmt::format("{}{}", syntax.section_begin, syntax.arguments == Arguments::kDsml ? "\n" : "");
  if (!name.empty()) {
    out += tool_call_begin(syntax, name);
    if (syntax.format == ToolFormat::kKimiK2) out += fmt::format("{}{}", num_calls, syntax.header_end);
    return out;
  }
  out += syntax.call_begin;
  switch (syntax.format) {
    case ToolFormat::kDeepSeekV3:
      return out + fmt::format("function{}", kSeparator);
    case ToolFormat::kDeepSeekV32:
    case ToolFormat::kDeepSeekV4:
      return out + " name=\"";
    case ToolFormat::kKimiK2:
      return out + std::string(kFunctions);
    default:
      return out;
  }
}

}  // namespace flash_mla::server
