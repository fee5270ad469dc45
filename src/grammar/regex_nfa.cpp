#include <fmt/format.h>
#include <fsm.h>
#include <fsm_builder.h>
#include <grammar_builder.h>

#include <algorithm>
#include <exception>
#include <map>
#include <utility>

#include "grammar/nfa.h"

namespace flash_mla::grammar {
namespace {

using xgrammar::FSMEdge;
using xgrammar::FSMWithStartEnd;

/// XGrammar reads no regular expression in it, or what is none of our automata.
struct NotRead : std::exception {};

/// What XGrammar makes of regular expressions, with large repetitions, which it leaves to a counter, written out.
class NfaMaker {
 public:
  /// Texts of `regex` lead from one state to the other.
  void add(const std::string& regex, int from, int to) { add(fsm_of(regex), from, to); }
  void add_text(std::string_view text, int from, int to) {
    for (const char c : text) {
      const int next = nfa.add_state(), byte = static_cast<unsigned char>(c);
      nfa.add_edge(from, {byte, byte, next});
      from = next;
    }
    nfa.join(from, to);
  }

  Nfa nfa;

 private:
  FSMWithStartEnd fsm_of(const std::string& regex) {
    auto built = xgrammar::RegexFSMBuilder::Build(regex, &builder_);
    if (built.IsErr()) throw NotRead();
    return std::move(built).Unwrap();
  }

  // A rule that the builder has been given for what is repeated.
  const FSMWithStartEnd& rule(std::int32_t id) {
    const auto found = rules_.find(id);
    if (found != rules_.end()) return found->second;
    const auto body = builder_.GetGrammarExpr(builder_.GetRule(id).body_expr_id);
    if (body.type != xgrammar::Grammar::Impl::GrammarExprType::kRegex) throw NotRead();
    std::string regex;
    for (int i = 1; i < body.size(); ++i) regex.push_back(static_cast<char>(body[i]));  // behind a flag
    return rules_.emplace(id, fsm_of(regex)).first->second;
  }

  void add(const FSMWithStartEnd& fsm, int from, int to) {
    const auto& of_states = fsm.GetFsm().GetEdges();
    std::vector<int> own;
    for (std::size_t i = 0; i < of_states.size(); ++i) own.push_back(nfa.add_state());
    nfa.join(from, own[static_cast<std::size_t>(fsm.GetStart())]);
    for (std::size_t i = 0; i < own.size(); ++i) {
      if (fsm.IsEndState(static_cast<int>(i))) nfa.join(own[i], to);
      for (const FSMEdge& edge : of_states[i]) {
        const int target = own[static_cast<std::size_t>(edge.target)];
        if (edge.IsEpsilon()) {
          nfa.join(own[i], target);
        } else if (edge.IsCharRange() && edge.max < 256) {
          nfa.add_edge(own[i], {edge.min, edge.max, target});
        } else if (edge.IsRuleRef()) {
          add(rule(edge.GetRefRuleId()), own[i], target);
        } else if (edge.IsRepeatRef()) {
          const auto counted = fsm.GetFsm().GetRepeatEdgeInfo(edge.GetAuxIndex());
          repeat(rule(counted.RuleId()), counted.Lower(), counted.Upper(), own[i], target);
        } else {
          throw NotRead();
        }
      }
    }
  }

  void repeat(const FSMWithStartEnd& fsm, int least, int most, int from, int to) {
    if (most < least) throw NotRead();
    for (int i = 0; i < most; ++i) {
      if (i >= least) nfa.join(from, to);
      const int next = nfa.add_state();
      add(fsm, from, next);
      from = next;
    }
    nfa.join(from, to);
  }

  xgrammar::GrammarBuilder builder_;
  std::map<std::int32_t, FSMWithStartEnd> rules_;
};

}  // namespace

std::optional<Nfa> regex_nfa(const std::string& regex, const RegexSurroundings& around) try {
  NfaMaker maker;
  Nfa& nfa = maker.nfa;
  const int begin = nfa.add_state();
  if (around.line_breaks > 0) {
    maker.add(fmt::format("\\n{{0,{}}}", around.line_breaks), nfa.start, begin);
  } else {
    nfa.join(nfa.start, begin);
  }
  maker.add(regex, begin, nfa.end);
  if (!around.opening.empty()) {
    const int opening = nfa.add_state();
    maker.add(fmt::format("[ \\n]{{0,{}}}", around.opening_blanks), nfa.start, opening);
    maker.add_text(around.opening, opening, nfa.end);
  }
  if (!nfa.trim()) return std::nullopt;
  return std::move(nfa);
} catch (const std::bad_alloc&) {
  throw;
} catch (const std::exception&) {  // XGrammar's too, whose grammars will say what is wrong
  return std::nullopt;
}

}  // namespace flash_mla::grammar
