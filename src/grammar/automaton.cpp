#include "grammar/automaton.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "grammar/mask_store.h"
#include "grammar/subset_construction.h"

namespace flash_mla::grammar {
namespace {

constexpr std::size_t kMaxStates = 1 << 16;
constexpr std::size_t kMaxTable = 1 << 21;   // states times classes of bytes
constexpr std::int64_t kMaxEdges = 5000000;  // looked at: some tenths of a second

using Mask = MaskStore::Mask;

// The tokens' side of a matcher, whatever the automaton.
class AutomatonMatcher : public Matcher {
 public:
  AutomatonMatcher(const TokenOrder& order, std::vector<std::int32_t> ends)
      : order_(order), ends_(std::move(ends)) {}

  void allowed(std::span<std::uint32_t> mask) final {
    if (ended()) {
      std::ranges::fill(mask, 0U);
      return;
    }
    fill(mask);
    for (const std::int32_t end : ends_) {
      const auto word = static_cast<std::size_t>(end) / 32;
      if (word >= mask.size()) continue;
      const std::uint32_t bit = 1U << (static_cast<unsigned>(end) % 32);
      // An end token may have a text of its own, which the automaton would take.
      mask[word] = complete() ? mask[word] | bit : mask[word] & ~bit;
    }
  }

  bool accept(std::int32_t token) final {
    if (ended()) return false;
    if (std::ranges::find(ends_, token) != ends_.end()) {
      took_end_ = complete();
      return took_end_;
    }
    const std::string_view bytes = order_.bytes(token);
    return !bytes.empty() && go(bytes);
  }

  bool accept_text(std::string_view bytes) final { return ended() ? bytes.empty() : go(bytes); }
  bool ended() const final { return ends_.empty() ? complete() : took_end_; }

 private:
  virtual void fill(std::span<std::uint32_t> mask) = 0;
  // Stays where it is if that leads nowhere.
  virtual bool go(std::string_view bytes) = 0;
  virtual bool complete() const = 0;

  const TokenOrder& order_;
  std::vector<std::int32_t> ends_;
  bool took_end_ = false;
};

class DeterministicGrammar : public Grammar, public std::enable_shared_from_this<DeterministicGrammar> {
 public:
  DeterministicGrammar(ByteAutomaton automaton, std::shared_ptr<const TokenOrder> order)
      : automaton_(std::move(automaton)), order_(std::move(order)) {}

  std::unique_ptr<Matcher> matcher(std::vector<std::int32_t> ends) const override;
  std::size_t num_bytes() const override {
    return automaton_.next.size() * sizeof(std::int32_t) + automaton_.accepts.size() + masks_.num_bytes();
  }

  const ByteAutomaton& automaton() const { return automaton_; }
  const TokenOrder& order() const { return *order_; }

  /// Computed where a text first comes to `state`. Of `words` words.
  std::shared_ptr<const Mask> mask(std::int32_t state, std::size_t words) const {
    if (auto found = masks_.find(state, words)) return found;
    auto made = std::make_shared<Mask>(words);
    order_->allowed(
        state, [&](std::int32_t s, char byte) { return automaton_.step(s, byte); }, *made);
    return masks_.keep(state, std::move(made));
  }

 private:
  ByteAutomaton automaton_;
  std::shared_ptr<const TokenOrder> order_;
  mutable MaskStore masks_;
};

class DeterministicMatcher : public AutomatonMatcher {
 public:
  DeterministicMatcher(std::shared_ptr<const DeterministicGrammar> grammar, std::vector<std::int32_t> ends)
      : AutomatonMatcher(grammar->order(), std::move(ends)), grammar_(std::move(grammar)) {}

 private:
  void fill(std::span<std::uint32_t> mask) override {
    std::ranges::copy(*grammar_->mask(state_, mask.size()), mask.begin());
  }
  bool go(std::string_view bytes) override {
    const std::int32_t next = grammar_->automaton().walk(state_, bytes);
    if (next == ByteAutomaton::kDead) return false;
    state_ = next;
    return true;
  }
  bool complete() const override {
    return grammar_->automaton().accepts[static_cast<std::size_t>(state_)] != 0;
  }

  std::shared_ptr<const DeterministicGrammar> grammar_;
  std::int32_t state_ = 0;
};

std::unique_ptr<Matcher> DeterministicGrammar::matcher(std::vector<std::int32_t> ends) const {
  return std::make_unique<DeterministicMatcher>(shared_from_this(), std::move(ends));
}

// What would have too many states as a deterministic automaton. A token leads on from a set of states where it does from one
// of them: so a set's mask is the union of its states', which few are, and texts come to them again.
class NfaGrammar : public Grammar, public std::enable_shared_from_this<NfaGrammar> {
 public:
  NfaGrammar(Nfa nfa, std::shared_ptr<const TokenOrder> order)
      : nfa_(std::move(nfa)), order_(std::move(order)) {}

