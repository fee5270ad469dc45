#include "text/deepseek_format.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>

#include "flash_mla/error.h"
#include "temporary_directory.h"
#include "text/chat_template.h"

namespace flash_mla::text {
namespace {

using ::testing::HasSubstr;
using OrderedJson = nlohmann::ordered_json;

DeepSeekFormat format_named(const std::string& name) {
  return name == "v4" ? DeepSeekFormat::kV4 : DeepSeekFormat::kV32;
}

std::string text_of(const std::vector<TextPart>& parts) {
  std::string out;
  for (const TextPart& part : parts) out += part.text;
  return out;
}

/// What deepseek_prompts.json says: conversations, and the prompts that DeepSeek's published code makes of them
/// (encoding_dsv32.py, encoding_dsv4.py); null where it refuses.
TEST(DeepSeekFormat, PromptsAreThoseOfThePublishedCode) {
  const OrderedJson cases = OrderedJson::parse(std::ifstream(FLASH_MLA_DEEPSEEK_PROMPTS));
  ASSERT_GT(cases.size(), 20u);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const OrderedJson& c = cases[i];
    const ChatInput input{c["messages"], c["variables"], true};
    const auto render = [&] { return text_of(render_deepseek(format_named(c["format"]), input)); };
    if (c["prompt"].is_null()) {
      EXPECT_ANY_THROW(render()) << "case " << i << ": " << c.dump();
    } else {
      EXPECT_EQ(render(), c["prompt"]) << "case " << i << ": " << c.dump();
    }
  }
}

TEST(DeepSeekFormat, TextOfClientsIsNeverControl) {
  const std::string mark = "\x01｜DSML｜<think>";
  const OrderedJson call = {{"id", mark},
                            {"function", {{"name", mark}, {"arguments", {{mark, mark}, {"n", {mark}}}}}}};
  const OrderedJson messages = {{{"role", "system"}, {"content", mark}, {"response_format", {mark}}},
                                {{"role", "user"}, {"content", mark}},
                                {{"role", "assistant"},
                                 {"content", mark},
                                 {"reasoning_content", mark},
                                 {"tool_calls", OrderedJson::array({call})}},
                                {{"role", "tool"}, {"content", mark}, {"tool_call_id", mark}}};
  const OrderedJson tool = {{"function", {{"name", mark}, {mark, 1}}}};
  const ChatInput input{messages, {{"tools", OrderedJson::array({tool})}, {"thinking", true}}, true};
  for (const DeepSeekFormat format : {DeepSeekFormat::kV32, DeepSeekFormat::kV4}) {
    std::string control, client;
    for (const TextPart& part : render_deepseek(format, input))
      (part.control ? control : client) += part.text;
    EXPECT_EQ(control.find('\x01'), control.npos);
    EXPECT_EQ(std::ranges::count(client, '\x01'), 8);  // JSON escapes the others
    EXPECT_THAT(control, HasSubstr("<｜DSML｜invoke name=\""));
  }
}

TEST(DeepSeekFormat, WhatIsRefusedIsNamed) {
  const auto refused = [](DeepSeekFormat format, const OrderedJson& messages,
                          const OrderedJson& variables = OrderedJson::object()) {
    return message_of<InvalidArgument>([&] { render_deepseek(format, {messages, variables, true}); });
  };
  const OrderedJson user = {{"role", "user"}, {"content", "a"}};
  EXPECT_THAT(refused(DeepSeekFormat::kV32, {user, {{"role", "bard"}}}),
              HasSubstr("messages[1].role = \"bard\""));
  EXPECT_THAT(refused(DeepSeekFormat::kV32, OrderedJson::array({user, 3})),
              HasSubstr("messages[1]: expected an object"));
  EXPECT_THAT(refused(DeepSeekFormat::kV32, {user, {{"role", "tool"}}}),
              HasSubstr("messages[1]: a tool's result"));
  EXPECT_THAT(refused(DeepSeekFormat::kV4,
                      OrderedJson::array({{{"role", "user"}, {"content", {{{"type", "image"}}}}}})),
              HasSubstr("messages[0].content: expected a string or parts that are text"));
  EXPECT_THAT(refused(DeepSeekFormat::kV4, OrderedJson::array({user}), {{"reasoning_effort", "some"}}),
              HasSubstr("reasoning_effort: expected \"high\" or \"max\""));
  EXPECT_THAT(refused(DeepSeekFormat::kV4, OrderedJson::array({user}), {{"thinking", 1}}),
              HasSubstr("thinking: expected true or false"));
  EXPECT_THAT(refused(DeepSeekFormat::kV4, OrderedJson::array({user}), {{"tools", {3}}}),
              HasSubstr("tools[0].function is missing"));
}

TEST(DeepSeekFormat, NothingBeginsAnAnswerThatIsNotAskedFor) {
  const OrderedJson messages = {{{"role", "user"}, {"content", "a"}}};
  const std::string prompt = "<｜begin▁of▁sentence｜><｜User｜>a";
  for (const DeepSeekFormat format : {DeepSeekFormat::kV32, DeepSeekFormat::kV4}) {
    EXPECT_EQ(text_of(render_deepseek(format, {messages, OrderedJson::object(), false})), prompt);
    EXPECT_EQ(text_of(render_deepseek(format, {messages, OrderedJson::object(), true})),
              prompt + "<｜Assistant｜></think>");
  }
}

class DeepSeekDirectory : public ::testing::Test {
 protected:
  void write(const std::string& name, const OrderedJson& json) { directory_.write(name, json.dump()); }
  ChatTemplate open() const { return ChatTemplate::open(directory_.path()); }
  TemporaryDirectory directory_;
};

TEST_F(DeepSeekDirectory, TheFormatStandsInForATemplate) {
  const std::vector<ChatMessage> hello = {{"user", "a"}};
  write("tokenizer_config.json", OrderedJson::object());
  EXPECT_THAT(message_of<InvalidArgument>([&] { open(); }), HasSubstr("chat_template is missing"));
  write("config.json", {{"model_type", "deepseek_v32"}});
  EXPECT_EQ(open().apply(hello), "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜></think>");
  EXPECT_THAT(open().origin(), ::testing::StartsWith("DeepSeek V3.2, built in ("));
  EXPECT_THAT(open().origin(), HasSubstr("config.json: model_type = \"deepseek_v32\")"));
  EXPECT_TRUE(open().reads("thinking"));
  EXPECT_FALSE(open().reads("reasoning_effort"));
  write("config.json", {{"model_type", "deepseek_v4"}});
  EXPECT_TRUE(open().reads("reasoning_effort"));
  // Whatever the model is called, these tokens are theirs.
  write("config.json", {{"model_type", "deepseek_v3"}});
  write("tokenizer.json", {{"added_tokens", {{{"content", "｜DSML｜"}}}}});
  EXPECT_THAT(open().origin(), ::testing::StartsWith("DeepSeek V3.2, built in ("));
  write("tokenizer.json",
        {{"added_tokens", {{{"content", "｜DSML｜"}}, {{"content", "<｜latest_reminder｜>"}}}}});
  EXPECT_THAT(open().origin(), ::testing::StartsWith("DeepSeek V4, built in ("));
  // A template comes first.
  write("config.json", {{"model_type", "deepseek_v32"}});
  write("tokenizer_config.json", {{"chat_template", "{{ messages[0].content }}"}});
  EXPECT_EQ(open().apply(hello), "a");
}

}  // namespace
}  // namespace flash_mla::text
