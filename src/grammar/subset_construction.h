#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "grammar/nfa.h"

namespace flash_mla::grammar {

/// Makes the states of a deterministic automaton out of sets of states of one that is not, as they are asked for.
class SubsetConstruction {
 public:
  static constexpr std::int32_t kDead = -1;

  /// `nfa` is trimmed, and must outlive it.
  explicit SubsetConstruction(const Nfa& nfa);

  /// The state that stands for these.
  std::int32_t add(std::vector<int> set);
  /// The states behind `state`, by class of bytes, or kDead. Valid until the next call.
  const std::int32_t* row(std::int32_t state);

  const std::array<std::uint8_t, 256>& byte_class() const { return byte_class_; }
  std::size_t num_classes() const { return targets_.size(); }
  std::size_t num_states() const { return sets_.size(); }
  bool accepts(std::int32_t state) const;
  /// Looked at so far.
  std::int64_t num_edges() const { return num_edges_ + closed_.num_edges(); }

 private:
  static constexpr std::int64_t kUnknown = -1;

  void find_classes();

  const Nfa& nfa_;
  StateSets closed_;
  std::array<std::uint8_t, 256> byte_class_{};  // bytes that no edge tells apart share one
  std::map<std::vector<int>, std::int32_t> states_;
  std::vector<const std::vector<int>*> sets_;  // by state
  std::vector<std::int64_t> row_begin_;        // by state: where in rows_, or kUnknown
  std::vector<std::int32_t> rows_;
  std::vector<std::vector<int>> targets_;  // by class: scratch
  std::int64_t num_edges_ = 0;
};

}  // namespace flash_mla::grammar
