#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flash_mla::grammar {

/// The tokens of a vocabulary in the order of their bytes, so that what neighbours share is looked at once.
class TokenOrder {
 public:
  explicit TokenOrder(std::shared_ptr<const std::vector<std::string>> bytes);

  std::string_view bytes(std::int32_t token) const;
  /// As Matcher::allowed, of the tokens that lead on from `state`; end tokens apart. `step(state, byte)` is the state behind
  /// a byte, or negative where there is none.
  template <typename Step>
  void allowed(std::int32_t state, Step step, std::span<std::uint32_t> mask) const;

 private:
  std::shared_ptr<const std::vector<std::string>> bytes_;  // by token
  std::vector<std::int32_t> tokens_;
  std::vector<std::int32_t> shared_;  // bytes that each has in common with the one before
  std::size_t longest_ = 0;
};

template <typename Step>
void TokenOrder::allowed(std::int32_t state, Step step, std::span<std::uint32_t> mask) const {
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
      now = step(now, text[at]);
      if (now < 0) break;
      path[at + 1] = now;
    }
    alive = static_cast<std::int32_t>(at);
    if (at == text.size() && token / 32 < mask.size()) mask[token / 32] |= 1U << (token % 32);
  }
}

}  // namespace flash_mla::grammar
