// A format that begins behind a reasoning.

#include <gmock/gmock.h>

#include <algorithm>

#include "tiny_vocabulary.h"

namespace flash_mla::grammar {
namespace {

TextFormat behind_reasoning(bool opened) {
  TextFormat out{TextFormat::Kind::kRegex, "[a-c]+!", {}};
  out.begins_behind = "</think>";
  if (!opened) out.opened_by = "<think>";
  return out;
}

std::int32_t token(std::string_view word) {
  const auto found = std::ranges::find(kWords, word);
  EXPECT_NE(found, kWords.end()) << word;
  return kFirstWord + static_cast<std::int32_t>(found - kWords.begin());
}

TEST(Gate, LeavesTheReasoningFree) {
  Text text(behind_reasoning(true));
  // Whatever there is but the end, special tokens and those past the tokenizer's too.
  EXPECT_FALSE(text.may_end());
  EXPECT_EQ(text.allowed().size(), static_cast<std::size_t>(kSize) - 1);
  EXPECT_TRUE(text.add("I think {\"x\": 1} </thin"));
  EXPECT_TRUE(text.add_token(kSpecial));
  EXPECT_TRUE(text.add_token(kPadding));
  EXPECT_FALSE(text.accept(kEnd));
  EXPECT_TRUE(text.add(" <b> not </think"));
  EXPECT_FALSE(text.ended());
}

TEST(Gate, TheFormatBeginsBehindIt) {
  for (const char* close : {"</think>", "</think>\n", "so\n</think>\n\n", "<think></think>\n\n\n\n"}) {
    Text text(behind_reasoning(true));
    EXPECT_TRUE(text.add(close)) << close;
    EXPECT_FALSE(text.allows("x")) << close;
    EXPECT_FALSE(text.may_end()) << close;
    EXPECT_TRUE(text.add("abc!")) << close;
    EXPECT_EQ(text.allowed(), std::vector{kEnd}) << close;
    EXPECT_TRUE(text.add_token(kEnd)) << close;
    EXPECT_TRUE(text.ended()) << close;
  }
  Text text(behind_reasoning(true));
  EXPECT_TRUE(text.add("</think>\n\n\n\n"));
  EXPECT_FALSE(text.allows("\n"));
}

TEST(Gate, TheTagIsOneTokenOrPartsOfSeveral) {
  Text one(behind_reasoning(true));
  EXPECT_TRUE(one.add_token(token("</think>")));
  EXPECT_FALSE(one.allows("x"));
  Text parts(behind_reasoning(true));
  EXPECT_TRUE(parts.add_token(token("</th")));
  EXPECT_TRUE(parts.add_token(token("ink>\n\n")));
  EXPECT_TRUE(parts.add_token(token("abc")));
  EXPECT_TRUE(parts.add("!"));
  EXPECT_TRUE(parts.may_end());
}

TEST(Gate, NoTokenLeapsOverIt) {
  Text text(behind_reasoning(true));
  EXPECT_TRUE(text.allows(token("ink>\n\nno")));  // no tag before it
  EXPECT_TRUE(text.add_token(token("</th")));
  EXPECT_FALSE(text.allows(token("ink>\n\nno")));
  EXPECT_TRUE(text.allows(token("ink>\n\n")));
  EXPECT_TRUE(text.add("ink"));
  EXPECT_FALSE(text.allows(token(">{")));
}

TEST(Gate, ATextMayOpenTheReasoningOrNot) {
  for (const char* opening : {"<think>", "\n<think>", " \n<think>"}) {
    Text text(behind_reasoning(false));
    EXPECT_TRUE(text.add(opening)) << opening;
    EXPECT_FALSE(text.may_end()) << opening;
    EXPECT_TRUE(text.add("what? </think>\nab!")) << opening;
    EXPECT_TRUE(text.may_end()) << opening;
  }
  Text text(behind_reasoning(false));
  EXPECT_TRUE(text.allows(token("<think>")));
  EXPECT_FALSE(text.allows("x"));
  EXPECT_FALSE(text.may_end());
  EXPECT_TRUE(text.add("cab!"));
  EXPECT_EQ(text.allowed(), std::vector{kEnd});
  Text other(behind_reasoning(false));
  EXPECT_FALSE(other.add("<b"));
}

TEST(Gate, WorksForCalls) {
  TextFormat format;
  format.calls.functions = {{"<call>f:", ""}};
  format.calls.end = "</call>";
  format.begins_behind = "</think>";
  EXPECT_TRUE(is_text(format, "Let me <call> see</think>\n\n<call>f:{}</call>"));
  EXPECT_FALSE(is_text(format, "<call>f:{}</call>"));
}

TEST(Gate, RandomTextsAreOfTheFormat) {
  int whole = 0;
  for (unsigned seed = 0; seed < 200; ++seed) {
    const std::string text =
        random_text(behind_reasoning(seed % 2 == 0), seed, /*at_least=*/3, /*at_most=*/4000);
    if (text.empty()) continue;
    ++whole;
    const std::size_t close = text.find("</think>");
    std::string rest = close == text.npos ? text : text.substr(close + 8);
    EXPECT_TRUE(close != text.npos || seed % 2 == 1);
    rest.erase(0, rest.find_first_not_of('\n'));
    EXPECT_THAT(rest, testing::MatchesRegex("[abc]+!")) << text;
  }
  EXPECT_GT(whole, 50);
}

}  // namespace
}  // namespace flash_mla::grammar
