#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace flash_mla::model {

/// A point in a queue of copies.
class CopyMark {
 public:
  virtual ~CopyMark() = default;
  /// Whether all copies before it have been made.
  virtual bool done() = 0;
  /// Returns when they have.
  virtual void wait() = 0;
};

/// Copies of pages between a model's cache and the host's memory, beside its steps. Pages that are copied must not be
/// written meanwhile, or read where they are copied to.
///
/// Pages lie on the host as (layers, pages, bytes of a page in the layer).
class PageCopies {
 public:
  virtual ~PageCopies() = default;
  /// What is queued from now on runs behind all steps, and copies within the cache, that have been launched. To be
  /// called by the thread that launches; the others by any one thread at a time.
  virtual void follow_steps() = 0;
  /// Queues the copies of pages to the host.
  virtual void download(std::span<const std::int32_t> pages, std::byte* to) = 0;
  /// The same of one layer, (pages, bytes of a page in the layer).
  virtual void download(int layer, std::span<const std::int32_t> pages, std::byte* to) = 0;
  /// Queues the copies of pages from the host; where `pages` has -1, none is made.
  virtual void upload(std::span<const std::int32_t> pages, const std::byte* from) = 0;
  /// Of all that has been queued here so far.
  virtual std::unique_ptr<CopyMark> mark() = 0;
};

}  // namespace flash_mla::model
