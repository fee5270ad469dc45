#include "text/added_tokens.h"

namespace flash_mla::text {

void AddedTokens::add(std::string_view content, std::int32_t token) {
  std::size_t node = 0;
  for (const char c : content) {
    const auto [edge, added] = nodes_[node].next.try_emplace(c, nodes_.size());
    node = edge->second;
    if (added) nodes_.emplace_back();
  }
  nodes_[node].token = token;
}

AddedTokens::Match AddedTokens::find(std::string_view text, std::size_t from) const {
  for (std::size_t begin = from; begin < text.size(); ++begin) {
    Match best{begin, begin, -1};
    std::size_t node = 0;
    for (std::size_t at = begin; at < text.size(); ++at) {
      const auto edge = nodes_[node].next.find(text[at]);
      if (edge == nodes_[node].next.end()) break;
      node = edge->second;
      if (nodes_[node].token >= 0) best = {begin, at + 1, nodes_[node].token};
    }
    if (best.token >= 0) return best;
  }
  return {text.size(), text.size(), -1};
}

}  // namespace flash_mla::text
