#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/buffer.h"
#include "base/page_size.h"

namespace flash_mla::kv {

/// Tokens of a chunk: what a tier keeps as one. A chunk is known by all tokens up to its end.
inline constexpr std::int64_t kChunkTokens = 256;
inline constexpr int kChunkPages = static_cast<int>(kChunkTokens / kPageSize);

/// What a tier has of a prompt. It may hold memory of the tier's, or a session with a server.
class TierMatch {
 public:
  virtual ~TierMatch() = default;
  /// Leading chunks of the prompt.
  virtual std::int64_t num_chunks() const = 0;
  /// The bytes of one, 0 <= chunk < num_chunks(). Without data: it is gone, or not what was stored.
  virtual Buffer read(std::int64_t chunk) = 0;
};

/// A place beyond the cache where pages are kept: host memory, files, a server. Its calls may take their time and fail:
/// they are made by threads that no step waits for, several at once, and what one throws counts as a miss.
class KvTier {
 public:
  virtual ~KvTier() = default;
  /// In metrics: "ram", "file", ...
  virtual const char* name() const = 0;
  /// What it has of the whole chunks of `tokens`; null: nothing.
  virtual std::unique_ptr<TierMatch> look_up(std::span<const std::int32_t> tokens) = 0;
  /// Keeps the last chunk of `tokens`, a multiple of kChunkTokens. `bytes` does not change any more and may be kept as
  /// it is. False: it could not.
  virtual bool store(std::span<const std::int32_t> tokens, const Buffer& bytes) = 0;
};

/// A form of chunks that other engines know, too: vLLM's of an MLA model, (layers, kChunkTokens, 576) bfloat16.
struct SharedForm {
  std::string model;  ///< its name there; empty: chunks are this library's own
  int layers = 0;
};

/// What all tiers of an engine are made with.
struct TierConfig {
  /// Of model, cache and format, in words: chunks of other words are never found.
  std::string salt;
  std::size_t chunk_bytes = 0;
  /// Memory for a chunk, from and to which the device copies fast.
  std::function<Buffer()> allocate;
  /// Of a server that keeps chunks of other engines, too.
  SharedForm shared = {};
};

/// Throws InvalidArgument unless each of `specs` is "ram:SIZE", "file:DIRECTORY,SIZE" or "lmcache://HOST:PORT"; sizes are
/// bytes or have a unit (4GiB, or 4GB for the same). `shared`: one of them must be such a server. Throws Unsupported where this
/// build has no such client.
void check_tiers(std::span<const std::string> specs, bool shared = false);

/// The tiers that `specs` name, in their order. Throws InvalidArgument as check_tiers does, for sizes below one chunk, and
/// where a directory cannot be written to.
std::vector<std::unique_ptr<KvTier>> make_tiers(std::span<const std::string> specs, const TierConfig& config);

/// Chunks in the host's memory, at most `bytes` of them and of their tokens; those used longest ago go first.
std::unique_ptr<KvTier> make_ram_tier(std::size_t bytes, const TierConfig& config);

/// Chunks in files of a directory, at most `bytes` of them; those used longest ago go first. Several engines and several
/// models may share the directory, at the same time and one after another: it keeps no state but the files. A file that is
/// torn or has been changed is a miss, and removed. Throws InvalidArgument if the directory cannot be made or written to.
std::unique_ptr<KvTier> make_file_tier(const std::string& directory, std::size_t bytes,
                                       const TierConfig& config);

/// Chunks at LMCache's multi-process server of this machine, "HOST:PORT", which keeps them in its memory and in stores of its
/// own, and gives them to every engine of the model. Under a salt of this library's a chunk has a checksum, of all tokens up
/// to its end too: what has been changed is a miss. With config.shared it has none, for others do not write it. Throws
/// InvalidArgument for chunks of another size than config.shared says. Nothing is asked yet: a server that is not there yet,
/// or goes away, is a miss.
std::unique_ptr<KvTier> make_lmcache_tier(const std::string& address, const TierConfig& config);
/// Empty: this build has it.
std::string why_no_lmcache();

/// A chunk's name.
struct ChunkKey {
  std::uint64_t high = 0, low = 0;
  bool operator==(const ChunkKey&) const = default;
};
struct ChunkKeyHash {
  std::size_t operator()(const ChunkKey& key) const { return key.low; }
};

/// The key of no tokens.
ChunkKey root_key(std::string_view salt);
/// The key of the chunk of `tokens` behind one with the key `parent`.
ChunkKey child_key(const ChunkKey& parent, std::span<const std::int32_t> tokens);
/// Of all whole chunks of `tokens`.
std::vector<ChunkKey> chunk_keys(std::string_view salt, std::span<const std::int32_t> tokens);

}  // namespace flash_mla::kv
