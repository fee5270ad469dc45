// Masks of XGrammar over a tiny vocabulary.

#include "grammar/grammar.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <thread>

#include "flash_mla/error.h"
#include "tiny_vocabulary.h"

namespace flash_mla::grammar {
namespace {

using Kind = TextFormat::Kind;
using testing::ElementsAre;
using testing::HasSubstr;

TextFormat format(Kind kind, std::string source) { return {kind, std::move(source), {}}; }

std::string refusal(const TextFormat& f) {
  try {
    compiler().compile(f);
    return "taken";
  } catch (const InvalidArgument& e) {
    return std::string("invalid: ") + e.what();
  } catch (const Unsupported& e) {
    return std::string("unsupported: ") + e.what();
  }
}

TEST(Grammar, RegexIsMatchedByTheWholeText) {
  const TextFormat f = format(Kind::kRegex, "^[ab]{2,3}(x|yy)$");
  for (const char* good : {"abx", "aaayy", "bbx"}) EXPECT_TRUE(is_text(f, good)) << good;
  for (const char* bad : {"", "ax", "aby", "abxx", "cab", "aaaax"}) EXPECT_FALSE(is_text(f, bad)) << bad;
}

TEST(Grammar, EbnfRecurs) {
  const TextFormat f = format(Kind::kGrammar, "root ::= \"(\" root \")\" | [0-9]+");
  EXPECT_TRUE(is_text(f, "((12))"));
  EXPECT_FALSE(is_text(f, "((12)"));
  EXPECT_FALSE(Text(f).add("()"));
}

TEST(Grammar, JsonObjectIsAnyObject) {
  const TextFormat f = format(Kind::kJsonObject, "");
  EXPECT_TRUE(is_text(f, R"({"a": [1, {"b": null}], "c": "d\n\u00e4"})"));
  EXPECT_TRUE(is_text(f, "{}"));
  EXPECT_FALSE(Text(f).add("[1]"));
  EXPECT_FALSE(Text(f).add(R"({a)"));
  EXPECT_FALSE(is_text(f, R"({"a": 1)"));
  // White space has an end.
  EXPECT_TRUE(Text(f).add("{" + std::string(16, ' ')));
  EXPECT_FALSE(Text(f).add("{" + std::string(17, ' ')));
}

TEST(Grammar, ChoicesAreTaken) {
  const TextFormat f{Kind::kChoice, "", {"red", "gr\xc3\xbcn", "a \"b\"\\\n\t", "reddish"}};
  for (const std::string& choice : f.choices) EXPECT_TRUE(is_text(f, choice)) << choice;
  EXPECT_FALSE(is_text(f, "re"));
  EXPECT_FALSE(Text(f).add("blue"));
}

TEST(Grammar, RandomTextsAreValid) {
  const TextFormat f = format(Kind::kJsonSchema, R"({"type": "object", "properties": {
      "n": {"type": "integer", "minimum": -3, "maximum": 12}, "b": {"type": ["boolean", "null"]},
      "s": {"type": "string", "minLength": 1, "maxLength": 4}, "l": {"type": "array", "items": {"enum": ["x", 2]}, "maxItems": 3}},
      "required": ["n", "b", "s", "l"], "additionalProperties": false})");
  int whole = 0;
  for (unsigned seed = 0; seed < 100; ++seed) {
    const std::string text = random_text(f, seed);
    if (text.empty()) continue;  // the walk was too long
    ++whole;
    const nlohmann::ordered_json value = nlohmann::ordered_json::parse(text);
    EXPECT_EQ(value.size(), 4u) << text;
    EXPECT_TRUE(value["n"].is_number_integer() && value["n"] >= -3 && value["n"] <= 12) << text;
    EXPECT_TRUE(value["b"].is_boolean() || value["b"].is_null()) << text;
    EXPECT_TRUE(value["s"].is_string() && !value["s"].get<std::string>().empty()) << text;
    EXPECT_TRUE(value["l"].is_array() && value["l"].size() <= 3) << text;
    EXPECT_EQ(value.begin().key(), "n") << text;  // in the order of the schema
  }
  EXPECT_GT(whole, 60);
}

TEST(Grammar, NoStringHasBareControlCharacters) {
  // JSON must escape them, however its strings are bounded.
  for (const char* schema :
       {R"({"type": "string"})", R"({"type": "string", "minLength": 1, "maxLength": 4})",
        R"({"type": "string", "pattern": "^.*$"})", R"({"type": "string", "pattern": "^[^a]*$"})"}) {
    Text text(format(Kind::kJsonSchema, schema));
    EXPECT_TRUE(text.add("\"")) << schema;
    for (std::int32_t byte = 0; byte < 0x20; ++byte) EXPECT_FALSE(text.allows(byte)) << schema << " " << byte;
    EXPECT_TRUE(text.add("x")) << schema;
  }
}

TEST(Mask, HasTokensOfSeveralBytes) {
  Text text(format(Kind::kJsonSchema, R"({"type": "boolean"})"));
  std::vector<std::string> next;
  const std::vector<std::string> bytes = tiny_vocabulary().bytes;
  for (const std::int32_t token : text.allowed()) next.push_back(bytes[static_cast<std::size_t>(token)]);
  EXPECT_THAT(next, ElementsAre("f", "t", "true", "fal"));
  EXPECT_TRUE(text.add_token(kFirstWord + 1));
  EXPECT_EQ(text.allowed(), (std::vector<std::int32_t>{'s', kFirstWord + 2}));
}

