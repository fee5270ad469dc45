// Regular expressions as automata of our own, beside XGrammar's rules for the same texts.

#include <gmock/gmock.h>

#include <optional>
#include <random>

#include "grammar/automaton.h"
#include "tiny_vocabulary.h"

namespace flash_mla::grammar {
namespace {

TextFormat format(TextFormat::Kind kind, std::string source) { return {kind, std::move(source), {}}; }

std::optional<ByteAutomaton> regex_automaton(const std::string& regex, const RegexSurroundings& around) {
  const std::optional<Nfa> nfa = regex_nfa(regex, around);
  return nfa ? determinize(*nfa) : std::nullopt;
}

std::shared_ptr<const TokenOrder> tiny_order() {
  return std::make_shared<const TokenOrder>(
      std::make_shared<const std::vector<std::string>>(tiny_vocabulary().bytes));
}

std::vector<std::uint32_t> mask_of(Matcher& matcher) {
  std::vector<std::uint32_t> mask(static_cast<std::size_t>(kSize + 31) / 32, 0xdeadbeef);
  matcher.allowed(mask);
  return mask;
}

std::vector<std::int32_t> tokens_of(const std::vector<std::uint32_t>& mask) {
  std::vector<std::int32_t> out;
  for (std::int32_t token = 0; token < kSize; ++token) {
    if ((mask[static_cast<std::size_t>(token) / 32] >> (token % 32) & 1) != 0) out.push_back(token);
  }
  return out;
}

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

// The same texts from sets of the states that guess, in walks that both take.
void expect_same_masks(const std::string& regex, int steps) {
  const std::optional<Nfa> nfa = regex_nfa(regex, {});
  ASSERT_TRUE(nfa.has_value()) << regex;
  const auto automaton = determinize(*nfa);
  ASSERT_TRUE(automaton.has_value()) << regex;
  const auto one = make_automaton_grammar(*automaton, tiny_order()),
             other = make_automaton_grammar(*nfa, tiny_order());
  for (unsigned seed = 0; seed < 4; ++seed) {
    std::mt19937 random(seed);
    const auto first = one->matcher({kEnd}), second = other->matcher({kEnd});
    for (int step = 0; step < steps && !first->ended(); ++step) {
      const std::vector<std::uint32_t> mask = mask_of(*first);
      ASSERT_EQ(mask, mask_of(*second)) << regex << ", seed " << seed << ", step " << step;
      const std::vector<std::int32_t> tokens = tokens_of(mask);
      ASSERT_FALSE(tokens.empty());
      const std::int32_t token = tokens[random() % tokens.size()];
      ASSERT_TRUE(first->accept(token) && second->accept(token));
      const auto refused = static_cast<std::int32_t>(random() % static_cast<unsigned>(kSize));
      if (!std::ranges::count(tokens_of(mask_of(*first)), refused)) {
        ASSERT_FALSE(first->accept(refused));
        ASSERT_FALSE(second->accept(refused));
      }
    }
    EXPECT_EQ(first->ended(), second->ended());
  }
  EXPECT_GT(other->num_bytes(), 0u);
}

TEST(RegexAutomaton, AllowsTheSameWhetherDeterministicOrNot) {
  for (const char* regex : {"[a-c]*a[a-c]{5}", ".*a.{6}", "(.*[ab].{2}){2}x?", "(a?){40}b",
                            "([a-c]{1,3} ){200}", "(true|fal?se)+", "a*(ab|abc)*c?", ".{0,20}"}) {
    expect_same_masks(regex, 80);
  }
}

TEST(RegexAutomaton, IsLeftNondeterministicWhereItWouldBeTooLarge) {
  const std::optional<Nfa> nfa = regex_nfa("[a-c]*a[a-c]{200}", {});  // a state for each way to go back
  ASSERT_TRUE(nfa.has_value());
  EXPECT_FALSE(determinize(*nfa).has_value());
  const std::vector<std::int32_t> any = {'a', 'b', 'c', kFirstWord + 9};  // "abc"
  const auto matcher = make_automaton_grammar(*nfa, tiny_order())->matcher({kEnd});
  std::mt19937 random(1);
  std::string text;
  int ends = 0;
  for (int step = 0; step < 600; ++step) {
    const bool may_end = text.size() > 200 && text[text.size() - 201] == 'a';
    ends += may_end;
    std::vector<std::int32_t> expected = any;
    if (may_end) expected.push_back(kEnd);
    ASSERT_EQ(tokens_of(mask_of(*matcher)), expected) << step;
    const std::int32_t token = any[random() % any.size()];
    ASSERT_TRUE(matcher->accept(token));
    text += token < kFirstWord ? std::string(1, static_cast<char>(token)) : "abc";
  }
  EXPECT_GT(ends, 50);
  EXPECT_FALSE(regex_nfa("(", {}).has_value());
  const TextFormat large = format(TextFormat::Kind::kRegex, ".*a[bc]{200}");
  EXPECT_TRUE(is_text(large, "xa" + std::string(200, 'b')));
  EXPECT_FALSE(is_text(large, "xa" + std::string(199, 'b')));
}

// Twenty thousand states at once, and each byte apart from others.
TEST(RegexAutomaton, SaysWhereAMaskWouldTakeTooLong) {
  Nfa nfa;
  for (int byte = 0; byte < 256; byte += 2) nfa.add_edge(nfa.start, {byte, byte, nfa.end});
  for (int i = 0; i < 20000; ++i) {
    const int state = nfa.add_state();
    nfa.join(nfa.start, state);
    nfa.add_edge(state, {0, 255, state});
    nfa.join(state, nfa.end);
  }
  ASSERT_TRUE(nfa.trim());
  EXPECT_FALSE(determinize(nfa).has_value());
  const auto matcher = make_automaton_grammar(nfa, tiny_order())->matcher({kEnd});
  EXPECT_THROW(mask_of(*matcher), TooSlow);
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
  const auto step = [&](std::int32_t state, char byte) { return automaton->step(state, byte); };
  order.allowed(0, step, mask);
  EXPECT_EQ(mask[0], 0b0001101U);
  order.allowed(automaton->walk(0, "a"), step, mask);
  EXPECT_EQ(mask[0], 0b0010100U);
  EXPECT_EQ(order.bytes(5), "ac");
  EXPECT_EQ(order.bytes(7), "");
}

}  // namespace
}  // namespace flash_mla::grammar
