#include "grammar/automaton.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace flash_mla::grammar {
namespace {

using Mask = std::vector<std::uint32_t>;

struct MaskHash {
  std::size_t operator()(const std::shared_ptr<const Mask>& mask) const {
    std::size_t hash = 0;
    for (const std::uint32_t word : *mask) hash = (hash ^ word) * 0x9e3779b97f4a7c15U;
    return hash ^ (hash >> 32);
  }
};
struct SameMask {
  bool operator()(const std::shared_ptr<const Mask>& a, const std::shared_ptr<const Mask>& b) const {
    return *a == *b;
  }
};

class AutomatonGrammar : public Grammar, public std::enable_shared_from_this<AutomatonGrammar> {
 public:
  AutomatonGrammar(ByteAutomaton automaton, std::shared_ptr<const TokenOrder> order)
      : automaton_(std::move(automaton)), order_(std::move(order)) {}

  std::unique_ptr<Matcher> matcher(std::vector<std::int32_t> ends) const override;

  std::size_t num_bytes() const override {
    const std::lock_guard lock(mutex_);
    return automaton_.next.size() * sizeof(std::int32_t) + automaton_.accepts.size() + mask_bytes_;
  }

  const ByteAutomaton& automaton() const { return automaton_; }
  const TokenOrder& order() const { return *order_; }

  /// Computed where a text first comes to `state`. Of `words` words.
  std::shared_ptr<const Mask> mask(std::int32_t state, std::size_t words) const {
    {
      const std::lock_guard lock(mutex_);
      const auto found = by_state_.find(state);
      if (found != by_state_.end() && found->second->size() == words) return found->second;
    }
    auto made = std::make_shared<Mask>(words);
    order_->allowed(automaton_, state, *made);
    const std::lock_guard lock(mutex_);
    if (mask_bytes_ > kMaxMaskBytes) return made;
    // The places of a counted group differ in what follows much later, and no token is so long.
    const auto [same, is_new] = masks_.insert(std::move(made));
    mask_bytes_ += (is_new ? words * sizeof(std::uint32_t) : 0) + sizeof(*by_state_.begin());
    by_state_.insert_or_assign(state, *same);
    return *same;
  }

 private:
  static constexpr std::size_t kMaxMaskBytes = 4 << 20;

  ByteAutomaton automaton_;
  std::shared_ptr<const TokenOrder> order_;
  mutable std::mutex mutex_;  // of what follows
  mutable std::unordered_map<std::int32_t, std::shared_ptr<const Mask>> by_state_;
  mutable std::unordered_set<std::shared_ptr<const Mask>, MaskHash, SameMask> masks_;
  mutable std::size_t mask_bytes_ = 0;
};

class AutomatonMatcher : public Matcher {
 public:
  AutomatonMatcher(std::shared_ptr<const AutomatonGrammar> grammar, std::vector<std::int32_t> ends)
      : grammar_(std::move(grammar)), ends_(std::move(ends)) {}

  void allowed(std::span<std::uint32_t> mask) override {
    if (ended()) {
      std::ranges::fill(mask, 0U);
      return;
    }
    std::ranges::copy(*grammar_->mask(state_, mask.size()), mask.begin());
    for (const std::int32_t end : ends_) {
      const auto word = static_cast<std::size_t>(end) / 32;
      if (word >= mask.size()) continue;
      const std::uint32_t bit = 1U << (static_cast<unsigned>(end) % 32);
      // An end token may have a text of its own, which the automaton would take.
      mask[word] = complete() ? mask[word] | bit : mask[word] & ~bit;
    }
  }

  bool accept(std::int32_t token) override {
    if (ended()) return false;
    if (std::ranges::find(ends_, token) != ends_.end()) {
      took_end_ = complete();
      return took_end_;
    }
    const std::string_view bytes = grammar_->order().bytes(token);
    return !bytes.empty() && accept_text(bytes);
  }

  bool accept_text(std::string_view bytes) override {
    if (ended()) return bytes.empty();
    const std::int32_t next = grammar_->automaton().walk(state_, bytes);
    if (next == ByteAutomaton::kDead) return false;
    state_ = next;
    return true;
  }

  bool ended() const override { return ends_.empty() ? complete() : took_end_; }

 private:
  bool complete() const { return grammar_->automaton().accepts[static_cast<std::size_t>(state_)] != 0; }

  std::shared_ptr<const AutomatonGrammar> grammar_;
  std::vector<std::int32_t> ends_;
  std::int32_t state_ = 0;
  bool took_end_ = false;
};

std::unique_ptr<Matcher> AutomatonGrammar::matcher(std::vector<std::int32_t> ends) const {
  return std::make_unique<AutomatonMatcher>(shared_from_this(), std::move(ends));
}

}  // namespace

TokenOrder::TokenOrder(std::shared_ptr<const std::vector<std::string>> bytes) : bytes_(std::move(bytes)) {
  const std::vector<std::string>& texts = *bytes_;
  for (std::size_t token = 0; token < texts.size(); ++token) {
    if (!texts[token].empty()) tokens_.push_back(static_cast<std::int32_t>(token));
    longest_ = std::max(longest_, texts[token].size());
  }
  const auto text_of = [&](std::int32_t token) -> const std::string& {
    return texts[static_cast<std::size_t>(token)];
  };
  std::ranges::sort(tokens_, {}, text_of);
  const std::string* before = nullptr;
  for (const std::int32_t token : tokens_) {
    const std::string& text = text_of(token);
    const auto shared = before == nullptr ? text.begin() : std::ranges::mismatch(text, *before).in1;
    shared_.push_back(static_cast<std::int32_t>(shared - text.begin()));
    before = &text;
  }
}

std::string_view TokenOrder::bytes(std::int32_t token) const {
  const auto t = static_cast<std::size_t>(token);
  return token >= 0 && t < bytes_->size() ? std::string_view((*bytes_)[t]) : std::string_view();
}

void TokenOrder::allowed(const ByteAutomaton& automaton, std::int32_t state,
                         std::span<std::uint32_t> mask) const {
  std::ranges::fill(mask, 0U);
  // The states behind each byte of the last token that was looked at, as far as it led on.
  std::vector<std::int32_t> path(longest_ + 1, state);
  std::int32_t alive = 0;
  for (std::size_t i = 0; i < tokens_.size(); ++i) {
    if (shared_[i] > alive) continue;  // it has the byte at which that one did not
    const auto token = static_cast<std::size_t>(tokens_[i]);
    const std::string& text = (*bytes_)[token];
    auto at = static_cast<std::size_t>(shared_[i]);
    std::int32_t now = path[at];
    for (; at < text.size(); ++at) {
      now = automaton.step(now, text[at]);
      if (now == ByteAutomaton::kDead) break;
      path[at + 1] = now;
    }
    alive = static_cast<std::int32_t>(at);
    if (at == text.size() && token / 32 < mask.size()) mask[token / 32] |= 1U << (token % 32);
  }
}

std::shared_ptr<const Grammar> make_automaton_grammar(ByteAutomaton automaton,
                                                      std::shared_ptr<const TokenOrder> order) {
  return std::make_shared<AutomatonGrammar>(std::move(automaton), std::move(order));
}

}  // namespace flash_mla::grammar
