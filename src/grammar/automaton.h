#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "grammar/grammar.h"
#include "grammar/nfa.h"
#include "grammar/token_order.h"

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

/// Of the same texts; `nfa` is trimmed. None where it would have more than 65,536 states or take too long to make.
std::optional<ByteAutomaton> determinize(const Nfa& nfa);

/// Texts that an automaton accepts, of the tokens of `order`. One that is not deterministic is trimmed; a token's time then
/// grows with the states in which a text may be, and a mask that would take too long throws TooSlow.
std::shared_ptr<const Grammar> make_automaton_grammar(ByteAutomaton automaton,
                                                      std::shared_ptr<const TokenOrder> order);
std::shared_ptr<const Grammar> make_automaton_grammar(Nfa automaton, std::shared_ptr<const TokenOrder> order);

}  // namespace flash_mla::grammar
