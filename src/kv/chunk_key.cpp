#define XXH_INLINE_ALL
#include <xxhash.h>

#include <array>
#include <cstring>

#include "kv/kv_tier.h"

namespace flash_mla::kv {
namespace {

ChunkKey key_of(const XXH128_hash_t& hash) { return {hash.high64, hash.low64}; }

}  // namespace

ChunkKey root_key(std::string_view salt) { return key_of(XXH3_128bits(salt.data(), salt.size())); }

ChunkKey child_key(const ChunkKey& parent, std::span<const std::int32_t> tokens) {
  XXH3_state_t state;
  XXH3_128bits_reset(&state);
  const std::array<std::uint64_t, 2> before = {parent.high, parent.low};
  XXH3_128bits_update(&state, before.data(), sizeof(before));
  XXH3_128bits_update(&state, tokens.data(), tokens.size_bytes());
  return key_of(XXH3_128bits_digest(&state));
}

std::vector<ChunkKey> chunk_keys(std::string_view salt, std::span<const std::int32_t> tokens) {
  std::vector<ChunkKey> out;
  ChunkKey key = root_key(salt);
  for (; tokens.size() >= kChunkTokens; tokens = tokens.subspan(kChunkTokens)) {
    out.push_back(key = child_key(key, tokens.first(kChunkTokens)));
  }
  return out;
}

}  // namespace flash_mla::kv
