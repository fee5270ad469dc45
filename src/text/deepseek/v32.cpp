#include "text/deepseek/renderer.h"

namespace flash_mla::text::deepseek {
namespace {

constexpr std::string_view kToolsV32 =
    "## Tools\n\n"
    "You have access to a set of tools you can use to answer the user's question.\n"
    "You can invoke functions by writing a \"<｜DSML｜function_calls>\" block like the following as part of your "
    "reply to the user:\n"
    "<｜DSML｜function_calls>\n"
    "<｜DSML｜invoke name=\"$FUNCTION_NAME\">\n"
    "<｜DSML｜parameter name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</｜DSML｜parameter>\n"
    "...\n"
    "</｜DSML｜invoke>\n"
    "<｜DSML｜invoke name=\"$FUNCTION_NAME2\">\n"
    "...\n"
    "</｜DSML｜invoke>\n"
    "</｜DSML｜function_calls>\n\n"
    "String and scalar parameters should be specified as is without any escaping or quotes, while lists and "
    "objects should use JSON format. The \"string\" attribute should be set to \"true\" for string type "
    "parameters and \"false\" for other types (numbers, booleans, arrays, objects).\n\n"
    "If the thinking_mode is enabled, then after function results you should strongly consider outputting a "
    "thinking block. Here is an example:\n\n"
    "<｜DSML｜function_calls>\n...\n</｜DSML｜function_calls>\n\n"
    "<function_results>\n...\n</function_results>\n\n"
    "<think>...thinking about results</think>\n\n"
    "Here are the functions available in JSONSchema format:\n<functions>\n";
constexpr std::string_view kEndOfToolsV32 = "\n</functions>\n";

class V32 : public Renderer {
 public:
  explicit V32(const ChatInput& input) : Renderer(input, kToolsV32, kEndOfToolsV32, "function_calls") {}

  std::vector<TextPart> render() {
    static constexpr std::string_view kKept[] = {"user", "system", "tool", "assistant"};
    if (thinking_ && drop_thinking_) drop_old(kKept);
    find_last_user();
    for (std::size_t i = 0; i < turns_.size(); ++i) put(i);
    return prompt_.take();
  }

 private:
  void put(std::size_t i) {
    const Turn& turn = turns_[i];
    if (turn.role == "system") {
      prompt_.client(text_of(turn));
      put_tools(i);
      put_response_format(i);
    } else if (turn.role == "user" || turn.role == "developer") {
      put_user(i);
    } else if (turn.role == "assistant") {
      put_assistant(i);
    } else if (turn.role == "tool") {
      put_result(i);
    } else {
      fail_role(turn, "system, developer, user, assistant or tool");
    }
  }

  void put_user(std::size_t i) {
    const Turn& turn = turns_[i];
    const std::string content = text_of(turn);
    prompt_.own(kUser);
    if (turn.role == "developer") {
      if (content.empty()) fail(turn, ".content is empty, expected what the developer says");
      put_tools(i);
      put_response_format(i);
      prompt_.own("\n\n# The user's message is: ");
    }
    prompt_.client(content);
    if (is_last(i) && !generate_) return;
    prompt_.own(kAssistant);
    prompt_.own(static_cast<long>(i) == last_user_ && thinking_ ? kThink : kEndThink);
  }

  void put_assistant(std::size_t i) {
    const Turn& turn = turns_[i];
    if (thinking_ && static_cast<long>(i) > last_user_) {
      const std::string reasoning = reasoning_of(turn);
      if (reasoning.empty() && find_some(*turn.message, "tool_calls") == nullptr) {
        fail(turn, ": expected reasoning_content or tool_calls of an answer while thinking");
      }
      prompt_.client(reasoning);
      prompt_.own(kEndThink);
    }
    prompt_.client(text_of(turn));
    put_calls(turn, /*loose=*/false);
    prompt_.own(kEnd);
  }

  void put_result(std::size_t i) {
    const Turn& turn = turns_[i];
    std::size_t caller = i;
    while (caller > 0 && turns_[caller].role == "tool") --caller;
    const OrderedJson* calls =
        turns_[caller].role == "assistant" ? find_some(*turns_[caller].message, "tool_calls") : nullptr;
    const std::size_t place = i - caller;
    if (calls == nullptr || calls->size() < place) {
      fail(turn, ": a tool's result without a call; expected at most one for every call of an assistant");
    }
    if (place == 1) prompt_.own("\n\n<function_results>");
    prompt_.own("\n<result>");
    prompt_.client(text_of(turn));
    prompt_.own("</result>");
    if (place < calls->size()) return;
    prompt_.own("\n</function_results>");
    if (is_last(i) && !generate_) return;
    prompt_.own("\n\n");
    prompt_.own(static_cast<long>(i) >= last_user_ && thinking_ ? kThink : kEndThink);
  }
};

}  // namespace

std::vector<TextPart> render_v32(const ChatInput& input) { return V32(input).render(); }

}  // namespace flash_mla::text::deepseek
