#include "engine/rooms_and_tiers.h"

#include "engine/scheduler.h"
#include "kv/kv_tier.h"

namespace flash_mla::engine {

void RoomsAndTiers::look_up(Sequence& sequence, std::span<const std::int32_t> tokens) {
  waiting_.erase(&sequence);
  const bool has_room = sequence.room.has_value();
  rooms_.look_up(sequence, tokens);
  if (has_room) {
    waiting_.emplace(&sequence, std::ssize(tokens));
  } else {
    tiers_.look_up(sequence, tokens);
  }
}

std::optional<std::int64_t> RoomsAndTiers::found(Sequence& sequence) {
  const std::optional<std::int64_t> of_room = rooms_.found(sequence);
  if (!of_room || *of_room > 0) return of_room;
  if (const auto waiting = waiting_.find(&sequence); waiting != waiting_.end()) {
    const auto count = static_cast<std::size_t>(waiting->second);
    waiting_.erase(waiting);
    const std::span<const std::int32_t> all(sequence.tokens), tokens = all.first(count);
    // Not for what the prefix cache has anyway, of which the last token never is.
    if (std::ssize(tokens) - pool_.cached_prefix(all.first(count + 1)) >= kv::kChunkTokens)
      tiers_.look_up(sequence, tokens);
  }
  return tiers_.found(sequence);
}

// A ticket of the tiers is there only while they look up or load.
PrefixLoader& RoomsAndTiers::loader_of(const Sequence& sequence) const {
  return sequence.ticket ? tiers_ : rooms_;
}

void RoomsAndTiers::skip(Sequence& sequence) {
  waiting_.erase(&sequence);
  rooms_.skip(sequence);
  tiers_.skip(sequence);
}

// One of them at most loads into its pages, and takes them.
void RoomsAndTiers::forget(Sequence& sequence) {
  waiting_.erase(&sequence);
  tiers_.forget(sequence);
  rooms_.forget(sequence);
}

}  // namespace flash_mla::engine
