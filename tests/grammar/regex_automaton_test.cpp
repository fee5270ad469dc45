// Regular expressions as automata of our own, beside XGrammar's rules for the same texts.

#include <gmock/gmock.h>

#include <random>

#include "grammar/automaton.h"
#include "tiny_vocabulary.h"

namespace flash_mla::grammar {
namespace {

TextFormat format(TextFormat::Kind kind, std::string source) { return {kind, std::move(source), {}}; }

struct Pair {
  const char* regex;
  const char* grammar;
};

class RegexAutomaton : public testing::TestWithParam<Pair> {};

TEST_P(RegexAutomaton, AllowsWhatTheGrammarDoes) {
  ASSERT_TRUE(regex_automaton(GetParam().regex, {}).has_value());
  const TextFormat regex = format(TextFormat::Kind::kRegex, GetParam().regex);
  const TextFormat grammar = format(TextFormat::Kind::kGrammar, GetParam().grammar);
  for (unsigned seed = 0; seed < 3; ++seed) {
    std::mt19937 random(seed);
    Text ours(regex), theirs(grammar);
    for (int step = 0; step < 300; ++step) {
      const std::vector<std::int32_t> allowed = ours.allowed();
      ASSERT_EQ(allowed, theirs.allowed()) << "seed " << seed << ", step " << step;
      if (allowed.empty()) break;
      const std::int32_t token = allowed[random() % allowed.size()];
      ASSERT_TRUE(ours.add_token(token) && theirs.add_token(token));
      if (ours.ended()) break;
    }
    EXPECT_EQ(ours.ended(), theirs.ended());
  }
}

// Some with counts past 128, which XGrammar leaves to a counter.
INSTANTIATE_TEST_SUITE_P(Texts, RegexAutomaton,
                         testing::Values(Pair{"([a-c]{1,3} ){200}", R"(root ::= ([a-c]{1,3} " "){200})"},
                                         Pair{"[a-c]{2,150}x|ab", R"(root ::= [a-c]{2,150} "x" | "ab")"},
                                         Pair{"(abc|1){130,}!?", R"(root ::= ("abc" | "1"){130,} "!"?)"},
                                         Pair{"([ab]{0,2}c){140,150}",
                                              R"(root ::= ([ab]{0,2} "c"){140,150})"},
                                         Pair{"[^a-z\xc3\xa4]{0,3}\xe5\xa4\xa9*",
                                              "root ::= [^a-z\xc3\xa4]{0,3} \"\xe5\xa4\xa9\"*"},
                                         Pair{"(true|fal?se)+", R"(root ::= ("true" | "fa" "l"? "se")+)"}));

TEST(RegexAutomaton, IsNotMadeWhereItWouldBeTooLarge) {
  EXPECT_FALSE(regex_automaton(".*a.{200}", {}).has_value());  // a state for each way to go back
  EXPECT_FALSE(regex_automaton("(", {}).has_value());
  const TextFormat large = format(TextFormat::Kind::kRegex, ".*a[bc]{200}");
  EXPECT_TRUE(is_text(large, "xa" + std::string(200, 'b')));
  EXPECT_FALSE(is_text(large, "xa" + std::string(199, 'b')));
}

TEST(RegexAutomaton, CountsToTheLimit) {
  const TextFormat counted = format(TextFormat::Kind::kRegex, "([a-z]{1,3};){4000}");
  std::string text;
  for (int i = 0; i < 4000; ++i) text += i % 2 == 0 ? "a;" : "xyz;";
  EXPECT_TRUE(is_text(counted, text));
  EXPECT_FALSE(is_text(counted, text + "a;"));
  text.resize(text.size() - 4);
  EXPECT_FALSE(is_text(counted, text));
}

TEST(RegexAutomaton, KnowsWhatStandsAroundIt) {
  const auto automaton = regex_automaton("b|c", {2, "<t>", 1});
  ASSERT_TRUE(automaton.has_value());
  const auto is_whole = [&](std::string_view text) {
    const std::int32_t state = automaton->walk(0, text);
    return state != ByteAutomaton::kDead && automaton->accepts[static_cast<std::size_t>(state)] != 0;
  };
  for (const char* text : {"b", "c", "\nb", "\n\nc", "<t>", " <t>", "\n<t>"})
    EXPECT_TRUE(is_whole(text)) << text;
  for (const char* text : {"", "\n", "\n\n\nb", " b", "  <t>", "<t>b", "bc"})
    EXPECT_FALSE(is_whole(text)) << text;
  EXPECT_EQ(automaton->walk(0, "  "), ByteAutomaton::kDead);
}

TEST(TokenOrder, TakesTokensThatLeadOn) {
  const auto automaton = regex_automaton("ab+|b", {});
  ASSERT_TRUE(automaton.has_value());
  const TokenOrder order(std::make_shared<const std::vector<std::string>>(
      std::vector<std::string>{"abb", "", "b", "a", "bb", "ac", "abc"}));
  std::vector<std::uint32_t> mask{0xffffffff};
  order.allowed(*automaton, 0, mask);
  EXPECT_EQ(mask[0], 0b0001101U);
  order.allowed(*automaton, automaton->walk(0, "a"), mask);
  EXPECT_EQ(mask[0], 0b0010100U);
  EXPECT_EQ(order.bytes(5), "ac");
  EXPECT_EQ(order.bytes(7), "");
}

}  // namespace
}  // namespace flash_mla::grammar
