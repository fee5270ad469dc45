#include "kv/prefix_tree.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

namespace flash_mla::kv {

std::uint64_t hash_page(std::uint64_t parent, std::span<const std::int32_t> tokens) {
  // Multiply and xor-shift per token: every bit of a token reaches every bit of the result.
  std::uint64_t h = parent;
  for (const std::int32_t token : tokens) {
    h = (h ^ static_cast<std::uint32_t>(token)) * 0xff51afd7ed558ccdu;
    h ^= h >> 32;
  }
  return h;
}

PrefixTree::PrefixTree(int num_pages, PageHash hash, CacheLog* log)
    : hash_(hash != nullptr ? hash : hash_page),
      log_(log),
      entries_(static_cast<std::size_t>(num_pages)),
      tokens_(entries_.size() * kPageSize) {}

std::span<const std::int32_t> PrefixTree::tokens_of(std::int32_t page) const {
  return std::span(tokens_).subspan(static_cast<std::size_t>(page) * kPageSize, kPageSize);
}

PrefixTree::Node PrefixTree::child(const Node& parent, std::span<const std::int32_t> tokens) const {
  Node found;
  found.hash = hash_(parent.hash, tokens);
  const auto [begin, end] = by_hash_.equal_range(found.hash);
  for (auto it = begin; it != end; ++it) {
    const std::int32_t page = it->second;
    if (at(page).parent == parent.page && std::ranges::equal(tokens_of(page), tokens)) {
      found.page = page;
      break;
    }
  }
  return found;
}

std::vector<std::int32_t> PrefixTree::match(std::span<const std::int32_t> tokens) const {
  std::vector<std::int32_t> pages;
  Node node;
  for (; tokens.size() >= kPageSize; tokens = tokens.subspan(kPageSize)) {
    node = child(node, tokens.first(kPageSize));
    if (node.page < 0) break;
    pages.push_back(node.page);
  }
  return pages;
}

bool PrefixTree::contains(std::int32_t page) const {
  return static_cast<std::size_t>(page) < entries_.size() && at(page).linked;
}

void PrefixTree::link(std::int32_t page, const Node& parent, std::uint64_t hash,
                      std::span<const std::int32_t> tokens) {
  Entry& e = at(page);
  e.linked = true;
  e.parent = parent.page;
  e.hash = hash;
  if (parent.page >= 0) ++at(parent.page).num_children;
  std::ranges::copy(tokens, tokens_.begin() + static_cast<std::ptrdiff_t>(page) * kPageSize);
  by_hash_.emplace(hash, page);
  if (log_) log_->stored(page, hash, parent.page < 0 ? std::nullopt : std::optional(parent.hash), tokens);
}

void PrefixTree::unlink(std::int32_t page) {
  Entry& e = at(page);
  if (e.num_children != 0)
    throw std::logic_error(fmt::format("page {} is evicted before its children", page));
  const auto [begin, end] = by_hash_.equal_range(e.hash);
  by_hash_.erase(std::find_if(begin, end, [page](const auto& entry) { return entry.second == page; }));
  if (e.parent >= 0) --at(e.parent).num_children;
  if (log_) log_->removed(page, e.hash);
  e = Entry();
}

void PrefixTree::check() const {
  const auto require = [](bool ok, const char* what, std::size_t page) {
    if (!ok) throw std::logic_error(fmt::format("page {}: {}", page, what));
  };
  std::size_t linked = 0;
  std::vector<int> children(entries_.size(), 0);
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const Entry& e = entries_[i];
    if (!e.linked) continue;
    ++linked;
    if (e.parent >= 0) {
      ++children[static_cast<std::size_t>(e.parent)];
      require(at(e.parent).linked, "its parent left the prefix tree", i);
    }
    const auto page = static_cast<std::int32_t>(i);
    require(child(node(e.parent), tokens_of(page)).page == page, "not found under its own tokens", i);
  }
  require(linked == by_hash_.size(), "hashes that are no pages", entries_.size());
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    require(children[i] == entries_[i].num_children, "miscounted children", i);
  }
}

}  // namespace flash_mla::kv
