#include "server/tool_schemas.h"

#include <gtest/gtest.h>

namespace flash_mla::server {
namespace {

unsigned types_of(const char* property, const char* definitions = "{}") {
  const Json parameters = {{"type", "object"},
                           {"properties", {{"x", Json::parse(property)}}},
                           {"$defs", Json::parse(definitions)}};
  const Json tools =
      Json::array({{{"type", "function"}, {"function", {{"name", "f"}, {"parameters", parameters}}}}});
  return ToolSchemas(tools).types("f", "x");
}

TEST(ToolSchemas, KnowsTheTypesOfParameters) {
  using T = ToolSchemas;
  EXPECT_EQ(types_of(R"({"type": "string"})"), T::kString);
  EXPECT_EQ(types_of(R"({"type": ["integer", "null"]})"), T::kNumber | T::kNull);
  EXPECT_EQ(types_of(R"({"enum": ["a", "b"]})"), T::kString | T::kTrimmed);
  EXPECT_EQ(types_of(R"({"type": "string", "pattern": "a"})"), T::kString | T::kTrimmed);
  EXPECT_EQ(types_of(R"({"enum": [1, 2]})"), T::kNumber);
  EXPECT_EQ(types_of(R"({"const": true})"), T::kBoolean);
  EXPECT_EQ(types_of(R"({"anyOf": [{"type": "array"}, {"type": "object"}]})"), T::kArray | T::kObject);
  EXPECT_EQ(types_of(R"({"$ref": "#/$defs/E"})", R"({"E": {"enum": ["a"]}})"), T::kString | T::kTrimmed);
  EXPECT_EQ(types_of(R"({"allOf": [{"$ref": "#/$defs/E"}]})", R"({"E": {"type": "number"}})"), T::kNumber);
}

TEST(ToolSchemas, WhatItDoesNotUnderstandAllowsEverything) {
  for (const char* schema :
       {"{}", "true", "[]", R"({"type": "strange"})", R"({"$ref": "http://x"})", R"({"$ref": 5})",
        R"({"type": []})", R"({"anyOf": []})", R"({"$ref": "#/$defs/E"})"}) {
    EXPECT_EQ(types_of(schema), ToolSchemas::kAny) << schema;
  }
  EXPECT_EQ(types_of(R"({"$ref": "#/$defs/E"})", R"({"E": {"$ref": "#/$defs/E"}})"), ToolSchemas::kAny);
  EXPECT_EQ(ToolSchemas(Json::parse(R"([1, {"function": 2}, {"function": {"name": "f"}}])")).types("f", "x"),
            ToolSchemas::kAny);
}

// References can stand for far more schemas than there are.
TEST(ToolSchemas, LooksAtABoundedNumberOfSchemas) {
  std::string many = R"({"anyOf": [)";
  for (int i = 0; i < 1000; ++i) many += R"({"$ref": "#/$defs/E"},)";
  many += R"({"type": "string"}]})";
  EXPECT_NE(types_of(R"({"$ref": "#/$defs/E"})", (R"({"E": )" + many + "}").c_str()), 0U);
}

TEST(ToolSchemas, EscapesAsJsonDoes) {
  std::string out;
  append_escaped("\"\\\n\x01é", out);
  EXPECT_EQ(Json::parse('"' + out + '"'), "\"\\\n\x01é");
}

}  // namespace
}  // namespace flash_mla::server
