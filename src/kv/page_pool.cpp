#include "kv/page_pool.h"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "flash_mla/error.h"

namespace flash_mla::kv {
namespace {

// Hash of the empty prefix: any odd constant.
constexpr std::uint64_t kRoot = 0x9e3779b97f4a7c15u;

std::int64_t pages_for(std::int64_t tokens) { return (tokens + kPageSize - 1) / kPageSize; }

std::span<const std::int32_t> page_tokens(std::span<const std::int32_t> tokens, std::int64_t page) {
  return tokens.subspan(static_cast<std::size_t>(page * kPageSize), kPageSize);
}

}  // namespace

std::uint64_t hash_page(std::uint64_t parent, std::span<const std::int32_t> tokens) {
  // Multiply and xor-shift per token: every bit of a token reaches every bit of the result.
  std::uint64_t h = parent;
  for (const std::int32_t token : tokens) {
    h = (h ^ static_cast<std::uint32_t>(token)) * 0xff51afd7ed558ccdu;
    h ^= h >> 32;
  }
  return h;
}

SequencePages& SequencePages::operator=(SequencePages&& other) noexcept {
  pages_ = std::exchange(other.pages_, {});
  num_tokens_ = std::exchange(other.num_tokens_, 0);
  num_linked_ = std::exchange(other.num_linked_, 0);
  return *this;
}

PagePool::PagePool(int num_pages, bool prefix_cache, PageHash hash)
    : prefix_cache_(prefix_cache), hash_(hash != nullptr ? hash : hash_page) {
  if (num_pages <= 0) {
    throw InvalidArgument(fmt::format("num_pages is {}, expected at least 1", num_pages));
  }
  pages_.resize(static_cast<std::size_t>(num_pages));
  free_.reserve(pages_.size());
  for (std::int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);  // page 0 goes first
  if (prefix_cache) tokens_.resize(pages_.size() * kPageSize);
}

std::span<const std::int32_t> PagePool::tokens_of(std::int32_t page) const {
  return std::span<const std::int32_t>(tokens_).subspan(static_cast<std::size_t>(page) * kPageSize,
                                                        kPageSize);
}

std::int32_t PagePool::find(std::uint64_t hash, std::int32_t parent,
                            std::span<const std::int32_t> tokens) const {
  const auto [begin, end] = nodes_.equal_range(hash);
  for (auto it = begin; it != end; ++it) {
    const std::int32_t page = it->second;
    if (at(page).parent == parent && std::ranges::equal(tokens_of(page), tokens)) return page;
  }
  return -1;
}

std::vector<std::int32_t> PagePool::match(std::span<const std::int32_t> tokens) const {
  std::vector<std::int32_t> pages;
  if (!prefix_cache_ || tokens.empty()) return pages;
  // One token at least must go through the model: its logits are what the prompt is for.
  const std::int64_t most = (static_cast<std::int64_t>(tokens.size()) - 1) / kPageSize;
  std::uint64_t hash = kRoot;
  std::int32_t parent = -1;
  for (std::int64_t i = 0; i < most; ++i) {
    hash = hash_(hash, page_tokens(tokens, i));
    parent = find(hash, parent, page_tokens(tokens, i));
    if (parent < 0) break;
    pages.push_back(parent);
  }
  return pages;
}

std::int64_t PagePool::cached_prefix(std::span<const std::int32_t> tokens) const {
  return static_cast<std::int64_t>(match(tokens).size()) * kPageSize;
}

std::int64_t PagePool::admit(SequencePages& sequence, std::span<const std::int32_t> tokens) {
  if (!sequence.pages_.empty()) throw std::logic_error("admit: the sequence already has pages");
  sequence.pages_ = match(tokens);
  for (const std::int32_t page : sequence.pages_) reference(page);
  sequence.num_linked_ = static_cast<int>(sequence.pages_.size());
  sequence.num_tokens_ = std::int64_t{sequence.num_linked_} * kPageSize;
  return sequence.num_tokens_;
}

int PagePool::admission_cost(std::span<const std::int32_t> tokens) const {
  const std::vector<std::int32_t> known = match(tokens);
  const auto in_use = std::ranges::count_if(known, [this](std::int32_t p) { return at(p).references > 0; });
  return static_cast<int>(pages_for(static_cast<std::int64_t>(tokens.size())) - in_use);
}

int PagePool::pages_needed(const SequencePages& sequence, std::int64_t num_tokens) const {
  if (num_tokens <= sequence.num_tokens_) return 0;
  const std::int64_t have = static_cast<std::int64_t>(sequence.pages_.size());
  std::int64_t needed = std::max<std::int64_t>(0, pages_for(num_tokens) - have);
  const std::int64_t first = sequence.num_tokens_ / kPageSize;  // the page the next token goes to
  for (std::int64_t i = first; i < have; ++i) {
    needed += at(sequence.pages_[static_cast<std::size_t>(i)]).references > 1;
  }
  return static_cast<int>(needed);
}

bool PagePool::reserve(SequencePages& sequence, std::int64_t num_tokens, std::vector<PageCopy>& copies) {
  if (pages_needed(sequence, num_tokens) > num_available()) return false;
  if (num_tokens <= sequence.num_tokens_) return true;
  const auto first = static_cast<std::size_t>(sequence.num_tokens_ / kPageSize);
  for (std::size_t i = first; i < sequence.pages_.size(); ++i) {
    std::int32_t& page = sequence.pages_[i];
    if (at(page).references == 1) continue;
    const std::int32_t copy = take();
    // Pages past the last token hold nothing worth copying.
    if (i == first && sequence.num_tokens_ % kPageSize != 0) {
      copies.push_back({page, copy});
      ++counters_.pages_copied;
    }
    dereference(page, true);
    page = copy;
  }
  while (static_cast<std::int64_t>(sequence.pages_.size()) < pages_for(num_tokens)) {
    sequence.pages_.push_back(take());
  }
  return true;
}

void PagePool::commit(SequencePages& sequence, std::span<const std::int32_t> tokens) {
  const auto num_tokens = static_cast<std::int64_t>(tokens.size());
  if (num_tokens < sequence.num_tokens_ ||
      pages_for(num_tokens) > static_cast<std::int64_t>(sequence.pages_.size())) {
    throw std::logic_error(fmt::format("commit: {} tokens into a sequence of {} with {} pages", num_tokens,
                                       sequence.num_tokens_, sequence.pages_.size()));
  }
  sequence.num_tokens_ = num_tokens;
  if (!prefix_cache_) return;
  std::int32_t parent = -1;
  std::uint64_t hash = kRoot;
  if (sequence.num_linked_ > 0) {
    parent = sequence.pages_[static_cast<std::size_t>(sequence.num_linked_) - 1];
    hash = at(parent).hash;
  }
  for (; sequence.num_linked_ < num_tokens / kPageSize; ++sequence.num_linked_) {
    std::int32_t& page = sequence.pages_[static_cast<std::size_t>(sequence.num_linked_)];
    const auto own_tokens = page_tokens(tokens, sequence.num_linked_);
    hash = hash_(hash, own_tokens);
    const std::int32_t known = find(hash, parent, own_tokens);
    if (known < 0) {
      link(page, parent, hash, own_tokens);
    } else if (known != page) {
      reference(known);
      dereference(page, true);
      page = known;
    }
    parent = page;
  }
}

SequencePages PagePool::fork(const SequencePages& sequence) {
  SequencePages copy;
  copy.pages_.assign(sequence.pages_.begin(), sequence.pages_.begin() + pages_for(sequence.num_tokens_));
  copy.num_tokens_ = sequence.num_tokens_;
  copy.num_linked_ = sequence.num_linked_;
  for (const std::int32_t page : copy.pages_) reference(page);
  return copy;
}

void PagePool::release(SequencePages& sequence, bool keep) {
  // Last page first, so that of a cached chain the leaf is evicted first.
  for (auto it = sequence.pages_.rbegin(); it != sequence.pages_.rend(); ++it) dereference(*it, keep);
  sequence = SequencePages();
}

std::int32_t PagePool::take() {
  if (free_.empty()) {
    const std::int32_t victim = oldest_;
    if (victim < 0) throw std::logic_error("take: the pool is empty");
    remove_evictable(victim);
    unlink(victim);
    free_.push_back(victim);
    ++counters_.pages_evicted;
  }
  const std::int32_t page = free_.back();
  free_.pop_back();
  at(page).references = 1;
  return page;
}

void PagePool::reference(std::int32_t page) {
  if (at(page).references++ == 0) remove_evictable(page);
}

void PagePool::dereference(std::int32_t page, bool keep) {
  Page& p = at(page);
  if (p.references <= 0) throw std::logic_error(fmt::format("page {} is let go of twice", page));
  if (--p.references > 0) return;
  if (p.linked && !keep && p.num_children == 0) unlink(page);
  if (p.linked) {
    append_evictable(page);
  } else {
    free_.push_back(page);
  }
}

void PagePool::link(std::int32_t page, std::int32_t parent, std::uint64_t hash,
                    std::span<const std::int32_t> tokens) {
  Page& p = at(page);
  p.linked = true;
  p.parent = parent;
  p.hash = hash;
  if (parent >= 0) ++at(parent).num_children;
  std::ranges::copy(tokens, tokens_.begin() + static_cast<std::ptrdiff_t>(page) * kPageSize);
  nodes_.emplace(hash, page);
}

void PagePool::unlink(std::int32_t page) {
  Page& p = at(page);
  if (p.num_children != 0)
    throw std::logic_error(fmt::format("page {} is evicted before its children", page));
  const auto [begin, end] = nodes_.equal_range(p.hash);
  nodes_.erase(std::find_if(begin, end, [page](const auto& node) { return node.second == page; }));
  if (p.parent >= 0) --at(p.parent).num_children;
  p.linked = false;
  p.parent = -1;
  p.hash = 0;
}

void PagePool::append_evictable(std::int32_t page) {
  Page& p = at(page);
  p.older = newest_;
  p.newer = -1;
  (newest_ >= 0 ? at(newest_).newer : oldest_) = page;
  newest_ = page;
  ++num_cached_;
}

void PagePool::remove_evictable(std::int32_t page) {
  Page& p = at(page);
  (p.older >= 0 ? at(p.older).newer : oldest_) = p.newer;
  (p.newer >= 0 ? at(p.newer).older : newest_) = p.older;
  p.older = p.newer = -1;
  --num_cached_;
}

void PagePool::check() const {
  const auto require = [](bool ok, const char* what, std::int64_t page) {
    if (!ok) throw std::logic_error(fmt::format("page {}: {}", page, what));
  };
  std::vector<int> lists(pages_.size(), 0);  // lists that a page is in
  for (const std::int32_t page : free_) {
    ++lists[static_cast<std::size_t>(page)];
    require(!at(page).linked, "free, yet in the prefix cache", page);
  }
  int cached = 0;
  for (std::int32_t page = oldest_, before = -1; page >= 0; before = page, page = at(page).newer) {
    ++lists[static_cast<std::size_t>(page)];
    ++cached;
    require(at(page).older == before, "broken list of evictable pages", page);
    require(at(page).linked, "evictable, yet not in the prefix cache", page);
    require(cached <= num_pages(), "the list of evictable pages is a ring", page);
  }
  require(cached == num_cached_, "miscounted evictable pages", -1);
  std::size_t linked = 0;
  std::vector<int> children(pages_.size(), 0);
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    const auto page = static_cast<std::int32_t>(i);
    const Page& p = pages_[i];
    require(lists[i] == (p.references == 0), "not in exactly one state", page);
    if (!p.linked) continue;
    ++linked;
    if (p.parent >= 0) {
      ++children[static_cast<std::size_t>(p.parent)];
      require(at(p.parent).linked, "its parent left the prefix cache", page);
      require(p.references == 0 || at(p.parent).references > 0, "in use, but its parent is not", page);
    }
    require(find(p.hash, p.parent, tokens_of(page)) == page, "not found under its own tokens", page);
  }
  require(linked == nodes_.size(), "nodes that are no pages", -1);
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    require(children[i] == pages_[i].num_children, "miscounted children", static_cast<std::int64_t>(i));
  }
}

}  // namespace flash_mla::kv
