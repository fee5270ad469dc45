#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "base/page_size.h"
#include "kv/prefix_tree.h"

namespace flash_mla::kv {

/// The pages of one sequence, in order. Held by the caller, changed by the PagePool only. Must be given
/// to PagePool::release before it is dropped.
class SequencePages {
 public:
  SequencePages() = default;
  SequencePages(SequencePages&& other) noexcept { *this = std::move(other); }
  SequencePages& operator=(SequencePages&& other) noexcept;

  /// Page of every kPageSize tokens; room for num_tokens() and for what has been reserved beyond.
  std::span<const std::int32_t> pages() const { return pages_; }
  /// Tokens whose latents the pages hold.
  std::int64_t num_tokens() const { return num_tokens_; }

 private:
  friend class PagePool;
  std::vector<std::int32_t> pages_;
  std::int64_t num_tokens_ = 0;
  int num_linked_ = 0;  // leading pages that are nodes of the prefix cache
};

/// A copy of one page that must be made before anything is written to `target`.
struct PageCopy {
  std::int32_t source = -1, target = -1;
};

/// Hands out the pages of the cache. Pages are counted: forks share them, and a shared page that is not full
/// is copied before it is written. Full pages become nodes of the prefix tree: found again by their tokens,
/// kept after the last sequence has left them, evicted in least-recently-used order when pages run out.
///
/// Every page is in exactly one state: free, in use (num_references > 0), or cached (unreferenced,
/// evictable). Whoever references a node references its parent too, and sequences let go of their last page
/// first, so nodes are evicted leaf first and a node's parent is always in the cache.
///
/// Not thread-safe. No call allocates or copies device memory.
class PagePool {
 public:
  using PageHash = PrefixTree::PageHash;

  struct Counters {
    std::int64_t pages_evicted = 0;
    std::int64_t pages_copied = 0;  ///< copy-on-write
  };

  /// `log`, if there is one, is told what comes into the prefix cache and leaves it; it outlives the pool.
  /// Throws InvalidArgument unless num_pages > 0.
  explicit PagePool(int num_pages, bool prefix_cache = true, PageHash hash = nullptr,
                    CacheLog* log = nullptr);

  /// Starts `sequence` (empty before) with the cached pages of the longest known prefix of `tokens`, always
  /// leaving at least one token to be computed. Returns the tokens found.
  std::int64_t admit(SequencePages& sequence, std::span<const std::int32_t> tokens);

  /// Tokens that admit() would find now.
  std::int64_t cached_prefix(std::span<const std::int32_t> tokens) const;

  /// Pages that can be handed out now and could not any more once a sequence of `tokens` had been admitted
  /// and given room for `num_tokens`, at least as many.
  int admission_cost(std::span<const std::int32_t> tokens, std::int64_t num_tokens) const;
  int admission_cost(std::span<const std::int32_t> tokens) const {
    return admission_cost(tokens, static_cast<std::int64_t>(tokens.size()));
  }

  /// Pages that reserve() would take from the pool.
  int pages_needed(const SequencePages& sequence, std::int64_t num_tokens) const;

  /// Makes room for tokens up to `num_tokens` and makes the place where they go writable. Copies to be made
  /// are appended to `copies`. False, with nothing changed, if the pool has too few pages.
  bool reserve(SequencePages& sequence, std::int64_t num_tokens, std::vector<PageCopy>& copies);

  /// The latents of all of `tokens`, the sequence's from its first on, are now in the reserved pages. Pages
  /// that became full enter the prefix cache; where the cache already has the same page, that one replaces
  /// the sequence's own.
  void commit(SequencePages& sequence, std::span<const std::int32_t> tokens);

  /// Lets go of what has been reserved past the page of the sequence's last token.
  void trim(SequencePages& sequence);

  /// A second sequence with the same tokens, sharing all pages. Reservations of `sequence` past its last
  /// token end here: both must reserve before they write.
  SequencePages fork(const SequencePages& sequence);

  /// The first `count` pages of `sequence`, all of them full, for somebody who reads them while it goes on.
  SequencePages share(const SequencePages& sequence, int count);

  /// Lets go of all pages. `keep` = false: contents are not to be trusted, so pages that nobody else uses
  /// leave the prefix cache as well.
  void release(SequencePages& sequence, bool keep = true);

  int num_pages() const { return static_cast<int>(pages_.size()); }
  int num_free() const { return static_cast<int>(free_.size()); }
  int num_cached() const { return num_cached_; }
  int num_used() const { return num_pages() - num_free() - num_cached(); }
  /// Pages that reserve() can hand out: free ones and cached ones.
  int num_available() const { return num_free() + num_cached(); }
  const Counters& counters() const { return counters_; }
  int num_references(std::int32_t page) const { return pages_[static_cast<std::size_t>(page)].references; }

  /// Recounts everything; throws std::logic_error saying what is inconsistent. For tests, O(num_pages).
  void check() const;

 private:
  struct Page {
    int references = 0;
    std::int32_t older = -1, newer = -1;  // neighbours in the list of evictable pages
  };

  Page& at(std::int32_t page) { return pages_[static_cast<std::size_t>(page)]; }
  const Page& at(std::int32_t page) const { return pages_[static_cast<std::size_t>(page)]; }

  /// Pages of the longest known prefix that may be used.
  std::vector<std::int32_t> match(std::span<const std::int32_t> tokens) const;
  std::int32_t take();
  void reference(std::int32_t page);
  void dereference(std::int32_t page, bool keep);
  void append_evictable(std::int32_t page);
  void remove_evictable(std::int32_t page);

  bool prefix_cache_;
  std::vector<Page> pages_;
  std::vector<std::int32_t> free_;
  PrefixTree tree_;
  std::int32_t oldest_ = -1, newest_ = -1;
  int num_cached_ = 0;
  Counters counters_;
};

}  // namespace flash_mla::kv
