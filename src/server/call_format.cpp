#include "server/call_format.h"

#include <fmt/format.h>

#include <optional>
#include <string>
#include <utility>

#include "flash_mla/error.h"

namespace flash_mla::server {
namespace {

using Arguments = ToolSyntax::Arguments;

CallNotation::Arguments notation_of(Arguments arguments) {
  switch (arguments) {
    case Arguments::kDsml:
      return CallNotation::Arguments::kDsml;
    case Arguments::kGlm:
      return CallNotation::Arguments::kGlm;
    case Arguments::kJson:
      break;
  }
  return CallNotation::Arguments::kJson;
}

// Why no grammar can be made of a format; nothing if one can.
std::optional<std::string> refusal(const Engine& engine, const TextFormat& format) {
  try {
    engine.prepare(format);
  } catch (const InvalidArgument& e) {
    return e.what();
  } catch (const Unsupported& e) {
    return e.what();
  }
  return std::nullopt;
}

// The names of tools may be the beginnings of each other, so each is looked at alone.
void check_schemas(const Engine& engine, const std::vector<Tool>& tools, CallNotation& calls) {
  for (std::size_t i = 0; i < tools.size(); ++i) {
    std::string& parameters = calls.functions[i].parameters;
    if (parameters.empty()) continue;
    TextFormat alone;
    alone.calls = calls;
    alone.calls.opened.clear();
    alone.calls.functions = {calls.functions[i]};
    const std::optional<std::string> why = refusal(engine, alone);
    if (!why) continue;
    if (tools[i].strict)
      throw bad_request(fmt::format("tools[{}].function.parameters: {}", i, *why), "tools");
    parameters.clear();
  }
}

}  // namespace

CallNotation call_notation(const ToolSyntax& syntax, const ToolUse& tools, std::string_view opened) {
  CallNotation out;
  out.arguments = notation_of(syntax.arguments);
  out.section_begin = syntax.section_begin;
  out.section_end = syntax.section_end;
  out.end = syntax.call_end;
  out.opened = opened;
  out.parallel = tools.parallel;
  if (syntax.arguments == Arguments::kDsml) {
    out.section_begin = fmt::format("{}\n", syntax.section_begin);
    out.section_end = fmt::format("\n{}", syntax.section_end);
    out.separator.assign(1, '\n');
  } else if (syntax.format == ToolFormat::kDeepSeekV3) {
    out.end = fmt::format("\n```{}", syntax.call_end);
    out.separator.assign(1, '\n');
  } else if (syntax.format == ToolFormat::kGlm45) {
    out.separator.assign(1, '\n');
  } else if (syntax.format == ToolFormat::kKimiK2) {
    out.number_end = syntax.header_end;
  }
  for (const Tool& tool : tools.functions) {
    out.functions.push_back({tool_call_begin(syntax, tool.name), tool.parameters});
  }
  return out;
}

void add_call_format(const Engine& engine, const ToolSyntax& syntax, Call& call) {
  SamplingParams& sampling = call.requests.front().sampling;
  TextFormat& format = sampling.format;
  const bool required = call.tools.choice == ToolUse::Choice::kRequired;
  const bool strict = std::ranges::any_of(call.tools.functions, &Tool::strict);
  if (!required && !strict && format.is_free()) return;
  if (!sampling.stop.empty()) {  // which could cut a call
    if (strict) throw bad_request("stop: not together with tools that are strict", "stop");
    if (required) return;
  }
  CallNotation calls = call_notation(syntax, call.tools, required ? call.output.opening : "");
  check_schemas(engine, call.tools.functions, calls);
  if (required) {
    format = {};  // there are no words
    call.format_field.clear();
  } else if (format.is_free()) {
    calls.trigger = syntax.call_begin;
    format = {};  // free words have no gate: calls come up anywhere
  }
  format.calls = std::move(calls);
  if (!required || strict) {
    if (call.format_field.empty()) call.format_field = "tools";
  } else if (refusal(engine, format)) {
    format.calls = {};  // the call comes, as the model writes it
  }
}

}  // namespace flash_mla::server
