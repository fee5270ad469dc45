#include "grammar/token_order.h"

#include <utility>

namespace flash_mla::grammar {

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

}  // namespace flash_mla::grammar
