#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "grammar/grammar.h"

namespace flash_mla::grammar {

/// A deterministic automaton over bytes, which enters a state only where a text can still be completed.
struct ByteAutomaton {
  static constexpr std::int32_t kDead = -1;

  std::array<std::uint8_t, 256> byte_class{};  ///< bytes that no state tells apart share one
  int num_classes = 1;
  std::vector<std::int32_t>
      next;                   ///< (states, num_classes), the state behind or kDead; a text begins in state 0
  std::vector<char> accepts;  ///< (states): a text may end here

  std::int32_t step(std::int32_t state, char byte) const {
    const std::size_t column = byte_class[static_cast<unsigned char>(byte)];
    return next[static_cast<std::size_t>(state) * static_cast<std::size_t>(num_classes) + column];
  }
  /// The state behind `bytes`, or kDead.
  std::int32_t walk(std::int32_t state, std::string_view bytes) const {
    for (const char byte : bytes) {
      if (state == kDead) break;
      state = step(state, byte);
    }
    return state;
  }
};

/// What may stand before or in place of a text of a regular expression.
struct RegexSurroundings {
  int line_breaks = 0;     ///< up to so many before it
  std::string opening;     ///< not empty: or this alone
  int opening_blanks = 0;  ///< spaces or line breaks before `opening`, at most
};

/// Of a regular expression as XGrammar reads it. None where it does not, where no text matches, or where the automaton
/// would have more than 65,536 states or take too long to make.
std::optional<ByteAutomaton> regex_automaton(const std::string& regex, const RegexSurroundings& around);

/// The tokens of a vocabulary in the order of their bytes, so that what neighbours share is looked at once.
class TokenOrder {
 public:
  explicit TokenOrder(std::shared_ptr<const std::vector<std::string>> bytes);

  std::string_view bytes(std::int32_t token) const;
  /// As Matcher::allowed, of the tokens that lead on from `state`; end tokens apart.
  void allowed(const ByteAutomaton& automaton, std::int32_t state, std::span<std::uint32_t> mask) const;

 private:
  std::shared_ptr<const std::vector<std::string>> bytes_;  // by token
  std::vector<std::int32_t> tokens_;
  std::vector<std::int32_t> shared_;  // bytes that each has in common with the one before
  std::size_t longest_ = 0;
};

/// Texts that `automaton` accepts, of the tokens of `order`.
std::shared_ptr<const Grammar> make_automaton_grammar(ByteAutomaton automaton,
                                                      std::shared_ptr<const TokenOrder> order);

}  // namespace flash_mla::grammar
