#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/page_size.h"
#include "kv/cache_log.h"

namespace flash_mla::kv {

/// Full pages by their tokens: a tree whose nodes are pages, each behind the page that precedes it in a
/// sequence. Found by a hash chain over their tokens; a hit is verified: the node's own tokens are compared,
/// and its parent must be the node that the walk came from, so a hash collision costs time but never gives
/// wrong contents.
///
/// Pure bookkeeping: who holds a page, and when it leaves, is the PagePool's business.
class PrefixTree {
 public:
  /// Hash of one page of tokens that follows a prefix with hash `parent`.
  using PageHash = std::uint64_t (*)(std::uint64_t parent, std::span<const std::int32_t> tokens);

  /// Of pages 0 to num_pages - 1. `hash` null: hash_page. `log`, if there is one, is told of every link and unlink.
  PrefixTree(int num_pages, PageHash hash, CacheLog* log = nullptr);

  /// A place in the tree: a page (-1: before the first), and the hash of all tokens up to its end.
  struct Node {
    std::int32_t page = -1;
    std::uint64_t hash = 0x9e3779b97f4a7c15u;  // of no tokens: any odd constant
  };
  /// The place of a page that the tree contains; the root for -1.
  Node node(std::int32_t page) const { return page < 0 ? Node() : Node{page, at(page).hash}; }
  /// The page of `tokens` behind `parent`; its page is -1 if there is none.
  Node child(const Node& parent, std::span<const std::int32_t> tokens) const;
  /// The pages of the longest known prefix of `tokens`, whole pages of them.
  std::vector<std::int32_t> match(std::span<const std::int32_t> tokens) const;

  bool contains(std::int32_t page) const;
  std::int32_t parent(std::int32_t page) const { return at(page).parent; }
  bool has_children(std::int32_t page) const { return at(page).num_children > 0; }

  /// Makes a page the child of `parent`; `hash` is that of child().
  void link(std::int32_t page, const Node& parent, std::uint64_t hash, std::span<const std::int32_t> tokens);
  /// Takes out a page that has no children.
  void unlink(std::int32_t page);

  /// Recounts everything; throws std::logic_error saying what is inconsistent. For tests.
  void check() const;

 private:
  struct Entry {
    bool linked = false;
    std::int32_t parent = -1;
    std::int32_t num_children = 0;
    std::uint64_t hash = 0;  // up to and including this page
  };

  Entry& at(std::int32_t page) { return entries_[static_cast<std::size_t>(page)]; }
  const Entry& at(std::int32_t page) const { return entries_[static_cast<std::size_t>(page)]; }
  std::span<const std::int32_t> tokens_of(std::int32_t page) const;

  PageHash hash_;
  CacheLog* log_;
  std::vector<Entry> entries_;
  std::vector<std::int32_t> tokens_;  // (num_pages, kPageSize): of linked pages
  std::unordered_multimap<std::uint64_t, std::int32_t> by_hash_;
};

/// The hash that a PrefixTree uses unless told otherwise.
std::uint64_t hash_page(std::uint64_t parent, std::span<const std::int32_t> tokens);

}  // namespace flash_mla::kv
