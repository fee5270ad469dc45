#pragma once

#include <cstdint>
#include <map>
#include <string_view>
#include <vector>

namespace flash_mla::text {

/// Finds tokens that were added to a vocabulary in a text: leftmost, and of those that begin there the
/// longest.
class AddedTokens {
 public:
  struct Match {
    std::size_t begin, end;  // bytes
    std::int32_t token;
  };

  /// `content` is not empty; the same one again replaces its token.
  void add(std::string_view content, std::int32_t token);
  /// The first match that begins at `from` or later; token -1 if there is none.
  Match find(std::string_view text, std::size_t from) const;

 private:
  struct Node {
    std::map<char, std::size_t> next;
    std::int32_t token = -1;
  };
  std::vector<Node> nodes_{1};  // a trie; the first is the root
};

}  // namespace flash_mla::text
