#include "server/chat_prompt.h"

#include <fmt/format.h>

#include <algorithm>

#include "flash_mla/error.h"
#include "server/markers.h"

namespace flash_mla::server {
namespace {

using Begin = ReasoningSplitter::Begin;

// Known from vLLM and SGLang. All split at the same tags.
constexpr std::string_view kReasoningParsers[] = {
    "deepseek_r1", "deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4", "glm45", "glm47", "kimi_k2"};

constexpr std::string_view kOpen = "<think>", kClose = "</think>";

// The end of what the template itself says; empty where the prompt ends with what a client says.
std::string end_of(const std::vector<TextPart>& parts) {
  constexpr std::size_t kEnough = 64;
  std::string out;
  for (auto part = parts.rbegin(); part != parts.rend() && part->control && out.size() < kEnough; ++part) {
    out.insert(0, part->text);
  }
  return out.substr(out.size() - std::min(out.size(), kEnough));
}

// The last tag of a message that is not over.
std::string tags_of(std::string_view content) {
  const std::size_t open = content.rfind(kOpen), close = content.rfind(kClose);
  if (open == content.npos && close == content.npos) return {};
  const bool is_open = close == content.npos || (open != content.npos && open > close);
  return std::string(is_open ? kOpen : kClose);
}

Begin reasoning_begin(const Engine& engine, std::string_view parser, std::string_view prompt_end) {
  const bool wanted = parser == "auto" ? engine.token_id(kClose) >= 0 : parser != "none";
  if (!wanted) return Begin::kContent;
  const std::string_view said = prompt_end.substr(0, prompt_end.find_last_not_of(kWhiteSpace) + 1);
  if (said.ends_with(kOpen)) return Begin::kReasoning;
  if (said.ends_with(kClose)) return Begin::kContent;
  // R1 reasons always: whatever stands before </think> is reasoning.
  return parser == "deepseek_r1" ? Begin::kReasoning : Begin::kUndecided;
}

int num_calls(const std::vector<ChatMessage>& messages) {
  int out = 0;
  for (const ChatMessage& message : messages) {
    if (message.role != "assistant" || message.fields.empty()) continue;
    const Body fields = Body::parse(message.fields, nullptr, /*allow_exceptions=*/false);
    const auto calls = fields.find("tool_calls");
    if (calls != fields.end()) out += static_cast<int>(calls->size());
  }
  return out;
}

// Asks for reasoning, or for none, by the name that the template has for it.
void set_thinking(const Engine& engine, Call& call) {
  if (!call.thinking) return;
  Request& request = call.requests.front();
  for (const char* name : {"thinking", "enable_thinking"}) {
    if (!engine.chat_template_reads(name)) continue;
    Json variables = request.chat_variables.empty()
                         ? Json::object()
                         : Json::parse(request.chat_variables, nullptr, /*allow_exceptions=*/false);
    if (!variables.is_object()) return;  // refused by the engine
    const auto given = variables.find(name);
    if (given != variables.end() && *given != *call.thinking) {
      throw bad_request(
          fmt::format("{} and chat_template_kwargs.{}: expected one of them", call.thinking_field, name),
          call.thinking_field);
    }
    variables[name] = *call.thinking;
    request.chat_variables = dump(variables);
    return;
  }
  throw bad_request(fmt::format("{} is not supported by this model: its chat template has no switch for it",
                                call.thinking_field),
                    call.thinking_field);
}

// While the model reasons its words are free.
void begin_behind_reasoning(Begin begin, TextFormat& format) {
  if (begin == Begin::kContent) return;
  format.begins_behind = kClose;
  if (begin == Begin::kUndecided) format.opened_by = kOpen;
}

}  // namespace

void check_reasoning_parser(std::string_view name) {
  if (name == "auto" || name == "none" ||
      std::ranges::find(kReasoningParsers, name) != std::end(kReasoningParsers)) {
    return;
  }
  throw InvalidArgument(fmt::format("reasoning parser is \"{}\", expected auto, none, {}", name,
                                    fmt::join(kReasoningParsers, ", ")));
}

void prepare_chat(const Engine& engine, const ServerOptions& options, Call& call) {
  Request& request = call.requests.front();
  ChatOutputOptions& output = call.output;
  const bool tools = call.tools.choice != ToolUse::Choice::kNone;
  if (tools) {
    output.tools = tool_syntax(engine.tool_format());
    output.schemas = call.tools.schemas;
    output.parallel = call.tools.parallel;
    request.tools = call.tools.tools;
    if (output.tools == nullptr) {
      throw bad_request(
          "tools are not supported by this model: its chat template does not write calls of tools", "tools");
    }
  }
  set_thinking(engine, call);
  const bool goes_on = request.continue_final_message || !request.add_generation_prompt;
  if (goes_on && call.tools.choice == ToolUse::Choice::kRequired) {
    throw bad_request("tool_choice: expected without continue_final_message and with add_generation_prompt",
                      "tool_choice");
  }
  std::vector<TextPart> parts = engine.apply_chat_template(request);
  const std::string end =
      request.continue_final_message ? tags_of(request.messages.back().content) : end_of(parts);
  const std::string_view parser =
      call.separate_reasoning ? std::string_view(options.reasoning_parser) : "none";
  output.reasoning = reasoning_begin(engine, parser, end);
  if (parser == "kimi_k2" || (parser == "auto" && engine.tool_format() == ToolFormat::kKimiK2)) {
    output.also_ends_reasoning = tool_syntax(ToolFormat::kKimiK2)->section_begin;
  }
  if (call.tools.choice == ToolUse::Choice::kRequired) {
    std::string begun;
    if (output.reasoning == Begin::kReasoning) begun = end.ends_with('\n') ? "\n</think>\n\n" : "</think>";
    output.reasoning = Begin::kContent;
    output.opening = tool_call_opening(*output.tools, call.tools.named, num_calls(request.messages));
    parts.push_back({begun + output.opening, /*control=*/true});
  }
  if (call.tools.choice != ToolUse::Choice::kRequired && options.reasoning_parser != "none") {
    begin_behind_reasoning(reasoning_begin(engine, options.reasoning_parser, end), request.sampling.format);
  }
  request.prompt_parts = std::move(parts);
  request.messages.clear();
  request.continue_final_message = false;
  request.add_generation_prompt = true;
  request.tools.clear();
  request.chat_variables.clear();
}

}  // namespace flash_mla::server
