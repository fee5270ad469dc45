#include "server/chat_output.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <ctime>
#include <nlohmann/json.hpp>
#include <random>

namespace flash_mla::server {
namespace {

using Begin = ReasoningSplitter::Begin;

// An answer in a form that tests compare.
struct Whole {
  std::string reasoning, content;
  std::vector<std::string> calls;  // id|name|arguments
  bool operator==(const Whole&) const = default;
};
std::ostream& operator<<(std::ostream& out, const Whole& w) {
  out << "reasoning " << w.reasoning << "\ncontent " << w.content;
  for (const std::string& call : w.calls) out << "\ncall " << call;
  return out;
}

class Reader {
 public:
  explicit Reader(const ChatOutputOptions& options) : output_(options, "call_") {}

  void push(std::string_view text) { take(output_.push(text)); }
  Whole finish() {
    take(output_.finish());
    Whole out = whole_;
    for (std::size_t i = 0; i < ids_.size(); ++i)
      out.calls.push_back(ids_[i] + "|" + names_[i] + "|" + arguments_[i]);
    EXPECT_EQ(output_.calls_tools(), !ids_.empty());
    return out;
  }

 private:
  void take(const ChatPiece& piece) {
    whole_.reasoning += piece.reasoning;
    whole_.content += piece.content;
    int last = -1;
    for (const ToolCallPiece& call : piece.calls) {
      EXPECT_GT(call.index, last);
      last = call.index;
      if (!call.name.empty()) {  // the first of it
        ASSERT_EQ(call.index, static_cast<int>(ids_.size()));
        ids_.push_back(call.id);
        names_.push_back(call.name);
        arguments_.emplace_back();
      }
      ASSERT_EQ(call.index + 1, static_cast<int>(ids_.size()));
      arguments_.back() += call.arguments;
    }
  }

  ChatOutput output_;
  Whole whole_;
  std::vector<std::string> ids_, names_, arguments_;
};

Whole read(const ChatOutputOptions& options, std::string_view text,
           const std::vector<std::size_t>& cuts = {}) {
  Reader reader(options);
  std::size_t at = 0;
  for (const std::size_t cut : cuts) {
    reader.push(text.substr(at, cut - at));
    at = cut;
  }
  reader.push(text.substr(at));
  return reader.finish();
}

// Cut at every place, at every two, into bytes, and at random ones: always the same.
void expect_same_in_pieces(const ChatOutputOptions& options, std::string_view text) {
  const Whole whole = read(options, text);
  std::vector<std::size_t> bytes;
  for (std::size_t i = 1; i < text.size(); ++i) {
    bytes.push_back(i);
    ASSERT_EQ(read(options, text, {i}), whole) << "cut at " << i << " of " << text;
  }
  ASSERT_EQ(read(options, text, bytes), whole) << text;
  std::mt19937 random(1);
  for (int trial = 0; trial < 50; ++trial) {
    std::vector<std::size_t> cuts;
    for (const std::size_t i : bytes) {
      if (random() % 4 == 0) cuts.push_back(i);
    }
    ASSERT_EQ(read(options, text, cuts), whole) << text;
  }
}

nlohmann::ordered_json tools() {
  return nlohmann::ordered_json::parse(R"([
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {
      "city": {"type": "string"}, "days": {"type": "integer"}, "detail": {"type": "boolean"},
      "places": {"type": "array"}, "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
      "zip": {"type": ["string", "integer"]}}}}},
    {"type": "function", "function": {"name": "now"}}])");
}

ChatOutputOptions with_tools(ToolFormat format) {
  ChatOutputOptions out;
  out.tools = tool_syntax(format);
  out.schemas = std::make_shared<const ToolSchemas>(tools());
  return out;
}

ChatOutputOptions with_reasoning(Begin begin) {
  ChatOutputOptions out;
  out.reasoning = begin;
  return out;
}