TEST(Mask, HasNeitherSpecialTokensNorThosePastTheTokenizer) {
  Text text(format(Kind::kRegex, "[^\\n]*"));
  const std::vector<std::int32_t> allowed = text.allowed();
  for (const std::int32_t token : {kSpecial, kSpecial + 1, kPadding, std::int32_t{'\n'}}) {
    EXPECT_EQ(std::ranges::count(allowed, token), 0) << token;
    EXPECT_FALSE(text.accept(token)) << token;
  }
  EXPECT_TRUE(text.may_end());
}

TEST(Mask, BytesOfACharacterComeOneByOne) {
  Text text(format(Kind::kRegex, "[\xe5\xa4\xa9\xe5\x9c\xb0]!"));  // two characters that begin alike
  EXPECT_EQ(text.allowed(), (std::vector<std::int32_t>{0xe5, kFirstWord + 10}));
  EXPECT_TRUE(text.add("\xe5"));
  EXPECT_EQ(text.allowed(), (std::vector<std::int32_t>{0x9c, 0xa4}));
  EXPECT_FALSE(text.may_end());
  EXPECT_TRUE(text.add("\xa4\xa9!"));
  EXPECT_TRUE(text.may_end());
}

TEST(Mask, TheEndComesOnlyWhereTheTextMayEnd) {
  Text text(format(Kind::kRegex, "ab?"));
  EXPECT_FALSE(text.may_end());
  EXPECT_FALSE(text.accept(kEnd));
  EXPECT_TRUE(text.add("a"));
  EXPECT_EQ(text.allowed(), (std::vector<std::int32_t>{'b', kEnd}));
  EXPECT_FALSE(text.ended());
  EXPECT_TRUE(text.add_token(kEnd));
  EXPECT_TRUE(text.ended());
}

TEST(Mask, AStopTokenOfTheRequestEndsTooAndIsNoText) {
  Text text(format(Kind::kRegex, "ab"), {kEnd, 'a'});
  EXPECT_EQ(text.allowed(), std::vector<std::int32_t>{});  // its text would be needed, but it would end
  Text other(format(Kind::kRegex, "ab"), {kEnd, 'x'});
  EXPECT_TRUE(other.add("ab"));
  EXPECT_EQ(other.allowed(), (std::vector<std::int32_t>{'x', kEnd}));
}

TEST(Mask, WithoutEndTokensATextEndsAsSoonAsItMay) {
  Text text(format(Kind::kRegex, "ab?"), {});
  EXPECT_FALSE(text.ended());
  EXPECT_TRUE(text.add("a"));
  EXPECT_TRUE(text.ended());
}

TEST(Errors, SayWhatAndWhere) {
  EXPECT_THAT(refusal(format(Kind::kRegex, "(")), HasSubstr("invalid: regex: "));
  EXPECT_THAT(refusal(format(Kind::kRegex, "(?=a)b")), HasSubstr("ookahead"));
  EXPECT_THAT(refusal(format(Kind::kRegex, "(a)\\1")), HasSubstr("regex"));
  EXPECT_THAT(refusal(format(Kind::kGrammar, "root ::= \"a\"\nother ::= [")), HasSubstr("line 2"));
  EXPECT_THAT(refusal(format(Kind::kGrammar, "root ::= undefined")), HasSubstr("undefined"));
  EXPECT_THAT(refusal(format(Kind::kGrammar, "start ::= \"a\"")), HasSubstr("root"));
  EXPECT_THAT(refusal(format(Kind::kJsonSchema, R"({"properties": {"a": {"not": {}}}})")),
              HasSubstr("json_schema.properties.a.not"));
  EXPECT_THAT(refusal({Kind::kChoice, "", {"a\x01"}}),
              HasSubstr("choice is not supported: control characters"));
  EXPECT_THAT(refusal({}), HasSubstr("invalid"));
}

TEST(Compiler, KeepsWhatWasAskedForAndTellsFormatsApart) {
  const TextFormat f = format(Kind::kRegex, "kept[0-9]");
  EXPECT_EQ(compiler().compile(f), compiler().compile(f));
  EXPECT_NE(compiler().compile(f), compiler().compile(format(Kind::kGrammar, "root ::= \"kept\" [0-9]")));
  TextFormat gated = f;
  gated.begins_behind = "</think>";
  TextFormat opened = gated;
  opened.opened_by = "<think>";
  EXPECT_NE(compiler().compile(gated), compiler().compile(f));
  EXPECT_NE(compiler().compile(gated), compiler().compile(opened));
  const TextFormat ab_c{Kind::kChoice, "", {"ab", "c"}}, a_bc{Kind::kChoice, "", {"a", "bc"}};
  EXPECT_NE(compiler().compile(ab_c), compiler().compile(a_bc));
}

TEST(Compiler, IsUsedFromThreadsAtOnce) {
  std::vector<std::jthread> threads;
  std::atomic<int> good = 0;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&good, i] {
      for (int j = 0; j < 20; ++j) {
        const std::string n = std::to_string((i + j) % 7);
        good += is_text(format(Kind::kRegex, "x{" + n + "}y"),
                        std::string(static_cast<std::size_t>((i + j) % 7), 'x') + "y");
      }
    });
  }
  threads.clear();
  EXPECT_EQ(good, 80);
}

}  // namespace
}  // namespace flash_mla::grammar
