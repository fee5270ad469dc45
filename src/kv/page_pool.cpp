#include "kv/page_pool.h"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "flash_mla/error.h"

namespace flash_mla::kv {
namespace {

std::int64_t pages_for(std::int64_t tokens) { return (tokens + kPageSize - 1) / kPageSize; }

std::span<const std::int32_t> page_tokens(std::span<const std::int32_t> tokens, std::int64_t page) {
  return tokens.subspan(static_cast<std::size_t>(page * kPageSize), kPageSize);
}

}  // namespace

SequencePages& SequencePages::operator=(SequencePages&& other) noexcept {
  pages_ = std::exchange(other.pages_, {});
  num_tokens_ = std::exchange(other.num_tokens_, 0);
  num_linked_ = std::exchange(other.num_linked_, 0);
  return *this;
}

PagePool::PagePool(int num_pages, bool prefix_cache, PageHash hash, CacheLog* log)
    : prefix_cache_(prefix_cache), tree_(prefix_cache ? std::max(num_pages, 0) : 0, hash, log) {
  if (num_pages <= 0) {
    throw InvalidArgument(fmt::format("num_pages is {}, expected at least 1", num_pages));
  }
  pages_.resize(static_cast<std::size_t>(num_pages));
  free_.reserve(pages_.size());
  for (std::int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);  // page 0 goes first
}

std::vector<std::int32_t> PagePool::match(std::span<const std::int32_t> tokens) const {
  if (!prefix_cache_ || tokens.empty()) return {};
  // One token at least must go through the model: its logits are what the prompt is for.
  return tree_.match(tokens.first(tokens.size() - 1));
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

int PagePool::admission_cost(std::span<const std::int32_t> tokens, std::int64_t num_tokens) const {
  const std::vector<std::int32_t> known = match(tokens);
  const auto in_use = std::ranges::count_if(known, [this](std::int32_t p) { return at(p).references > 0; });
  return static_cast<int>(pages_for(num_tokens) - in_use);
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
  PrefixTree::Node node;
  if (sequence.num_linked_ > 0) {
    node = tree_.node(sequence.pages_[static_cast<std::size_t>(sequence.num_linked_) - 1]);
  }
  for (; sequence.num_linked_ < num_tokens / kPageSize; ++sequence.num_linked_) {
    std::int32_t& page = sequence.pages_[static_cast<std::size_t>(sequence.num_linked_)];
    const auto own_tokens = page_tokens(tokens, sequence.num_linked_);
    const PrefixTree::Node known = tree_.child(node, own_tokens);
    if (known.page < 0) {
      tree_.link(page, node, known.hash, own_tokens);
    } else if (known.page != page) {
      reference(known.page);
      dereference(page, true);
      page = known.page;
    }
    node = {page, known.hash};
  }
}

void PagePool::trim(SequencePages& sequence) {
  while (std::ssize(sequence.pages_) > pages_for(sequence.num_tokens_)) {
    dereference(sequence.pages_.back(), true);
    sequence.pages_.pop_back();
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

SequencePages PagePool::share(const SequencePages& sequence, int count) {
  const std::int64_t num_tokens = std::int64_t{count} * kPageSize;
  if (count < 0 || num_tokens > sequence.num_tokens_) {
    throw std::logic_error(
        fmt::format("share: {} pages of a sequence with {} tokens", count, sequence.num_tokens_));
  }
  SequencePages copy;
  copy.pages_.assign(sequence.pages_.begin(), sequence.pages_.begin() + count);
  copy.num_tokens_ = num_tokens;
  copy.num_linked_ = std::min(sequence.num_linked_, count);
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
    tree_.unlink(victim);
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
  if (tree_.contains(page) && !keep && !tree_.has_children(page)) tree_.unlink(page);
  if (tree_.contains(page)) {
    append_evictable(page);
  } else {
    free_.push_back(page);
  }
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
    require(!tree_.contains(page), "free, yet in the prefix tree", page);
  }
  int cached = 0;
  for (std::int32_t page = oldest_, before = -1; page >= 0; before = page, page = at(page).newer) {
    ++lists[static_cast<std::size_t>(page)];
    ++cached;
    require(at(page).older == before, "broken list of evictable pages", page);
    require(tree_.contains(page), "evictable, yet not in the prefix tree", page);
    require(cached <= num_pages(), "the list of evictable pages is a ring", page);
  }
  require(cached == num_cached_, "miscounted evictable pages", -1);
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    const auto page = static_cast<std::int32_t>(i);
    const int references = pages_[i].references;
    require(lists[i] == (references == 0), "not in exactly one state", page);
    if (!tree_.contains(page) || references == 0 || tree_.parent(page) < 0) continue;
    require(at(tree_.parent(page)).references > 0, "in use, but its parent is not", page);
  }
  tree_.check();
}

}  // namespace flash_mla::kv
