#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace flash_mla::engine {

struct Continuation;

/// Guesses how a continuation goes on.
class Drafter {
 public:
  virtual ~Drafter() = default;
  /// At most `count` tokens, the first of them the one that comes next; all in the vocabulary. Empty: no idea.
  virtual std::vector<std::int32_t> draft(const Continuation& c, int count) = 0;
};

/// Prompt lookup: what followed the last tokens where they occurred before, in prompt or continuation. Of several
/// places the one that agrees with the most tokens counts, and of those the latest.
class NgramDrafter : public Drafter {
 public:
  std::vector<std::int32_t> draft(const Continuation& c, int count) override;
};

/// NgramDrafter's, of any tokens.
std::vector<std::int32_t> ngram_draft(std::span<const std::int32_t> tokens, int count);

}  // namespace flash_mla::engine
