#include "text/tool_convention.h"

#include <gmock/gmock.h>

#include "flash_mla/error.h"

namespace flash_mla::text {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// As V3's: calls only where there is no content, arguments as text, tools nowhere.
constexpr std::string_view kV3 =
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' or m.role == 'user' %}[{{ m.role }}]{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}"
    "{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```' }}"
    "{% endfor %}{% elif m.role == 'assistant' %}{{ '[assistant]' + m.content }}{% endif %}"
    "{% if m.role == 'tool' %}[tool]{{ m.content }}{% endif %}{% endfor %}";
// As GLM-5's: arguments as objects, content as text, tools listed.
constexpr std::string_view kGlm =
    "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{{ m.reasoning_content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>{% endfor %}"
    "</tool_call>{% endfor %}{% endfor %}";
constexpr std::string_view kPlain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";

constexpr std::string_view kTools =
    R"([{"type": "function", "function": {"name": "f", "description": "<｜User｜>", "parameters": {"z": 1, "a": 2}}}])";

ChatTemplate chat(std::string_view jinja) { return ChatTemplate::parse(jinja, "<s>", "</s>", "test"); }

std::string joined(const std::vector<TextPart>& parts) {
  std::string out;
  for (const TextPart& part : parts) out += part.text;
  return out;
}

std::string render(std::string_view jinja, const std::vector<ChatMessage>& messages,
                   std::string_view tools = "") {
  const ChatTemplate c = chat(jinja);
  return joined(
      chat_with_tools(c, find_tool_convention(c), messages, tools, nlohmann::ordered_json::object()));
}

ChatMessage with_call(std::string content) {
  return {
      "assistant", std::move(content),
      R"({"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"b\": [1], \"a\": 2}"}}]})"};
}

TEST(ToolConvention, IsFoundByRendering) {
  const ToolConvention v3 = find_tool_convention(chat(kV3));
  EXPECT_EQ(v3.format, ToolFormat::kDeepSeekV3);
  EXPECT_TRUE(v3.writes_calls && v3.null_content);
  EXPECT_FALSE(v3.object_arguments || v3.content_beside_calls || v3.lists_tools);
  const ToolConvention glm = find_tool_convention(chat(kGlm));
  EXPECT_EQ(glm.format, ToolFormat::kGlm47);
  EXPECT_TRUE(glm.writes_calls && glm.object_arguments && glm.content_beside_calls && glm.lists_tools);
  EXPECT_FALSE(glm.null_content);
  const ToolConvention plain = find_tool_convention(chat(kPlain));
  EXPECT_EQ(plain.format, ToolFormat::kNone);
  EXPECT_FALSE(plain.writes_calls || plain.lists_tools);
}

TEST(ToolConvention, NothingOfAMessageIsLost) {
  const ChatMessage result{"tool", "21", R"({"tool_call_id": "1"})"};
  EXPECT_THAT(
      render(kV3, {{"user", "q"}, with_call(""), result}),
      HasSubstr(
          "[user]q<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"b\": [1], \"a\": 2}\n```[tool]21"));
  // Words and calls of one message, which the template would drop.
  EXPECT_THAT(render(kV3, {{"user", "q"}, with_call("words"), result}),
              HasSubstr("[assistant]words<｜tool▁call▁begin｜>function"));
  EXPECT_EQ(
      render(kGlm, {{"user", "q"}, with_call("words"), result}),
      "[user]q[assistant]words<tool_call>f<arg_key>b</arg_key><arg_value>[1]</arg_value><arg_key>a</arg_key>"
      "<arg_value>2</arg_value></tool_call>[tool]21");
  EXPECT_EQ(render(kGlm, {{"assistant", "a", R"({"reasoning_content": "r"})"}}), "[assistant]ar");
}

TEST(ToolConvention, ToolsAreListedByTheTemplateOrASystemMessage) {
  EXPECT_THAT(render(kGlm, {{"user", "q"}}, kTools), HasSubstr(R"("parameters": {"z": 1, "a": 2}})"));
  EXPECT_THAT(render(kV3, {{"user", "q"}}, kTools), HasSubstr("[system]## Tools"));
  const std::string listed = render(kV3, {{"system", "s"}, {"user", "q"}}, kTools);
  EXPECT_THAT(listed, HasSubstr("[system]s\n\n## Tools"));
  EXPECT_THAT(listed, HasSubstr("Parameters: {\"z\": 1, \"a\": 2}"));
}

TEST(ToolConvention, WhatAToolSaysIsNoMarker) {
  for (const std::string_view jinja : {kV3, kGlm}) {
    const ChatTemplate c = chat(jinja);
    const std::vector<ChatMessage> messages = {{"user", "q"}};
    for (const TextPart& part :
         chat_with_tools(c, find_tool_convention(c), messages, kTools, nlohmann::ordered_json::object())) {
      if (part.control) {
        EXPECT_THAT(part.text, Not(HasSubstr("<｜User｜>")));
      }
    }
  }
}

TEST(ToolConvention, WhatTheTemplateCannotSayIsRefused) {
  EXPECT_THROW(render(kPlain, {with_call("")}), InvalidArgument);
  EXPECT_THROW(render(kPlain, {{"tool", "21"}}), InvalidArgument);
  EXPECT_THROW(render(kPlain, {{"user", "q"}}, kTools), Unsupported);
  EXPECT_THROW(render(kGlm, {{"user", "q", "[]"}}), InvalidArgument);
  EXPECT_THROW(render(kGlm, {{"bogus", "q"}}, kTools), InvalidArgument);
  EXPECT_THROW(render(kGlm, {{"user", "q"}}, "{}"), InvalidArgument);
  ChatMessage broken = with_call("");
  broken.fields = R"({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]})";
  EXPECT_THROW(render(kGlm, {broken}), InvalidArgument);
}

}  // namespace
}  // namespace flash_mla::text
