#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "model/model.h"

namespace flash_mla::engine {

/// Host memory for chunks. What is given back is kept for the next, up to a few: page-locked memory takes long to get.
class ChunkMemory : public std::enable_shared_from_this<ChunkMemory> {
 public:
  /// `model` makes the memory and must outlive the calls.
  ChunkMemory(const model::Model& model, std::size_t chunk_bytes)
      : model_(model), chunk_bytes_(chunk_bytes) {}

  std::size_t chunk_bytes() const { return chunk_bytes_; }

  /// From any thread. Throws std::bad_alloc.
  Buffer take() {
    Buffer kept = take_free();
    return lend(kept.data() != nullptr ? std::move(kept) : model_.allocate_host(chunk_bytes_));
  }
  /// The same for the thread that steps: without data where it would have to wait for page-locked memory.
  Buffer take_at_once() {
    Buffer kept = take_free();
    if (kept.data() == nullptr && model_.launches_ahead()) return {};
    return lend(kept.data() != nullptr ? std::move(kept) : model_.allocate_host(chunk_bytes_));
  }
  /// Makes sure that some are there for take_at_once. Throws std::bad_alloc.
  void refill() {
    if (!model_.launches_ahead()) return;
    while (num_free() < kMostFree) put(model_.allocate_host(chunk_bytes_));
  }

 private:
  static constexpr std::size_t kMostFree = 16;

  Buffer take_free() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return {};
    Buffer out = std::move(free_.back());
    free_.pop_back();
    return out;
  }
  /// A buffer whose deleter owns the memory, and gives it back while this object lives.
  Buffer lend(Buffer kept) {
    std::byte* const data = kept.data();
    return {
        std::shared_ptr<std::byte>(data,
                                   [kept = std::move(kept), owner = weak_from_this()](std::byte*) mutable {
                                     if (const auto self = owner.lock()) self->put(std::move(kept));
                                   }),
        chunk_bytes_};
  }
  void put(Buffer chunk) {
    const std::lock_guard lock(mutex_);
    if (free_.size() < kMostFree) free_.push_back(std::move(chunk));
  }
  std::size_t num_free() {
    const std::lock_guard lock(mutex_);
    return free_.size();
  }

  const model::Model& model_;
  const std::size_t chunk_bytes_;
  std::mutex mutex_;
  std::vector<Buffer> free_;
};

}  // namespace flash_mla::engine