TEST(ReasoningSplitter, SplitsAtTheTags) {
  const struct {
    Begin begin;
    const char *text, *reasoning, *content;
  } cases[] = {
      {Begin::kUndecided, "<think>\nWell.\n\nSo.\n</think>\n\nYes.\n", "Well.\n\nSo.", "Yes.\n"},
      {Begin::kUndecided, "\n<think>a</think>b", "a", "b"},
      {Begin::kUndecided, "Plain, <think> and all</think>.", "", "Plain, <think> and all</think>."},
      {Begin::kUndecided, " <thin", "", " <thin"},
      {Begin::kUndecided, "", "", ""},
      {Begin::kReasoning, "Well.</think>Yes. </think> and <think>", "Well.", "Yes. </think> and <think>"},
      {Begin::kReasoning, "<think>\nWell.</think>Yes.", "Well.", "Yes."},
      {Begin::kReasoning, "never ends </thin", "never ends </thin", ""},
      {Begin::kReasoning, "a < b </ c </think", "a < b </ c </think", ""},
      {Begin::kReasoning, "</think>\n", "", ""},
      {Begin::kReasoning, "<thi", "<thi", ""},
      {Begin::kContent, "\n<think>a</think>", "", "\n<think>a</think>"},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(read(with_reasoning(c.begin), c.text), (Whole{c.reasoning, c.content, {}})) << c.text;
    expect_same_in_pieces(with_reasoning(c.begin), c.text);
  }
}

TEST(ReasoningSplitter, HoldsNoMoreBreaksThanAMarkerMayHave) {
  ReasoningSplitter splitter(Begin::kReasoning);
  EXPECT_EQ(splitter.push("a" + std::string(1000, '\n')).reasoning.size(), 1 + 1000 - 64);
  expect_same_in_pieces(with_reasoning(Begin::kReasoning),
                        std::string(70, '\n') + "a" + std::string(70, '\n') + "</think>b");
  expect_same_in_pieces(with_reasoning(Begin::kUndecided), std::string(70, ' ') + "<think>a</think>");
}

TEST(ReasoningCounter, CountsTokensBetweenTheTags) {
  ReasoningCounter counter(Begin::kUndecided, "");
  for (const char* token : {"<think>", "\n", "Well", ".", "\n", "</think>", "\n\n", "Yes", "."})
    counter.push(token);
  EXPECT_EQ(counter.count(), 4);
  ReasoningCounter open(Begin::kReasoning, "");
  for (const char* token : {"Well", "</", "think", ">", "Yes"}) open.push(token);
  EXPECT_EQ(open.count(), 3);  // the tag in letters is complete with its last token
}

