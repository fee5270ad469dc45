#include "text/chat_template.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <ctime>
#include <functional>

#include "flash_mla/error.h"
#include "temporary_directory.h"

// What is rendered is compared with Python's Jinja2 in tests/python/test_chat_template.py; here is what Jinja2 cannot
// say: which bytes are control, how long it takes, and what is refused.

namespace flash_mla::text {
namespace {

using ::testing::HasSubstr;

ChatTemplate parse(std::string_view jinja) { return ChatTemplate::parse(jinja, "<s>", "</s>", "t.jinja"); }

/// The parts with brackets around those that are control.
std::string marked(const ChatTemplate& chat, const nlohmann::ordered_json& messages,
                   const nlohmann::ordered_json& variables = nlohmann::ordered_json::object()) {
  std::string out;
  for (const TextPart& part : chat.parts(ChatInput{messages, variables, true})) {
    out += part.control ? "[" + part.text + "]" : part.text;
  }
  return out;
}

std::string marked_content(const std::string& expression, const std::string& content) {
  return marked(parse("{{" + expression + "}}"), {{{"role", "user"}, {"content", content}}});
}

TEST(ChatTemplate, TextOfClientsIsNeverControl) {
  const std::string c = "messages[0].content";
  EXPECT_EQ(marked_content("bos_token + " + c + " + '<x>'", "<s>"), "[<s>]<s>[<x>]");
  EXPECT_EQ(marked_content("(' ' + " + c + " + '<x> ').strip()", " <s> "), "<s> [<x>]");
  EXPECT_EQ(marked_content(c + ".split('|')[1]", "a|<s>|b"), "<s>");
  EXPECT_EQ(marked_content(c + ".replace('a', '<x>')", "<s>a</s>"), "<s>[<x>]</s>");
  EXPECT_EQ(marked_content("'<a>'.replace('a', " + c + ")", "<s>"), "[<]<s>[>]");
  EXPECT_EQ(marked_content("('<x>' + " + c + ")|upper", "<s>"), "[<X>]<S>");
  EXPECT_EQ(marked_content("('<x>' + " + c + ")[2:4]", "<s>"), "[>]<");
  EXPECT_EQ(marked_content("['<x>', " + c + "]|join('-')", "<s>"), "[<x>-]<s>");
  EXPECT_EQ(marked_content("messages[0]|tojson", "<s>"), "{\"role\": \"user\", \"content\": \"<s>\"}");
  EXPECT_EQ(marked_content("messages", "<s>"), "[{'role': 'user', 'content': '<s>'}]");
  EXPECT_EQ(marked_content("'<x>' ~ messages[0].role ~ 1", ""), "[<x>]user1");
  EXPECT_EQ(marked_content("'{}<x>'.format(" + c + ")", "<s>"), "<s>[<x>]");
  EXPECT_EQ(marked(parse("{% for k in messages[0] %}{{ k }}{% endfor %}"), {{{"<s>", "user"}}}), "<s>");
  EXPECT_EQ(marked(parse("{% set x %}<x>{{ messages[0].a }}{% endset %}{{ x }}"), {{{"a", "<s>"}}}),
            "[<x>]<s>");
  EXPECT_EQ(marked(parse("{% macro m(a) %}<x>{{ a }}{% endmacro %}{{ m(messages[0].a) }}"), {{{"a", "<s>"}}}),
            "[<x>]<s>");
}

TEST(ChatTemplate, TextAroundTags) {
  EXPECT_EQ(marked(parse("a {{ bos_token }} b { c"), {{{"role", "user"}}}), "[a <s> b { c]");
  EXPECT_EQ(marked(parse("a{"), {{{"role", "user"}}}), "[a{]");
}

TEST(ChatTemplate, VariablesOfClientsCannotStandForSpecialTokens) {
  const ChatTemplate chat = parse("{{ bos_token }}{{ thinking }}{{ messages|length }}");
  EXPECT_EQ(marked(chat, {{{"role", "user"}}}, {{"bos_token", "<s>x"}, {"thinking", "<s>"}, {"messages", 3}}),
            "[<s>]<s>1");
  EXPECT_THAT(message_of<InvalidArgument>([] { parse_chat_variables("{\"messages\": []}"); }),
              HasSubstr("chat_template_kwargs.messages"));
  EXPECT_THAT(message_of<InvalidArgument>([] { parse_chat_variables("[1]"); }),
              HasSubstr("expected a JSON object"));
  EXPECT_EQ(parse_chat_variables("{\"thinking\": true}").size(), 1u);
}

TEST(ChatTemplate, AListInANamespaceGrowsAndShrinks) {
  const auto render = [](const std::string& jinja) {
    return marked(parse("{% set ns = namespace(l=['a']) %}" + jinja), {{{"role", "user"}}});
  };
  EXPECT_EQ(render("{% set _ = ns.l.append(messages[0].role) %}{{ ns.l|join(',') }}"), "[a,]user");
  EXPECT_EQ(render("{{ ns.l.append('b') }}{{ ns.l.pop(0) }}{{ ns.l.pop() }}{{ ns.l|length }}"), "None[ab]0");
  EXPECT_THAT(message_of<InvalidArgument>([&] { render("{{ ns.l.pop(1) }}"); }),
              HasSubstr("pop of what a list"));
  EXPECT_THAT(message_of<InvalidArgument>([&] { render("{{ messages[0].role.pop() }}"); }),
              HasSubstr("what is no list in a namespace"));
  // The template's own list is as it was, the next time.
  const ChatTemplate chat =
      parse("{% set ns = namespace(l=['a']) %}{% set _ = ns.l.append('b') %}{{ ns.l|length }}");
  EXPECT_EQ(marked(chat, {{{"role", "user"}}}), marked(chat, {{{"role", "user"}}}));
}

TEST(ChatTemplate, WhatIsNotUnderstoodIsRefusedWithItsLine) {
  const auto refused = [](std::string_view jinja) { return message_of<Unsupported>([&] { parse(jinja); }); };
  EXPECT_THAT(refused("a\n{% include 'x' %}"),
              HasSubstr("t.jinja:2: the chat template has the tag \"include\""));
  EXPECT_THAT(refused("{{ x }}\n\n{{ x|urlize }}"),
              HasSubstr("t.jinja:3: the chat template has the filter \"urlize\""));
  EXPECT_THAT(refused("{{ x is odder }}"), HasSubstr("t.jinja:1: the chat template has the test \"odder\""));
  EXPECT_THAT(refused("{{ x.append(1) }}"), HasSubstr("the method \"append\""));
  EXPECT_THAT(refused("{{ x.pop() }}"), HasSubstr("the method \"pop\""));
  EXPECT_THAT(refused("{{ lipsum(1) }}"), HasSubstr("the function \"lipsum\""));
  EXPECT_THAT(refused("{{ x|map('nothing') }}"), HasSubstr("the filter \"nothing\""));
  EXPECT_THAT(refused("{{ x.__class__ }}"), HasSubstr("the attribute \"__class__\""));
  EXPECT_THAT(refused("{% for x in y %}\n{{ x }}"), HasSubstr("a tag without its \"endfor\""));
  EXPECT_THAT(refused("{% endif %}"), HasSubstr("the tag \"endif\""));
  EXPECT_THAT(refused("{{ x"), HasSubstr("\"{{\" without \"}}\""));
  EXPECT_THAT(refused("{{ 'x }}"), HasSubstr("a string without an end"));
  EXPECT_THAT(refused("{{ 99999999999999999999 }}"), HasSubstr("expected less than 2^63"));
  EXPECT_THAT(refused("{{" + std::string(2000, '(') + "1" + std::string(2000, ')') + "}}"),
              HasSubstr("nested more than"));
  EXPECT_THAT(refused("{{ 1" + std::string(2000, '+') + "1 }}"), HasSubstr("nested more than"));
}

TEST(ChatTemplate, RefusesMessagesThatTheTemplateRefuses) {
  const ChatTemplate chat =
      parse("{% if messages[0].role != 'user' %}\n{{ raise_exception('begin with user') }}{% endif %}");
  const std::vector<ChatMessage> messages = {{"system", "x"}};
  EXPECT_EQ(message_of<InvalidArgument>([&] { chat.apply(messages); }),
            "messages: begin with user (line 2 of the chat template)");
  EXPECT_THAT(message_of<InvalidArgument>([] {
                parse("{{ x.y.z }}").apply(std::vector<ChatMessage>{{"user", ""}});
              }),
              HasSubstr("messages: line 1 of the chat template does not take them"));
  EXPECT_THAT(message_of<InvalidArgument>([&] { chat.apply({}); }), HasSubstr("messages is empty"));
}

// Of the processor's: others may keep it busy.
double seconds_of(const std::function<void()>& f) {
  const std::clock_t begin = std::clock();
  f();
  return static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
}

constexpr const char* kJoining =
    "{% set ns = namespace(system='', first=true) %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% if ns.first %}{% set ns.system = m.content %}{% set ns.first = false %}{% else %}"
    "{% set ns.system = ns.system + '\n\n' + m.content %}{% endif %}{% endif %}{% endfor %}{{ bos_token + ns.system }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<u>' + m['content'] }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<a>' }}{% endif %}{% endfor %}";

TEST(ChatTemplate, TakesTimeInProportionToMessages) {
  const ChatTemplate chat = parse(kJoining);
  for (const char* role : {"system", "user"}) {
    const auto run = [&](std::size_t count) {
      const std::vector<ChatMessage> messages(count, {role, "some words"});
      return seconds_of([&] { EXPECT_GT(chat.apply(messages).size(), count * 10); });
    };
    run(1000);
    const double once = run(40'000), four_times = run(160'000);
    EXPECT_LT(four_times, std::max(8 * once, 0.2)) << role;
    EXPECT_LT(four_times, 10) << role;  // measured: 0.2
  }
}

TEST(ChatTemplate, GivesUpOnRenderingsWithoutEnd) {
  const ChatTemplate quadratic =
      parse("{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}x");
  const std::vector<ChatMessage> few(100, {"user", ""}), many(100'000, {"user", ""});
  EXPECT_EQ(quadratic.apply(few), "x");
  EXPECT_THAT(message_of<InvalidArgument>([&] { quadratic.apply(many); }), HasSubstr("takes more than"));
  const ChatTemplate endless = parse("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}");
  EXPECT_THAT(message_of<InvalidArgument>([&] { endless.apply(few); }), HasSubstr("deep"));
  const ChatTemplate nested =
      parse("{% set n = namespace(x=[]) %}{% for m in messages %}{% set n.x = [n.x] %}{% endfor %}");
  EXPECT_THAT(message_of<InvalidArgument>([&] { nested.apply(many); }),
              HasSubstr("nested more than 100 deep"));
  EXPECT_THAT(message_of<InvalidArgument>([&] { parse("{{ 'x' * 10000000 }}").apply(few); }),
              HasSubstr("makes more than"));
}

TEST(ChatTemplate, DirectoryAndFile) {
  const TemporaryDirectory directory;
  directory.write("tokenizer_config.json",
                  R"({"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}1"})");
  directory.write("own.jinja", "{{ bos_token }}2");
  const std::vector<ChatMessage> messages = {{"user", ""}};
  EXPECT_EQ(ChatTemplate::open(directory.path()).apply(messages), "<s>1");
  const ChatTemplate own = ChatTemplate::open(directory.path(), directory.path() / "own.jinja");
  EXPECT_EQ(own.apply(messages), "<s>2");
  EXPECT_EQ(own.origin(), (directory.path() / "own.jinja").string());
  EXPECT_TRUE(own.reads("bos_token"));
  EXPECT_FALSE(own.reads("thinking"));
}

}  // namespace
}  // namespace flash_mla::text
