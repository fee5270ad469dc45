#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "flash_mla/cache_events.h"

namespace flash_mla::kv {

/// What comes into a prefix tree and leaves it, for somebody outside. The thread that steps writes into memory of its own
/// and hands over what there is between steps; others take that at any time.
///
/// It stays small if nobody takes: a page's coming and its going, both not yet taken, are as if they had not been. So at
/// most two events of each page are kept, and at times twice as many.
class CacheLog {
 public:
  explicit CacheLog(int rank = 0) : rank_(rank) {}

  // By the thread that steps.
  void stored(std::int32_t page, std::uint64_t block, std::optional<std::uint64_t> parent,
              std::span<const std::int32_t> tokens);
  void removed(std::int32_t page, std::uint64_t block);
  /// What has been written since is there for take(). Costs nothing if that is nothing.
  void hand_over();

  /// The events since the last call, in their order. From any thread.
  std::vector<CacheEvent> take();

 private:
  struct Entry {
    std::int32_t page = -1;
    CacheEvent event;
  };
  static constexpr std::size_t kTidyAt = 4096;
  static void drop_pairs(std::vector<Entry>& entries);

  const int rank_;
  std::vector<Entry> written_;  // of the thread that steps
  std::mutex mutex_;            // of what follows
  std::vector<Entry> ready_;
  std::size_t tidy_at_ = kTidyAt;  // events
};

}  // namespace flash_mla::kv