const char* const kV3 =
    "Let me look.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    "{\"city\": \"a<｜tool▁call▁end｜>```b\", \"days\": 2}\n```<｜tool▁call▁end｜>\n"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
const char* const kV31 =
    "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    "{\"city\": \"a<｜tool▁call▁end｜>```b\", \"days\": 2}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
const char* const kV32 =
    "Let me look.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_weather\">\n"
    "<｜DSML｜parameter name=\"city\" string=\"true\">a\n\"</b</｜DSML｜parameter>\n"
    "<｜DSML｜parameter name=\"days\" string=\"false\">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n"
    "<｜DSML｜invoke name=\"now\">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>";
const char* const kGlm45 =
    "Let me look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>a\n\"</b</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>";
const char* const kGlm47 =
    "Let me look.<tool_call>get_weather<arg_key>city</arg_key><arg_value>a\n\"</b</arg_value>"
    "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call><tool_call>now</tool_call>";
const char* const kKimi =
    "Let me look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    "{\"city\": \"a<|tool_call_end|>```b\", \"days\": 2}<|tool_call_end|><|tool_call_begin|>functions.now:1"
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>";

TEST(ToolParser, ReadsTheCallsOfEveryFormat) {
  const std::string json = R"({"city": "a<｜tool▁call▁end｜>```b", "days": 2})";
  const std::string parameters = R"({"city": "a\n\"</b", "days": 2})";
  const struct {
    ToolFormat format;
    const char* text;
    std::vector<std::string> calls;
  } cases[] = {
      {ToolFormat::kDeepSeekV3, kV3, {"call_0|get_weather|" + json, "call_1|now|{}"}},
      {ToolFormat::kDeepSeekV31, kV31, {"call_0|get_weather|" + json, "call_1|now|{}"}},
      {ToolFormat::kDeepSeekV32, kV32, {"call_0|get_weather|" + parameters, "call_1|now|{}"}},
      {ToolFormat::kGlm45, kGlm45, {"call_0|get_weather|" + parameters, "call_1|now|{}"}},
      {ToolFormat::kGlm47, kGlm47, {"call_0|get_weather|" + parameters, "call_1|now|{}"}},
      {ToolFormat::kKimiK2,
       kKimi,
       {R"(functions.get_weather:0|get_weather|{"city": "a<|tool_call_end|>```b", "days": 2})",
        "functions.now:1|now|{}"}},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(tool_format_name(c.format));
    const Whole expected{"", "Let me look.", c.calls};
    EXPECT_EQ(read(with_tools(c.format), c.text), expected);
    expect_same_in_pieces(with_tools(c.format), c.text);

    ChatOutputOptions one = with_tools(c.format);
    one.parallel = false;
    EXPECT_EQ(read(one, c.text), (Whole{"", "Let me look.", {c.calls[0]}}));
    expect_same_in_pieces(one, c.text);

    ChatOutputOptions thinking = with_tools(c.format);
    thinking.reasoning = Begin::kReasoning;
    const std::string thought = fmt::format("Hm.\n</think>\n\n{}", c.text);
    EXPECT_EQ(read(thinking, thought), (Whole{"Hm.", "Let me look.", c.calls}));
    expect_same_in_pieces(thinking, thought);

    // Without tools the text is left alone.
    EXPECT_EQ(read({}, c.text), (Whole{"", c.text, {}}));
  }
}

TEST(ToolParser, V4DiffersFromV32InOneTag) {
  std::string text = kV32;
  for (std::size_t at; (at = text.find("function_calls")) != text.npos;) text.replace(at, 14, "tool_calls");
  EXPECT_EQ(read(with_tools(ToolFormat::kDeepSeekV4), text).calls.size(), 2);
  expect_same_in_pieces(with_tools(ToolFormat::kDeepSeekV4), text);
  EXPECT_EQ(read(with_tools(ToolFormat::kDeepSeekV32), text).content.substr(0, 12), "Let me look.");
}

TEST(ToolParser, GoesOnWhereTheOpeningStandsInThePrompt) {
  for (const ToolFormat format : {ToolFormat::kDeepSeekV3, ToolFormat::kDeepSeekV31, ToolFormat::kDeepSeekV32,
                                  ToolFormat::kGlm45, ToolFormat::kGlm47, ToolFormat::kKimiK2}) {
    const std::string text = format == ToolFormat::kDeepSeekV3    ? kV3
                             : format == ToolFormat::kDeepSeekV31 ? kV31
                             : format == ToolFormat::kDeepSeekV32 ? kV32
                             : format == ToolFormat::kGlm45       ? kGlm45
                             : format == ToolFormat::kGlm47       ? kGlm47
                                                                  : kKimi;
    for (const char* name : {"", "get_weather"}) {
      ChatOutputOptions options = with_tools(format);
      options.opening = tool_call_opening(*options.tools, name, 0);
      const std::size_t at = text.find(options.opening);
      ASSERT_NE(at, text.npos) << options.opening;
      const std::string rest = text.substr(at + options.opening.size());
      Whole expected = read(with_tools(format), text);
      expected.content = "";
      EXPECT_EQ(read(options, rest), expected);
      expect_same_in_pieces(options, rest);
    }
  }
}

