#pragma once

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <vector>

namespace flash_mla::grammar {

/// A nondeterministic automaton over bytes: several edges for a byte, and edges without one.
struct Nfa {
  static constexpr std::size_t kMaxStates = 1 << 18;

  struct TooLarge : std::exception {};
  struct Edge {
    int first, last;  ///< bytes, or -1 both
    int target;
  };

  std::vector<std::vector<Edge>> edges{2};  ///< (states)
  int start = 0, end = 1;

  /// Throws TooLarge.
  int add_state() {
    if (edges.size() > kMaxStates) throw TooLarge();
    edges.emplace_back();
    return static_cast<int>(edges.size()) - 1;
  }
  void add_edge(int from, Edge edge) { edges[static_cast<std::size_t>(from)].push_back(edge); }
  void join(int from, int to) { add_edge(from, {-1, -1, to}); }
  /// Drops edges to states from which no text can be completed. False if none can at all.
  bool trim();
};

/// Sets of states of an automaton, sorted, each with what is reached from its states without a byte.
class StateSets {
 public:
  /// `nfa` must outlive it.
  explicit StateSets(const Nfa& nfa) : nfa_(nfa), seen_(nfa.edges.size()) {}

  void close(std::vector<int>& set);
  /// Empty where no text goes on with `byte`, if the automaton is trimmed.
  std::vector<int> step(const std::vector<int>& set, unsigned char byte);
  /// Looked at so far.
  std::int64_t num_edges() const { return num_edges_; }

 private:
  const Nfa& nfa_;
  std::vector<int> seen_;  // by state: the last turn in which it was
  int turn_ = 0;
  std::int64_t num_edges_ = 0;
};

/// What may stand before or in place of a text of a regular expression.
struct RegexSurroundings {
  int line_breaks = 0;     ///< up to so many before it
  std::string opening;     ///< not empty: or this alone
  int opening_blanks = 0;  ///< spaces or line breaks before `opening`, at most
};

/// Of a regular expression as XGrammar reads it, trimmed. None where it does not, where no text matches, or where the
/// automaton would be too large.
std::optional<Nfa> regex_nfa(const std::string& regex, const RegexSurroundings& around);

}  // namespace flash_mla::grammar
