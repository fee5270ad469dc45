#define XXH_INLINE_ALL
#include <fmt/format.h>
#include <xxhash.h>

#include <array>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "flash_mla/error.h"
#include "kv/kv_tier.h"
#include "kv/lmcache/client.h"

// LMCache's multi-process server as a tier: calls by gRPC, bytes through its pool of POSIX shared memory. The server keeps
// chunks in its memory and in whatever stores it was given (Redis, files, ...), and knows them by their tokens.

namespace flash_mla::kv {
namespace {

using Tokens = std::span<const std::int32_t>;

/// What lies behind a chunk's bytes in its slot: a checksum of them, of the salt and of all tokens up to its end.
using Seal = std::array<std::uint64_t, 2>;

Seal seal_of(std::string_view salt, Tokens tokens, std::span<const std::byte> bytes) {
  XXH3_state_t state;
  XXH3_128bits_reset(&state);
  XXH3_128bits_update(&state, salt.data(), salt.size());
  XXH3_128bits_update(&state, tokens.data(), tokens.size_bytes());
  XXH3_128bits_update(&state, bytes.data(), bytes.size());
  const XXH128_hash_t hash = XXH3_128bits_digest(&state);
  return {hash.high64, hash.low64};
}

/// What the bytes of a chunk are to the server: those of a model of its own name, in which the salt is, rows of bytes with
/// room for the seal; or what vLLM stores under the name of config.shared.
LmCacheLayout layout_of(const TierConfig& config) {
  if (!config.shared.model.empty()) {
    constexpr std::int64_t kWidth = 576;
    return {config.shared.model, config.shared.layers, kWidth, "bfloat16"};
  }
  const ChunkKey key = root_key(config.salt);
  return {fmt::format("flash_mla-{:016x}{:016x}", key.high, key.low), 1,
          static_cast<std::int64_t>((config.chunk_bytes + sizeof(Seal) + kChunkTokens - 1) / kChunkTokens),
          "uint8"};
}

/// Bytes in a slot and out of it.
class Slot {
 public:
  explicit Slot(const TierConfig& config) : config_(config) {}

  void write(std::span<std::byte> slot, Tokens tokens, const Buffer& bytes) const {
    check(slot);
    std::memcpy(slot.data(), bytes.data(), config_.chunk_bytes);
    if (!sealed()) return;
    const Seal seal = seal_of(config_.salt, tokens, {bytes.data(), config_.chunk_bytes});
    std::memcpy(slot.data() + config_.chunk_bytes, &seal, sizeof(seal));
  }
  /// Without data if it is not what was stored. It is copied before it is checked: others can write to the pool.
  Buffer read(std::span<const std::byte> slot, Tokens tokens) const {
    check(slot);
    Buffer bytes = config_.allocate();
    std::memcpy(bytes.data(), slot.data(), config_.chunk_bytes);
    if (!sealed()) return bytes;
    Seal seal{};
    std::memcpy(&seal, slot.data() + config_.chunk_bytes, sizeof(seal));
    if (seal != seal_of(config_.salt, tokens, {bytes.data(), config_.chunk_bytes})) return {};
    return bytes;
  }

 private:
  bool sealed() const { return config_.shared.model.empty(); }
  void check(std::span<const std::byte> slot) const {
    const std::size_t needed = config_.chunk_bytes + (sealed() ? sizeof(Seal) : 0);
    if (slot.size() < needed) {
      throw std::runtime_error(fmt::format("LMCache: a slot has {} bytes, expected {}", slot.size(), needed));
    }
  }

  const TierConfig config_;
};

/// What tier and matches share: a match may outlive the tier.
struct Server {
  Server(const std::string& address, const TierConfig& config)
      : client(address, layout_of(config)), slot(config) {}
  LmCacheClient client;
  Slot slot;
};

/// What the server has locked for one look-up, and its session.
class LmCacheMatch : public TierMatch {
 public:
  LmCacheMatch(std::shared_ptr<Server> server, Tokens tokens)
      : server_(std::move(server)),
        pool_(server_->client.pool()),
        tokens_(tokens.begin(), tokens.end()),
        request_(server_->client.new_request()),
        num_chunks_(server_->client.look_up(request_, tokens)) {}
  ~LmCacheMatch() override {
    try {
      LmCacheClient& client = server_->client;
      if (!slots_.empty()) client.commit_retrieve(request_, tokens_, first_, num_chunks_);
      const std::int64_t unread = slots_.empty() ? num_chunks_ : first_;
      if (unread > 0) client.free_locks(request_, tokens_, unread);
      client.end_session(request_);
    } catch (const std::exception&) {
      // The server lets go of them by itself after a while.
    }
  }
  LmCacheMatch(const LmCacheMatch&) = delete;
  LmCacheMatch& operator=(const LmCacheMatch&) = delete;

  std::int64_t num_chunks() const override { return num_chunks_; }

  /// All chunks from the first that is read on are fetched with it.
  Buffer read(std::int64_t chunk) override {
    if (first_ < 0) {
      first_ = chunk;
      slots_ = server_->client.prepare_retrieve(request_, tokens_, chunk, num_chunks_, *pool_);
    }
    const auto place = static_cast<std::size_t>(chunk - first_);
    if (chunk < first_ || place >= slots_.size()) return {};
    const auto end = static_cast<std::size_t>((chunk + 1) * kChunkTokens);
    return server_->slot.read(slots_[place], Tokens(tokens_).first(end));
  }

 private:
  std::shared_ptr<Server> server_;
  std::shared_ptr<SharedPool> pool_;
  std::vector<std::int32_t> tokens_;
  std::string request_;
  std::int64_t num_chunks_;
  std::int64_t first_ = -1;                  // chunk of the first slot; -1: none is known yet
  std::vector<std::span<std::byte>> slots_;  // of [first_, num_chunks_)
};

class LmCacheTier : public KvTier {
 public:
  LmCacheTier(const std::string& address, const TierConfig& config)
      : server_(std::make_shared<Server>(address, config)) {}

  const char* name() const override { return "lmcache"; }

  std::unique_ptr<TierMatch> look_up(Tokens tokens) override {
    if (std::ssize(tokens) < kChunkTokens) return nullptr;
    auto match = std::make_unique<LmCacheMatch>(server_, tokens);
    return match->num_chunks() > 0 ? std::move(match) : nullptr;
  }

  bool store(Tokens tokens, const Buffer& bytes) override {
    LmCacheClient& client = server_->client;
    const std::shared_ptr<SharedPool> pool = client.pool();
    const std::string request = client.new_request();
    const auto slots = client.prepare_store(request, tokens, *pool);
    bool stored = true;  // or it is there already
    if (!slots.empty()) {
      server_->slot.write(slots.front(), tokens, bytes);
      stored = client.commit_store(request, tokens);
    }
    client.end_session(request);
    return stored;
  }

 private:
  std::shared_ptr<Server> server_;
};

}  // namespace

std::string why_no_lmcache() { return {}; }

std::unique_ptr<KvTier> make_lmcache_tier(const std::string& address, const TierConfig& config) {
  constexpr std::size_t kRowBytes = std::size_t{576} * 2;
  const auto layers = static_cast<std::size_t>(config.shared.layers);
  if (!config.shared.model.empty() && config.chunk_bytes != layers * kChunkTokens * kRowBytes) {
    throw InvalidArgument(
        fmt::format("kv_shared: a chunk has {} bytes, expected {}: {} layers of 576 bfloat16",
                    config.chunk_bytes, layers * kChunkTokens * kRowBytes, layers));
  }
  return std::make_unique<LmCacheTier>(address, config);
}

}  // namespace flash_mla::kv