TEST(ToolParser, TypesPlainTextByTheSchema) {
  const auto glm = [](std::string_view key, std::string_view value) {
    return fmt::format("<tool_call>get_weather<arg_key>{}</arg_key><arg_value>{}</arg_value></tool_call>",
                       key, value);
  };
  const struct {
    const char *key, *value, *json;
  } cases[] = {
      {"city", "123", R"("123")"},
      {"city", "true", R"("true")"},
      {"city", " a ", R"(" a ")"},
      {"days", "3", "3"},
      {"days", "three", R"("three")"},
      {"days", " 3 ", "3"},
      {"detail", "True", "true"},
      {"places", R"(["a", 1])", R"(["a", 1])"},
      {"unit", "null", "null"},
      {"unit", "12", R"("12")"},
      {"unit", "C", R"("C")"},
      {"zip", "10115", "10115"},
      {"zip", "[1]", R"("[1]")"},
      {"unknown", "12", "12"},
      {"unknown", "a b", R"("a b")"},
      {"unknown", R"("a")", R"("\"a\"")"},
      {"unknown", R"({"a": [1]})", R"({"a": [1]})"},
      {"city", "", R"("")"},
      {"days", "", R"("")"},
  };
  for (const auto& c : cases) {
    const Whole whole = read(with_tools(ToolFormat::kGlm47), glm(c.key, c.value));
    ASSERT_EQ(whole.calls.size(), 1);
    EXPECT_EQ(whole.calls[0], fmt::format(R"(call_0|get_weather|{{"{}": {}}})", c.key, c.json));
    expect_same_in_pieces(with_tools(ToolFormat::kGlm47), glm(c.key, c.value));
  }
}

TEST(ToolParser, WhatIsNoCallStaysContent) {
  const struct {
    ToolFormat format;
    const char* text;
  } cases[] = {
      {ToolFormat::kGlm47, "Write <tool_call> and </tool_call> around it."},
      {ToolFormat::kGlm47, "a <tool_call>"},
      {ToolFormat::kGlm47, "a <tool_cal"},
      {ToolFormat::kGlm47, "<tool_call>two words<arg_key>a</arg_key>"},
      {ToolFormat::kDeepSeekV31, "x<｜tool▁calls▁begin｜>"},
      {ToolFormat::kDeepSeekV31, "x <｜tool▁calls▁begin｜>\n y"},
      {ToolFormat::kDeepSeekV31, "x<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>"},
      {ToolFormat::kDeepSeekV31,
       "x<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁call▁end｜><｜tool▁calls▁end｜>"},
      {ToolFormat::kDeepSeekV31, "x<｜tool▁call▁begin｜><｜tool▁sep｜>{}<｜tool▁call▁end｜>"},
      {ToolFormat::kDeepSeekV3,
       "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"},
      {ToolFormat::kDeepSeekV32, "<｜DSML｜function_calls>\n<｜DSML｜invoke nam=\"x\">"},
      {ToolFormat::kDeepSeekV32, "<｜DSML｜function_calls>\nno\n</｜DSML｜function_calls>"},
      {ToolFormat::kKimiK2,
       "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_end|>"},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(read(with_tools(c.format), c.text), (Whole{"", c.text, {}}));
    expect_same_in_pieces(with_tools(c.format), c.text);
  }
  // However long what could be a name goes on.
  const std::string prose = "<tool_call>" + std::string(2000, 'x') + "<arg_key>";
  EXPECT_EQ(read(with_tools(ToolFormat::kGlm47), prose), (Whole{"", prose, {}}));
  expect_same_in_pieces(with_tools(ToolFormat::kGlm47), prose.substr(0, 600) + prose.substr(1900));
}

