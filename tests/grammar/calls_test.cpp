// Calls of functions in the notations of models.

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "flash_mla/error.h"
#include "tiny_vocabulary.h"

namespace flash_mla::grammar {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kWeather =
    R"({"type": "object", "properties": {"city": {"type": "string", "enum": ["Bonn", "Ulm"]},
  "days": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["city", "days"], "additionalProperties": false})";

TextFormat calls(CallNotation notation) {
  TextFormat out;
  out.calls = std::move(notation);
  return out;
}

CallNotation json_notation() {
  return {CallNotation::Arguments::kJson,
          {{"<call>weather<sep>", kWeather}, {"<call>now<sep>", ""}},
          "<calls>",
          "",
          "</call>",
          "</calls>",
          "",
          "",
          "",
          true};
}

TEST(Calls, AreAllOfTheText) {
  const TextFormat format = calls(json_notation());
  constexpr const char* kOne = R"(<calls><call>weather<sep>{"city": "Ulm", "days": 3}</call>)";
  EXPECT_TRUE(is_text(format, std::string(kOne) + "</calls>"));
  EXPECT_TRUE(is_text(format, std::string(kOne) + "<call>now<sep>{\"zone\": [1, null]}</call></calls>"));
  EXPECT_TRUE(is_text(format, "<calls><call>now<sep>{}</call></calls>"));
  EXPECT_FALSE(is_text(format, kOne));
  EXPECT_FALSE(is_text(format, "<calls></calls>"));
  EXPECT_FALSE(is_text(format, "words"));
  EXPECT_FALSE(Text(format).add("<calls><call>other"));
  EXPECT_FALSE(Text(format).add(R"(<calls><call>weather<sep>{"city": "Rom)"));
  EXPECT_FALSE(Text(format).add(R"(<calls><call>weather<sep>{"days")"));  // in the order of the schema
}

TEST(Calls, GoOnFromWhatThePromptHasOpened) {
  CallNotation notation = json_notation();
  notation.opened = "<calls><call>";
  EXPECT_TRUE(is_text(calls(notation),
                      "now<sep>{}</call><call>weather<sep>{\"city\":\"Bonn\",\"days\":9}</call></calls>"));
  notation.opened = "<calls><call>weather<sep>";
  notation.parallel = false;
  EXPECT_TRUE(is_text(calls(notation), "{\"city\":\"Bonn\",\"days\":1}</call></calls>"));
  EXPECT_FALSE(Text(calls(notation)).add("now"));
  EXPECT_FALSE(Text(calls(notation)).add("{\"city\":\"Bonn\",\"days\":1}</call><call>"));
  notation.opened = "elsewhere";
  EXPECT_THROW(compiler().compile(calls(notation)), InvalidArgument);
}

TEST(Calls, ComeUpInFreeText) {
  CallNotation notation = json_notation();
  notation.trigger = "<call>";
  const TextFormat format = calls(notation);
  EXPECT_TRUE(is_text(format, "words < and <calls"));
  EXPECT_TRUE(is_text(format, R"(words <call>weather<sep>{"city":"Ulm","days":2}</call> and words)"));
  EXPECT_TRUE(is_text(format, R"(a<call>now<sep>{}</call>b<call>now<sep>{}</call>)"));
  EXPECT_FALSE(Text(format).add("words <call>other"));
  EXPECT_FALSE(is_text(format, "words <call>now<sep>{"));
  notation.parallel = false;
  EXPECT_TRUE(is_text(calls(notation), "words"));
  EXPECT_TRUE(is_text(calls(notation), "a<call>now<sep>{}</call>"));
  EXPECT_FALSE(is_text(calls(notation), "a<call>now<sep>{}</call>b"));
  notation.trigger = "<other>";
  EXPECT_THROW(compiler().compile(calls(notation)), InvalidArgument);
}

TEST(Calls, StandInPlaceOfATextOfAFormat) {
  TextFormat format{TextFormat::Kind::kRegex, "[0-9]+!", {}};
  format.calls = json_notation();
  EXPECT_TRUE(is_text(format, "42!"));
  EXPECT_TRUE(is_text(format, "<calls><call>now<sep>{}</call></calls>"));
  EXPECT_FALSE(Text(format).add("words"));
  EXPECT_FALSE(Text(format).add("4<calls>"));
  for (const TextFormat::Kind kind : {TextFormat::Kind::kJsonObject, TextFormat::Kind::kJsonSchema,
                                      TextFormat::Kind::kGrammar, TextFormat::Kind::kChoice}) {
    format.kind = kind;
    format.source = kind == TextFormat::Kind::kGrammar ? "root ::= \"{}\"" : R"({"type": "object"})";
    format.choices = {"{}"};
    EXPECT_TRUE(is_text(format, "{}")) << static_cast<int>(kind);
    EXPECT_TRUE(is_text(format, "<calls><call>now<sep>{}</call></calls>")) << static_cast<int>(kind);
  }
}

TEST(Calls, HaveNumbers) {
  CallNotation notation = json_notation();
  notation.functions = {{"<call>functions.now:", ""}};
  notation.number_end = "<args>";
  EXPECT_TRUE(
      is_text(calls(notation),
              "<calls><call>functions.now:0<args>{}</call><call>functions.now:12<args>{}</call></calls>"));
  EXPECT_FALSE(Text(calls(notation)).add("<calls><call>functions.now:<"));
  notation.opened = "<calls><call>functions.now:7<args>";
  EXPECT_TRUE(is_text(calls(notation), "{}</call></calls>"));
  notation.trigger = "<call>";
  EXPECT_TRUE(is_text(calls(notation), "so <call>functions.now:3<args>{}</call>"));
}

TEST(Calls, DsmlSaysWhatIsAString) {
  CallNotation notation = json_notation();
  notation.arguments = CallNotation::Arguments::kDsml;
  notation.functions = {
      {"<call>weather>\n", kWeather},
      {"<call>any>\n", ""},
      {"<call>free>\n",
       R"({"type":"object","properties":{"s":{"type":"string"},"l":{"type":"array","items":{"type":"string"}}},"required":["s","l"]})"}};
  const TextFormat format = calls(notation);
  const auto parameter = [](const char* name, bool is_string, const char* value) {
    return std::string("<｜DSML｜parameter name=\"") + name + "\" string=\"" +
           (is_string ? "true" : "false") + "\">" + value + "</｜DSML｜parameter>\n";
  };
  EXPECT_TRUE(is_text(format, "<calls><call>weather>\n" + parameter("city", true, "Ulm") +
                                  parameter("days", false, "3") + "</call></calls>"));
  EXPECT_FALSE(Text(format).add("<calls><call>weather>\n" + parameter("city", false, "\"Ulm\"")));
  EXPECT_FALSE(Text(format).add("<calls><call>weather>\n" + parameter("city", true, "Rom")));
  EXPECT_TRUE(is_text(format, "<calls><call>free>\n" + parameter("s", true, "a <b> \"c\"\n") +
                                  parameter("l", false, "[\"x\"]") + "</call></calls>"));
  // What ends a value does not stand in one.
  EXPECT_FALSE(Text(format).add("<calls><call>free>\n" + parameter("s", true, "x") +
                                parameter("l", false, "[\"</｜DSML｜parameter>")));
  EXPECT_TRUE(is_text(format, "<calls><call>any>\n</call></calls>"));
}

TEST(Calls, GlmHasNoQuotes) {
  CallNotation notation = json_notation();
  notation.arguments = CallNotation::Arguments::kGlm;
  notation.functions = {{"<call>weather", kWeather},
                        {"<call>free", R"({"type":"object","properties":{"s":{"type":"string"}}})"}};
  notation.section_begin = notation.section_end = "";
  const TextFormat format = calls(notation);
  const auto argument = [](const char* name, const char* value) {
    return std::string("<arg_key>") + name + "</arg_key><arg_value>" + value + "</arg_value>";
  };
  EXPECT_TRUE(is_text(format, "<call>weather" + argument("city", "Ulm") + argument("days", "3") + "</call>"));
  EXPECT_FALSE(Text(format).add("<call>weather" + argument("city", "Rom")));
  EXPECT_FALSE(Text(format).add("<call>weather" + argument("days", "3")));
  EXPECT_TRUE(is_text(format, "<call>free" + argument("s", "a <b>\n") + "</call>"));
  EXPECT_TRUE(is_text(format, "<call>free</call>"));
}

// A call of f, whose only parameter has this schema.
TextFormat call_with(CallNotation::Arguments arguments, const std::string& schema) {
  CallNotation notation = json_notation();
  notation.arguments = arguments;
  notation.functions = {
      {"<call>f ", R"({"type":"object","properties":{"s":)" + schema + R"(},"required":["s"]})"}};
  notation.parallel = false;
  return calls(notation);
}

TEST(Calls, BoundsOfStringsWithoutQuotes) {
  using enum CallNotation::Arguments;
  for (const auto arguments : {kDsml, kGlm}) {
    const std::string begin = arguments == kDsml
                                  ? "<calls><call>f <｜DSML｜parameter name=\"s\" string=\"true\">"
                                  : "<calls><call>f <arg_key>s</arg_key><arg_value>";
    const std::string end =
        std::string(arguments == kDsml ? "</｜DSML｜parameter>" : "</arg_value>") + "</call></calls>";
    const auto takes = [&](const char* schema, const char* value) {
      return is_text(call_with(arguments, schema), begin + value + end);
    };
    EXPECT_TRUE(takes(R"({"type":"string","maxLength":3})", "a\n\xc3\xa4"));
    EXPECT_FALSE(takes(R"({"type":"string","maxLength":3})", "abcd"));
    EXPECT_FALSE(takes(R"({"type":"string","minLength":2})", "a"));
    EXPECT_TRUE(takes(R"({"type":"string","minLength":2})", "abcdefg"));
    EXPECT_TRUE(takes(R"({"type":"string","pattern":"^[a-z<]*$"})", "x<y"));
    EXPECT_FALSE(takes(R"({"type":"string","pattern":"^[a-z]*$"})", "x y"));
    EXPECT_TRUE(takes(R"({"type":"string","format":"date"})", "2026-11-30"));
    EXPECT_FALSE(takes(R"({"type":"string","format":"date"})", "2026-1-30"));
    EXPECT_FALSE(takes(R"({"type":"string","enum":["a","b"]})", "ab"));
    EXPECT_FALSE(takes(R"({"type":"string","maxLength":3})", "a<"));
    EXPECT_TRUE(takes(R"({"type":"string","maxLength":3})", ""));
    EXPECT_TRUE(takes(R"({"type":"string","minLength":1,"maxLength":1})", "a"));
    EXPECT_FALSE(takes(R"({"type":"string","minLength":1,"maxLength":1})", ""));
    EXPECT_FALSE(takes(R"({"type":"string","minLength":3,"maxLength":3})", "ab"));
    EXPECT_TRUE(takes(R"({"type":"string","minLength":3,"maxLength":3})", "a b"));
    EXPECT_TRUE(takes(R"({"type":["string","null"]})", "text"));
    EXPECT_THROW(compiler().compile(
                     call_with(arguments, R"({"type":"array","items":{"type":"string","maxLength":3}})")),
                 Unsupported);
  }
}

TEST(FunctionCallFormat, IsOneCallOrSeveral) {
  const TextFormat one = function_call_format({{"weather", kWeather}});
  EXPECT_TRUE(is_text(one, R"({"name": "weather", "arguments": {"city": "Ulm", "days": 3}})"));
  EXPECT_FALSE(Text(one).add(R"({"name": "now)"));
  const TextFormat two = function_call_format({{"weather", kWeather}, {"now", ""}});
  EXPECT_TRUE(is_text(two, R"({"name": "now", "arguments": {"any": 1}})"));
  EXPECT_FALSE(Text(two).add(R"({"name": "now", "arguments": {"city": "Ulm"}, )"));
  const TextFormat several = function_call_format({{"weather", kWeather}, {"now", ""}}, /*parallel=*/true);
  EXPECT_TRUE(is_text(
      several,
      R"([{"name": "now", "arguments": {}}, {"name": "weather", "arguments": {"city": "Ulm", "days": 1}}])"));
  EXPECT_FALSE(is_text(several, "[]"));
  for (unsigned seed = 0; seed < 20; ++seed) {
    const std::string text =
        random_text(function_call_format({{"f", kWeather}, {"weather", kWeather}}, true), seed);
    if (text.empty()) continue;
    const Json call = Json::parse(text);
    EXPECT_TRUE(call[0]["name"] == "weather" || call[0]["name"] == "f") << text;
    EXPECT_TRUE(call[0]["arguments"]["days"] > 0) << text;
  }
  EXPECT_THROW(function_call_format({}), InvalidArgument);
  EXPECT_THROW(function_call_format({{"f", "no JSON"}}), InvalidArgument);
}

TEST(FunctionCallFormat, KeepsReferencesWithinTheirFunction) {
  const char* tree =
      R"({"type": "object", "properties": {"kind": {"$ref": "#/$defs/kind"}}, "required": ["kind"],
    "$defs": {"kind": {"enum": ["a", "b"]}}})";
  const char* other =
      R"({"type": "object", "properties": {"kind": {"$ref": "#/$defs/kind"}}, "required": ["kind"],
    "$defs": {"kind": {"enum": [1, 2]}}})";
  const TextFormat format = function_call_format({{"f", tree}, {"g", other}});
  EXPECT_TRUE(is_text(format, R"({"name": "f", "arguments": {"kind": "a"}})"));
  EXPECT_TRUE(is_text(format, R"({"name": "g", "arguments": {"kind": 2}})"));
  EXPECT_FALSE(Text(format).add(R"({"name": "g", "arguments": {"kind": "a)"));
}

TEST(ArgumentsFormat, IsTheSchema) {
  EXPECT_TRUE(is_text(arguments_format({"weather", kWeather}), R"({"city":"Bonn","days":4})"));
  EXPECT_FALSE(Text(arguments_format({"weather", kWeather})).add(R"({"town")"));
  EXPECT_TRUE(is_text(arguments_format({"now", ""}), R"({"x": {}})"));
  EXPECT_THROW(arguments_format({"f", "[]"}), InvalidArgument);
}

}  // namespace
}  // namespace flash_mla::grammar
