// What a JSON schema may say, and where an error stands. XGrammar has no part in it.

#include "grammar/schema_check.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "flash_mla/error.h"
#include "grammar/source_check.h"

namespace flash_mla::grammar {
namespace {

using testing::HasSubstr;

std::string refusal(const std::string& schema) {
  try {
    return "taken: " + checked_schema(schema);
  } catch (const InvalidArgument& e) {
    return std::string("invalid: ") + e.what();
  } catch (const Unsupported& e) {
    return std::string("unsupported: ") + e.what();
  }
}

TEST(SchemaCheck, TakesAwayWhatIsOnlyRead) {
  EXPECT_EQ(checked_schema(R"({"title": "A", "type": "integer", "description": "b", "default": 3})"),
            R"({"type":"integer"})");
}

TEST(SchemaCheck, SaysTheTypeThatKeywordsSpeakOf) {
  EXPECT_EQ(checked_schema(R"({"minLength": 1})"), R"({"minLength":1,"type":"string"})");
  EXPECT_EQ(checked_schema(R"({"properties": {"b": {}, "a": {"minimum": 1}}})"),
            R"({"properties":{"b":{},"a":{"minimum":1,"type":"number"}},"type":"object"})");
  EXPECT_EQ(checked_schema(R"({"type": "object"})"), R"({"type":"object","additionalProperties":true})");
  EXPECT_EQ(checked_schema(R"({"type": "array"})"), R"({"type":"array","items":true})");
}

TEST(SchemaCheck, NamesThePlace) {
  EXPECT_THAT(refusal(R"({"properties": {"a": {"items": {"not": {}}}}})"),
              HasSubstr("unsupported: json_schema.properties.a.items.not"));
  EXPECT_THAT(refusal(R"({"anyOf": [{"type": "null"}, {"type": "text"}]})"),
              HasSubstr("invalid: json_schema.anyOf[1].type"));
  EXPECT_THAT(refusal(R"({"$defs": {"x": {"uniqueItems": true}}, "$ref": "#/$defs/x"})"),
              HasSubstr("json_schema.$defs.x.uniqueItems"));
  EXPECT_THAT(refusal(R"({"$ref": "#/$defs/no"})"), HasSubstr("#/$defs/no"));
  EXPECT_THAT(refusal(R"({"type": "string", "minLength": -1})"), HasSubstr("json_schema.minLength is -1"));
  EXPECT_THAT(refusal(R"({"type": "string", "maxLength": 5000})"), HasSubstr("expected 0 to 4096"));
  EXPECT_THAT(refusal(R"({"enum": []})"), HasSubstr("json_schema.enum"));
  EXPECT_THAT(refusal(R"({"type": "string", "enum": ["a", 1]})"), HasSubstr("not of its type"));
  EXPECT_THAT(refusal(R"({"type": "object", "required": ["a"]})"), HasSubstr("\"a\""));
  EXPECT_THAT(refusal("{"), HasSubstr("no JSON"));
  EXPECT_THAT(refusal("false"), HasSubstr("allows nothing"));
}

TEST(SchemaCheck, Bounds) {
  std::string deep = "true";
  for (int i = 0; i < 70; ++i) deep = R"({"type": "array", "items": )" + deep + "}";
  EXPECT_THAT(refusal(deep), HasSubstr("nested more than 64 deep"));
  nlohmann::json many = {{"type", "object"}, {"properties", nlohmann::json::object()}};
  for (int i = 0; i < 5000; ++i) many["properties"]["p" + std::to_string(i)] = {{"type", "null"}};
  EXPECT_THAT(refusal(many.dump()), HasSubstr("more than 4096 schemas"));
}

std::string refusal(const TextFormat& format) {
  try {
    check_source(format);
    return "taken";
  } catch (const InvalidArgument& e) {
    return e.what();
  }
}

TEST(SourceCheck, NamesWhatIsEmptyOrTooLarge) {
  using Kind = TextFormat::Kind;
  EXPECT_EQ(refusal({Kind::kRegex, "a+", {}}), "taken");
  EXPECT_EQ(refusal({Kind::kRegex, "", {}}), "regex is empty");
  EXPECT_EQ(refusal({Kind::kGrammar, "", {}}), "grammar is empty");
  EXPECT_EQ(refusal({Kind::kJsonSchema, "", {}}), "json_schema is empty");
  EXPECT_EQ(refusal({Kind::kChoice, "", {}}), "choice is empty");
  EXPECT_EQ(refusal({Kind::kChoice, "", {"a", ""}}), "choice is empty");
  EXPECT_THAT(refusal({Kind::kRegex, std::string(5000, 'a'), {}}),
              HasSubstr("regex has 5000 bytes, expected at most 4096"));
  EXPECT_THAT(refusal({Kind::kJsonSchema, std::string(70000, ' '), {}}), HasSubstr("expected at most 65536"));
  EXPECT_THAT(refusal({Kind::kRegex, "a{5000}", {}}), HasSubstr("a repetition of 5000"));
  EXPECT_THAT(refusal({Kind::kRegex, "((a{100}b){100}c){100}", {}}), HasSubstr("repetitions make it longer"));
  EXPECT_THAT(refusal({Kind::kRegex, std::string(100, '(') + std::string(100, ')'), {}}),
              HasSubstr("nested more than 64 deep"));
  TextFormat calls;
  calls.calls.functions = {{"f", std::string(70000, ' ')}};
  EXPECT_THAT(refusal(calls), HasSubstr("calls has 70001 bytes"));
}

}  // namespace
}  // namespace flash_mla::grammar