TEST(ToolParser, KeepsWhatStandsBesideCalls) {
  const std::string junk =
      "a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>b<｜tool▁calls▁end｜>\nc\n";
  EXPECT_EQ(read(with_tools(ToolFormat::kDeepSeekV31), junk), (Whole{"", "ab\nc\n", {"call_0|now|{}"}}));
  expect_same_in_pieces(with_tools(ToolFormat::kDeepSeekV31), junk);
  const std::string within = "<tool_call>now<arg_key>a</arg_key>b<arg_value>1</arg_value></tool_call>";
  EXPECT_EQ(read(with_tools(ToolFormat::kGlm47), within),
            (Whole{"", "<arg_key>a</arg_key>b<arg_value>1</arg_value>", {"call_0|now|{}"}}));
  expect_same_in_pieces(with_tools(ToolFormat::kGlm47), within);
  const std::string spaced = "<tool_call>now<arg_key>a</arg_key> b c </arg_value>\n\n <x\n</tool_call>";
  EXPECT_EQ(read(with_tools(ToolFormat::kGlm47), spaced),
            (Whole{"", "<arg_key>a</arg_key> b c </arg_value>\n\n <x\n", {"call_0|now|{}"}}));
  expect_same_in_pieces(with_tools(ToolFormat::kGlm47), spaced);
}

TEST(ToolParser, ACallThatIsNotEndedEndsWithTheNext) {
  const std::string text = "<tool_call>now<tool_call>now</tool_call>";
  EXPECT_EQ(read(with_tools(ToolFormat::kGlm47), text), (Whole{"", "<tool_call>now", {"call_0|now|{}"}}));
  const std::string v31 =
      "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{\"a\": 1}\n<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁calls▁end｜>";
  EXPECT_EQ(read(with_tools(ToolFormat::kDeepSeekV31), v31),
            (Whole{"", "", {"call_0|now|{\"a\": 1}", "call_1|now|{}"}}));
  expect_same_in_pieces(with_tools(ToolFormat::kDeepSeekV31), v31);
}

TEST(ToolParser, ATextThatEndsWithinACallLeavesItUnfinished) {
  for (const auto& [format, text] :
       {std::pair(ToolFormat::kDeepSeekV3, kV3), std::pair(ToolFormat::kDeepSeekV31, kV31),
        std::pair(ToolFormat::kDeepSeekV32, kV32), std::pair(ToolFormat::kGlm45, kGlm45),
        std::pair(ToolFormat::kGlm47, kGlm47), std::pair(ToolFormat::kKimiK2, kKimi)}) {
    const Whole whole = read(with_tools(format), text);
    const std::string_view all = text;
    for (std::size_t n = 1; n < all.size(); ++n) {
      const Whole cut = read(with_tools(format), all.substr(0, n));
      ASSERT_LE(cut.calls.size(), 2);
      if (cut.calls.empty() || cut.calls[0] == whole.calls[0]) continue;
      // What there is of a call is the beginning of it, but for a value that its end would have quoted.
      const std::string& part = cut.calls[0];
      // A marker may have been cut, and then is text.
      ASSERT_TRUE(whole.calls[0].starts_with(part) ||
                  whole.calls[0].starts_with(part.substr(0, part.rfind('<'))))
          << part;
      ASSERT_TRUE(nlohmann::json::parse(part.substr(part.rfind('|') + 1), nullptr, false).is_discarded())
          << part;
    }
  }
}

// A model can write anything, and servers have other things to do.
TEST(ToolParser, TakesTimeInProportionToTheText) {
  for (const ToolFormat format :
       {ToolFormat::kDeepSeekV3, ToolFormat::kDeepSeekV32, ToolFormat::kGlm47, ToolFormat::kKimiK2}) {
    const ToolSyntax& syntax = *tool_syntax(format);
    for (const std::string_view marker : {syntax.section_begin, syntax.call_begin, syntax.call_end,
                                          syntax.parameter_begin, std::string_view(" ")}) {
      if (marker.empty()) continue;
      std::string text;
      while (text.size() < 200'000) text += marker;
      Reader reader(with_tools(format));
      const std::clock_t begin = std::clock();
      reader.push(text);
      const Whole whole = reader.finish();
      EXPECT_LT(static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC, 5);
      EXPECT_EQ(whole.content, text);
    }
  }
}

}  // namespace
}  // namespace flash_mla::server
