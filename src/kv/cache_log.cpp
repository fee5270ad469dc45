#include "kv/cache_log.h"

#include <algorithm>
#include <iterator>
#include <unordered_map>
#include <utility>

namespace flash_mla::kv {

void CacheLog::stored(std::int32_t page, std::uint64_t block, std::optional<std::uint64_t> parent,
                      std::span<const std::int32_t> tokens) {
  written_.push_back(
      {page, {CacheEvent::Kind::kStored, rank_, block, parent, {tokens.begin(), tokens.end()}}});
}

void CacheLog::removed(std::int32_t page, std::uint64_t block) {
  written_.push_back({page, {CacheEvent::Kind::kRemoved, rank_, block, std::nullopt, {}}});
}

void CacheLog::hand_over() {
  if (written_.empty()) return;
  const std::lock_guard lock(mutex_);
  if (ready_.empty()) {
    ready_.swap(written_);  // each keeps the other's memory
  } else {
    std::move(written_.begin(), written_.end(), std::back_inserter(ready_));
    written_.clear();
  }
  if (ready_.size() < tidy_at_) return;
  drop_pairs(ready_);
  tidy_at_ = std::max(kTidyAt, 2 * ready_.size());  // as many events again before the next time
}

// A page is in the tree once at a time, so its events alternate. What remains of a page is at most a removal of what was
// told of before, and then a store of what is there still: of both the order to all others is kept, and a page's parent,
// which is there as long as it, keeps its own store ahead of it.
void CacheLog::drop_pairs(std::vector<Entry>& entries) {
  std::unordered_map<std::int32_t, std::size_t> open;  // by page, where it was stored
  std::vector<bool> dropped(entries.size());
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const Entry& e = entries[i];
    if (e.event.kind == CacheEvent::Kind::kStored) {
      open[e.page] = i;
    } else if (const auto it = open.find(e.page); it != open.end()) {
      dropped[it->second] = dropped[i] = true;
      open.erase(it);
    }
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (dropped[i]) continue;
    if (kept != i) entries[kept] = std::move(entries[i]);
    ++kept;
  }
  entries.resize(kept);
}

std::vector<CacheEvent> CacheLog::take() {
  std::vector<Entry> entries;
  {
    const std::lock_guard lock(mutex_);
    entries.swap(ready_);
    tidy_at_ = kTidyAt;
  }
  std::vector<CacheEvent> out;
  out.reserve(entries.size());
  for (Entry& e : entries) out.push_back(std::move(e.event));
  return out;
}

}  // namespace flash_mla::kv
