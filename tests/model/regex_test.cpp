#include "text/regex.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "flash_mla/error.h"
#include "temporary_directory.h"

namespace flash_mla::text {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<std::string_view> split(const std::string& pattern, std::string_view text) {
  std::vector<std::string_view> out;
  Regex(pattern, "pattern").split(text, out);
  return out;
}

TEST(Regex, PiecesCoverTheText) {
  EXPECT_THAT(split("\\p{N}{1,3}", "ab12345c"), ElementsAre("ab", "123", "45", "c"));
  EXPECT_THAT(split("x", "abc"), ElementsAre("abc"));
  EXPECT_THAT(split("[一-龥]+", "a敏捷b"), ElementsAre("a", "敏捷", "b"));
  EXPECT_TRUE(split("x", "").empty());
}

TEST(Regex, LookaheadSeesThePieceOnly) {
  EXPECT_THAT(split("\\s+(?!\\S)|\\s+", "a   b  "), ElementsAre("a", "  ", " ", "b", "  "));
}

TEST(Regex, DollarIsTheEndOfALine) {
  EXPECT_THAT(split("\\s+$", "a  \n  \n b "), ElementsAre("a", "  \n  ", "\n b", " "));
  EXPECT_THAT(split("a$", "a\nba"), ElementsAre("a", "\nb", "a"));
}

// Where the two dialects' notions of space part.
TEST(Regex, Spaces) {
  EXPECT_THAT(split("\\s", "\u180e"), ElementsAre("\u180e"));
  EXPECT_THAT(split("\\s", "x\u180ey"), ElementsAre("x\u180ey"));
  EXPECT_THAT(split("\\s", "x\u0085y"), ElementsAre("x", "\u0085", "y"));
  EXPECT_THAT(split("[^\\s]+", "x\u3000y"), ElementsAre("x", "\u3000", "y"));
}

TEST(Regex, UnicodeOfTheLibraryDoesNotMatter) {
  EXPECT_THAT(split("\\p{S}", "a\U0001fae8b"), ElementsAre("a", "\U0001fae8", "b"));
  EXPECT_THAT(split("\\P{L}+", "a\U00031350b1"), ElementsAre("a\U00031350b", "1"));
}

TEST(Regex, RefusesWhatTheDialectsReadDifferently) {
  for (const std::string pattern :
       {"\\w+",        "\\d",     "\\bx", "\\h",   "\\K",      "(?m)a", "(?<name>a)", "(?>a)", "(*FAIL)",
        "[[:alpha:]]", "[a&&b]",  "[]a]", "a{,3}", "a{x",      "a{2}+", "a{2}{3}",    "a+*",   "\\p{Han}",
        "\\p{Lu}",     "\\p{^L}", "\\pL", "[\\S]", "[\\P{L}]", "\\x41", "\\uD8",      "\\1",   "[abc"}) {
    EXPECT_THAT(message_of<Unsupported>([&] { Regex(pattern, "file: field"); }),
                AllOf(HasSubstr("file: field = \"" + pattern + "\""), HasSubstr("Oniguruma")))
        << pattern;
  }
}

TEST(Regex, RefusesEmptyMatches) {
  for (const std::string pattern : {"a*", "", "a|", "(?=a)"}) {
    EXPECT_THAT(message_of<Unsupported>([&] { Regex(pattern, "f"); }), HasSubstr("empty string")) << pattern;
  }
}

TEST(Regex, Malformed) {
  for (const std::string pattern : {"(a", "a)", "[b-a]", "+a"}) {
    EXPECT_THAT(message_of<InvalidArgument>([&] { Regex(pattern, "f"); }),
                HasSubstr("expected a regular expression"))
        << pattern;
  }
}

TEST(Regex, GivesUpWithAMessage) {
  const std::string text(40, 'a');
  EXPECT_THAT(message_of<InvalidArgument>([&] { split("(a|aa)+(?!a)\\p{N}", text); }),
              AllOf(HasSubstr("text: at byte 0 of 40"), HasSubstr("limit")));
}

}  // namespace
}  // namespace flash_mla::text