  std::unique_ptr<Matcher> matcher(std::vector<std::int32_t> ends) const override;
  std::size_t num_bytes() const override {
    std::size_t bytes = masks_.num_bytes();
    for (const auto& of_state : nfa_.edges) bytes += sizeof(of_state) + of_state.size() * sizeof(Nfa::Edge);
    return bytes;
  }

  const Nfa& nfa() const { return nfa_; }
  const TokenOrder& order() const { return *order_; }

  void allowed(const std::vector<int>& set, std::span<std::uint32_t> mask) const {
    std::vector<std::shared_ptr<const Mask>> masks;
    std::vector<int> unknown;
    for (const int state : set) {
      if (!goes_on(state)) continue;
      if (auto found = masks_.find(state, mask.size())) {
        masks.push_back(std::move(found));
      } else {
        unknown.push_back(state);
      }
    }
    if (!unknown.empty()) {
      SubsetConstruction states(nfa_);
      if (unknown.size() > kMaxUnknown) {
        walk(states, set, mask);
        return;
      }
      for (const int state : unknown) {
        auto made = std::make_shared<Mask>(mask.size());
        walk(states, {state}, *made);
        masks.push_back(masks_.keep(state, std::move(made)));
      }
    }
    std::ranges::sort(masks);
    const auto same = std::ranges::unique(masks);
    masks.erase(same.begin(), same.end());
    std::ranges::fill(mask, 0U);
    for (const auto& one : masks) std::ranges::transform(mask, *one, mask.begin(), std::bit_or());
  }

 private:
  // Above it the states' masks cost more than the set's own.
  static constexpr std::size_t kMaxUnknown = 16;

  bool goes_on(int state) const {
    return std::ranges::any_of(nfa_.edges[static_cast<std::size_t>(state)],
                               [](const Nfa::Edge& edge) { return edge.first >= 0; });
  }

  void walk(SubsetConstruction& states, std::vector<int> set, std::span<std::uint32_t> mask) const {
    const auto& classes = states.byte_class();
    order_->allowed(
        states.add(std::move(set)),
        [&](std::int32_t state, char byte) {
          if (states.num_edges() > kMaxEdges) throw TooSlow();
          return states.row(state)[classes[static_cast<unsigned char>(byte)]];
        },
        mask);
  }

  Nfa nfa_;
  std::shared_ptr<const TokenOrder> order_;
  mutable MaskStore masks_;
};

class NfaMatcher : public AutomatonMatcher {
 public:
  NfaMatcher(std::shared_ptr<const NfaGrammar> grammar, std::vector<std::int32_t> ends)
      : AutomatonMatcher(grammar->order(), std::move(ends)),
        grammar_(std::move(grammar)),
        sets_(grammar_->nfa()),
        set_{grammar_->nfa().start} {
    sets_.close(set_);
  }

 private:
  void fill(std::span<std::uint32_t> mask) override { grammar_->allowed(set_, mask); }
  bool go(std::string_view bytes) override {
    std::vector<int> set = set_;
    for (const char byte : bytes) {
      set = sets_.step(set, static_cast<unsigned char>(byte));
      if (set.empty()) return false;
    }
    set_ = std::move(set);
    return true;
  }
  bool complete() const override { return std::ranges::binary_search(set_, grammar_->nfa().end); }

  std::shared_ptr<const NfaGrammar> grammar_;
  StateSets sets_;
  std::vector<int> set_;
};

std::unique_ptr<Matcher> NfaGrammar::matcher(std::vector<std::int32_t> ends) const {
  return std::make_unique<NfaMatcher>(shared_from_this(), std::move(ends));
}

}  // namespace

std::optional<ByteAutomaton> determinize(const Nfa& nfa) {
  SubsetConstruction states(nfa);
  ByteAutomaton out;
  out.byte_class = states.byte_class();
  out.num_classes = static_cast<int>(states.num_classes());
  states.add({nfa.start});
  for (std::int32_t state = 0; static_cast<std::size_t>(state) < states.num_states(); ++state) {
    const std::int32_t* row = states.row(state);
    out.next.insert(out.next.end(), row, row + states.num_classes());
    out.accepts.push_back(static_cast<char>(states.accepts(state)));
    if (states.num_states() > kMaxStates || out.next.size() > kMaxTable || states.num_edges() > kMaxEdges)
      return std::nullopt;
  }
  return out;
}

std::shared_ptr<const Grammar> make_automaton_grammar(ByteAutomaton automaton,
                                                      std::shared_ptr<const TokenOrder> order) {
  return std::make_shared<DeterministicGrammar>(std::move(automaton), std::move(order));
}

std::shared_ptr<const Grammar> make_automaton_grammar(Nfa automaton,
                                                      std::shared_ptr<const TokenOrder> order) {
  return std::make_shared<NfaGrammar>(std::move(automaton), std::move(order));
}

}  // namespace flash_mla::grammar
