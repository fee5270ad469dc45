#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace flash_mla {

/// A page of tokens has come into an engine's prefix cache, or has left it (Engine::take_cache_events). Who plays the
/// events back in their order has the set of cached pages, by which a router can send a prompt to the engine that has most
/// of it.
struct CacheEvent {
  enum class Kind {
    kStored,   ///< its page before is in the cache
    kRemoved,  ///< none of those behind it is in the cache
  };
  Kind kind = Kind::kStored;
  int rank = 0;  ///< whose cache, with EngineOptions::dp
  /// Of all tokens from the sequence's first to the page's last: equal in every engine for equal tokens. Two pages with
  /// other tokens may have the same, one in 2^64 or where somebody means it; that is a wrong guess of a router's, no more.
  std::uint64_t block = 0;
  std::optional<std::uint64_t> parent;  ///< with kStored: the block before; none for a sequence's first
  std::vector<std::int32_t> tokens;     ///< with kStored: (64), the page's own
};

}  // namespace flash_mla
