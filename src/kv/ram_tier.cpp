#include <algorithm>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "kv/kv_tier.h"

namespace flash_mla::kv {
namespace {

/// Holds its chunks, so that none of them goes before it is read.
class RamMatch : public TierMatch {
 public:
  explicit RamMatch(std::vector<Buffer> chunks) : chunks_(std::move(chunks)) {}
  std::int64_t num_chunks() const override { return std::ssize(chunks_); }
  Buffer read(std::int64_t chunk) override { return chunks_[static_cast<std::size_t>(chunk)]; }

 private:
  std::vector<Buffer> chunks_;
};

class RamTier : public KvTier {
 public:
  RamTier(std::size_t bytes, std::string salt) : limit_(bytes), salt_(std::move(salt)) {}

  const char* name() const override { return "ram"; }

  std::unique_ptr<TierMatch> look_up(std::span<const std::int32_t> tokens) override {
    const std::vector<ChunkKey> keys = chunk_keys(salt_, tokens);
    const std::lock_guard lock(mutex_);
    std::vector<Buffer> chunks;
    for (const ChunkKey& key : keys) {
      const auto found = by_key_.find(key);
      const std::size_t length = (chunks.size() + 1) * kChunkTokens;
      // The tokens are compared: a key alone may be another prompt's.
      if (found == by_key_.end() || !std::ranges::equal(found->second->tokens, tokens.first(length))) break;
      chunks.push_back(found->second->bytes);
    }
    touch(std::span(keys).first(chunks.size()));
    return chunks.empty() ? nullptr : std::make_unique<RamMatch>(std::move(chunks));
  }

  bool store(std::span<const std::int32_t> tokens, const Buffer& bytes) override {
    const std::vector<ChunkKey> keys = chunk_keys(salt_, tokens);
    const std::lock_guard lock(mutex_);
    if (!by_key_.contains(keys.back())) {
      const std::size_t needed = bytes.bytes() + tokens.size_bytes();
      if (needed > limit_) return false;
      while (used_ + needed > limit_) evict();
      chunks_.push_front({keys.back(), {tokens.begin(), tokens.end()}, bytes});
      by_key_.emplace(keys.back(), chunks_.begin());
      used_ += needed;
    }
    touch(keys);
    return true;
  }

 private:
  struct Chunk {
    ChunkKey key;
    std::vector<std::int32_t> tokens;  // all up to its end
    Buffer bytes;
    std::size_t size() const { return bytes.bytes() + tokens.size() * sizeof(std::int32_t); }
  };

  /// The last first: a chunk is of use with those before it alone, so it goes before they do.
  void touch(std::span<const ChunkKey> keys) {
    for (auto key = keys.rbegin(); key != keys.rend(); ++key) {
      const auto found = by_key_.find(*key);
      if (found != by_key_.end()) chunks_.splice(chunks_.begin(), chunks_, found->second);
    }
  }
  void evict() {
    used_ -= chunks_.back().size();
    by_key_.erase(chunks_.back().key);
    chunks_.pop_back();
  }

  const std::size_t limit_;
  const std::string salt_;
  std::mutex mutex_;  // of what follows
  std::size_t used_ = 0;
  std::list<Chunk> chunks_;  // used last first
  std::unordered_map<ChunkKey, std::list<Chunk>::iterator, ChunkKeyHash> by_key_;
};

}  // namespace

std::unique_ptr<KvTier> make_ram_tier(std::size_t bytes, const TierConfig& config) {
  return std::make_unique<RamTier>(bytes, config.salt);
}

}  // namespace flash_mla::kv
