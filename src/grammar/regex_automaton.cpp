#include <fmt/format.h>
#include <fsm.h>
#include <fsm_builder.h>
#include <grammar_builder.h>

#include <algorithm>
#include <exception>
#include <map>
#include <utility>

#include "grammar/automaton.h"

namespace flash_mla::grammar {
namespace {

using xgrammar::FSMEdge;
using xgrammar::FSMWithStartEnd;

constexpr std::size_t kMaxStates = 1 << 16;
constexpr std::size_t kMaxTable = 1 << 21;   // states times classes of bytes
constexpr std::int64_t kMaxEdges = 5000000;  // looked at: some tenths of a second

/// The regular expression is none, or too large for this.
struct NoAutomaton : std::exception {};

/// An automaton over bytes that may guess: several edges for a byte, and edges without one.
struct Nfa {
  struct Edge {
    int first, last;  ///< bytes, or -1 both
    int target;
  };
  std::vector<std::vector<Edge>> edges{2};
  int start = 0, end = 1;

  int add_state() {
    if (edges.size() > 4 * kMaxStates) throw NoAutomaton();
    edges.emplace_back();
    return static_cast<int>(edges.size()) - 1;
  }
  void add_edge(int from, Edge edge) { edges[static_cast<std::size_t>(from)].push_back(edge); }
  void join(int from, int to) { add_edge(from, {-1, -1, to}); }
};

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
    if (built.IsErr()) throw NoAutomaton();
    return std::move(built).Unwrap();
  }

  // A rule that the builder has been given for what is repeated.
  const FSMWithStartEnd& rule(std::int32_t id) {
    const auto found = rules_.find(id);
    if (found != rules_.end()) return found->second;
    const auto body = builder_.GetGrammarExpr(builder_.GetRule(id).body_expr_id);
    if (body.type != xgrammar::Grammar::Impl::GrammarExprType::kRegex) throw NoAutomaton();
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
          throw NoAutomaton();
        }
      }
    }
  }

  void repeat(const FSMWithStartEnd& fsm, int least, int most, int from, int to) {
    if (most < least) throw NoAutomaton();
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

/// Makes the states of an automaton that decides as it reads out of sets of states of one that may guess.
class Determinizer {
 public:
  explicit Determinizer(const Nfa& nfa) : nfa_(nfa), edges_(nfa.edges), seen_(edges_.size()) {}

  ByteAutomaton run() {
    ByteAutomaton out;
    find_classes(out);
    add({nfa_.start}, out);
    std::vector<std::vector<int>> targets(static_cast<std::size_t>(out.num_classes));
    for (std::size_t state = 0; state < sets_.size(); ++state) {
      for (auto& of_class : targets) of_class.clear();
      for (const int from : sets_[state]->first) {
        for (const Nfa::Edge& edge : edges_[static_cast<std::size_t>(from)]) {
          if (edge.first < 0) continue;
          const int last = class_of(edge.last, out);
          for (int c = class_of(edge.first, out); c <= last; ++c) {
            targets[static_cast<std::size_t>(c)].push_back(edge.target);
            ++num_edges_;
          }
        }
      }
      for (auto& of_class : targets) {
        out.next.push_back(of_class.empty() ? ByteAutomaton::kDead : add(of_class, out));
      }
      if (sets_.size() > kMaxStates || out.next.size() > kMaxTable || num_edges_ > kMaxEdges)
        throw NoAutomaton();
    }
    return out;
  }

 private:
  static int class_of(int byte, const ByteAutomaton& out) {
    return out.byte_class[static_cast<std::size_t>(byte)];
  }

  // Runs of bytes between which no edge begins or ends.
  void find_classes(ByteAutomaton& out) const {
    std::array<bool, 257> begins{};
    for (const auto& of_state : edges_) {
      for (const Nfa::Edge& edge : of_state) {
        if (edge.first < 0) continue;
        begins[static_cast<std::size_t>(edge.first)] = begins[static_cast<std::size_t>(edge.last) + 1] = true;
      }
    }
    int now = 0;
    for (std::size_t byte = 0; byte < 256; ++byte) {
      if (byte > 0 && begins[byte]) ++now;
      out.byte_class[byte] = static_cast<std::uint8_t>(now);
    }
    out.num_classes = now + 1;
  }

  // The state that stands for these and what is reached from them without a byte.
  std::int32_t add(std::vector<int> set, ByteAutomaton& out) {
    ++turn_;
    std::size_t kept = 0;
    for (std::size_t i = 0; i < set.size(); ++i) {
      const int state = set[i];
      int& seen = seen_[static_cast<std::size_t>(state)];
      if (seen == turn_) continue;
      seen = turn_;
      set[kept++] = state;
      for (const Nfa::Edge& edge : edges_[static_cast<std::size_t>(state)]) {
        ++num_edges_;
        if (edge.first < 0 && seen_[static_cast<std::size_t>(edge.target)] != turn_)
          set.push_back(edge.target);
      }
    }
    set.resize(kept);
    std::ranges::sort(set);
    const auto [it, is_new] = states_.try_emplace(std::move(set), static_cast<std::int32_t>(sets_.size()));
    if (is_new) {
      sets_.push_back(&*it);
      out.accepts.push_back(std::ranges::binary_search(it->first, nfa_.end));
    }
    return it->second;
  }

  const Nfa& nfa_;
  const std::vector<std::vector<Nfa::Edge>>& edges_;
  std::vector<int> seen_;  // by state: the last turn in which it was
  int turn_ = 0;
  std::int64_t num_edges_ = 0;
  std::map<std::vector<int>, std::int32_t> states_;
  std::vector<const std::pair<const std::vector<int>, std::int32_t>*> sets_;  // by their number
};

// Makes states from which no text can be completed dead. False if none can at all.
bool trim(ByteAutomaton& automaton) {
  const std::size_t states = automaton.accepts.size();
  const auto classes = static_cast<std::size_t>(automaton.num_classes);
  std::vector<std::vector<std::int32_t>> before(states);
  for (std::size_t i = 0; i < automaton.next.size(); ++i) {
    const std::int32_t to = automaton.next[i];
    if (to == ByteAutomaton::kDead) continue;
    auto& from = before[static_cast<std::size_t>(to)];
    const auto state = static_cast<std::int32_t>(i / classes);
    if (from.empty() || from.back() != state) from.push_back(state);
  }
  std::vector<char> alive = automaton.accepts;
  std::vector<std::int32_t> queue;
  for (std::size_t state = 0; state < states; ++state) {
    if (alive[state] != 0) queue.push_back(static_cast<std::int32_t>(state));
  }
  while (!queue.empty()) {
    const auto state = static_cast<std::size_t>(queue.back());
    queue.pop_back();
    for (const std::int32_t from : before[state]) {
      if (std::exchange(alive[static_cast<std::size_t>(from)], 1) == 0) queue.push_back(from);
    }
  }
  for (std::int32_t& to : automaton.next) {
    if (to != ByteAutomaton::kDead && alive[static_cast<std::size_t>(to)] == 0) to = ByteAutomaton::kDead;
  }
  return alive[0] != 0;
}

}  // namespace

std::optional<ByteAutomaton> regex_automaton(const std::string& regex, const RegexSurroundings& around) try {
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
  ByteAutomaton out = Determinizer(nfa).run();
  if (!trim(out)) return std::nullopt;
  return out;
} catch (const std::bad_alloc&) {
  throw;
} catch (const std::exception&) {  // XGrammar's too, whose grammars will say what is wrong
  return std::nullopt;
}

}  // namespace flash_mla::grammar
