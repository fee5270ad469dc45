#include <fcntl.h>
#include <fmt/format.h>
#include <grpcpp/grpcpp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>
#include <utility>

#include "kv/kv_tier.h"
#include "lmcache.grpc.pb.h"

// LMCache's multi-process server: calls by gRPC, bytes through its pool of POSIX shared memory. The server keeps chunks in
// its memory and in whatever stores it was given (Redis, files, ...), and knows them by their tokens.

namespace flash_mla::kv {
namespace {

namespace wire = lmcache::mp;
using std::chrono::milliseconds;

// A call that takes longer has failed. What a store of the server's has not brought by then is a miss.
constexpr milliseconds kCall{2000}, kPrefetch{5000};
// After a failure the server is not asked for so long: it may be gone.
constexpr milliseconds kPause{1000};

/// The server's pool, as it was when an engine registered. It stays mapped as long as somebody reads it.
class SharedPool {
 public:
  SharedPool(const std::string& name, std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)) {
    if (name.empty() || bytes <= 0) {
      throw std::runtime_error(
          "the server has no pool of shared memory (--supported-transfer-mode engine_driven, --shm-name)");
    }
    const int file = shm_open((name.front() == '/' ? name : "/" + name).c_str(), O_RDWR | O_CLOEXEC, 0);
    if (file < 0)
      throw std::runtime_error(
          fmt::format("shared memory {} cannot be opened: is the server on this machine?", name));
    struct stat status {};
    const bool whole = fstat(file, &status) == 0 && status.st_size >= bytes;
    void* const data =
        whole ? mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
    ::close(file);
    if (data == MAP_FAILED) throw std::runtime_error(fmt::format("shared memory {} cannot be mapped", name));
    data_ = static_cast<std::byte*>(data);
  }
  ~SharedPool() { munmap(data_, bytes_); }
  SharedPool(const SharedPool&) = delete;
  SharedPool& operator=(const SharedPool&) = delete;

  std::span<std::byte> slot(std::size_t offset, std::size_t length) const {
    if (offset > bytes_ || length > bytes_ - offset) throw std::runtime_error("a slot lies outside the pool");
    return {data_ + offset, length};
  }

 private:
  std::size_t bytes_;
  std::byte* data_ = nullptr;
};

/// What lies behind a chunk's bytes in its slot: a checksum of them, of the salt and of all tokens up to its end.
using Seal = std::array<std::uint64_t, 2>;

Seal seal_of(std::string_view salt, std::span<const std::int32_t> tokens, std::span<const std::byte> bytes) {
  XXH3_state_t state;
  XXH3_128bits_reset(&state);
  XXH3_128bits_update(&state, salt.data(), salt.size());
  XXH3_128bits_update(&state, tokens.data(), tokens.size_bytes());
  XXH3_128bits_update(&state, bytes.data(), bytes.size());
  const XXH128_hash_t hash = XXH3_128bits_digest(&state);
  return {hash.high64, hash.low64};
}

struct Slots {
  std::vector<std::span<std::byte>> slots;
  std::vector<std::int64_t> chunks;
};

/// What tier and matches share: a match may outlive the tier.
class Client : public std::enable_shared_from_this<Client> {
 public:
  Client(const std::string& address, TierConfig config)
      : config_(std::move(config)),
        model_(
            fmt::format("flash_mla-{:016x}{:016x}", root_key(config_.salt).high, root_key(config_.salt).low)),
        row_bytes_((config_.chunk_bytes + sizeof(Seal) + kChunkTokens - 1) / kChunkTokens),
        channel_(grpc::CreateChannel(address, grpc::InsecureChannelCredentials())),
        transfers_(wire::EngineDrivenService::NewStub(channel_)),
        lookups_(wire::LookupService::NewStub(channel_)) {
    std::random_device random;
    instance_ = static_cast<std::int64_t>((std::uint64_t{random()} << 31) ^ random());
  }
  ~Client() {
    if (!pool_) return;
    wire::UnregisterKvCacheEngineDrivenContextRequest request;
    wire::UnregisterKvCacheEngineDrivenContextResponse answer;
    request.set_instance_id(instance_);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kCall);
    transfers_->UnregisterKvCacheEngineDrivenContext(&context, request, &answer);
  }

  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  std::unique_ptr<TierMatch> look_up(std::span<const std::int32_t> tokens);
  bool store(std::span<const std::int32_t> tokens, const Buffer& bytes);

  /// One call; throws where it fails, and has the engine register anew.
  template <class Stub, class Request, class Answer>
  void call(Stub& stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Answer*),
            const Request& request, Answer& answer, milliseconds limit = kCall);
  wire::IpcCacheServerKey key(std::span<const std::int32_t> tokens, std::int64_t begin, std::int64_t end,
                              const std::string& request) const;
  /// Slots of a context, each of a chunk's size.
  Slots read_slots(const std::string& encoded, const SharedPool& pool) const;
  /// A copy of a chunk from its slot; without data if it is not what was stored.
  Buffer open(std::span<const std::byte> slot, std::span<const std::int32_t> tokens) const;

  wire::EngineDrivenService::Stub& transfers() { return *transfers_; }
  wire::LookupService::Stub& lookups() { return *lookups_; }
  std::int64_t instance() const { return instance_; }

 private:
  std::shared_ptr<SharedPool> registered_pool();
  std::string new_request() { return fmt::format("{:x}-{}", instance_, ++num_requests_); }
  void failed();

  const TierConfig config_;
  const std::string model_;
  const std::size_t row_bytes_;  // of a token in a slot
  std::int64_t instance_ = 0;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<wire::EngineDrivenService::Stub> transfers_;
  std::unique_ptr<wire::LookupService::Stub> lookups_;
  std::atomic<std::int64_t> num_requests_ = 0;
  std::mutex mutex_;  // of what follows
  std::shared_ptr<SharedPool> pool_;
  std::chrono::steady_clock::time_point pause_end_{};
};

/// What the server has locked for one look-up.
class LmCacheMatch : public TierMatch {
 public:
  LmCacheMatch(std::shared_ptr<Client> client, std::shared_ptr<SharedPool> pool,
               std::span<const std::int32_t> tokens, std::string request, std::int64_t chunks)
      : client_(std::move(client)),
        pool_(std::move(pool)),
        tokens_(tokens.begin(), tokens.end()),
        request_(std::move(request)),
        num_chunks_(chunks) {}
  ~LmCacheMatch() override;
  LmCacheMatch(const LmCacheMatch&) = delete;
  LmCacheMatch& operator=(const LmCacheMatch&) = delete;

  std::int64_t num_chunks() const override { return num_chunks_; }
  void set_num_chunks(std::int64_t chunks) { num_chunks_ = chunks; }
  Buffer read(std::int64_t chunk) override;

 private:
  wire::IpcCacheServerKey key(std::int64_t first, std::int64_t last, bool moves) const;

  std::shared_ptr<Client> client_;
  std::shared_ptr<SharedPool> pool_;
  std::vector<std::int32_t> tokens_;
  std::string request_;
  std::int64_t num_chunks_;
  std::int64_t first_ = -1;  // chunk of the first slot; -1: none are known yet
  Slots slots_;
};

void Client::failed() {
  const std::lock_guard lock(mutex_);
  pool_.reset();
  pause_end_ = std::chrono::steady_clock::now() + kPause;
}

template <class Stub, class Request, class Answer>
void Client::call(Stub& stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Answer*),
                  const Request& request, Answer& answer, milliseconds limit) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + limit);
  const grpc::Status status = (stub.*method)(&context, request, &answer);
  if (status.ok()) return;
  failed();
  throw std::runtime_error(fmt::format("LMCache: {}", status.error_message()));
}

// The engine introduces itself at the first call, and after each failure: the server may be another one by then.
std::shared_ptr<SharedPool> Client::registered_pool() {
  {
    const std::lock_guard lock(mutex_);
    if (pool_) return pool_;
    if (std::chrono::steady_clock::now() < pause_end_)
      throw std::runtime_error("LMCache: no answer a moment ago");
  }
  wire::RegisterKvCacheEngineDrivenContextRequest request;
  request.set_instance_id(instance_);
  request.set_model_name(model_);
  request.set_world_size(1);
  request.set_block_size(kPageSize);
  // Bytes of our own: whatever rows a cache has, they are (1, tokens of a chunk, bytes of a token) here.
  request.set_num_layers(1);
  request.set_hidden_dim_size(static_cast<std::int64_t>(row_bytes_));
  request.set_dtype_str("uint8");
  request.set_use_mla(true);
  wire::RegisterKvCacheEngineDrivenContextResponse answer;
  call(transfers(), &wire::EngineDrivenService::Stub::RegisterKvCacheEngineDrivenContext, request, answer);
  try {
    auto pool = std::make_shared<SharedPool>(answer.shm_name(), answer.pool_size());
    const std::lock_guard lock(mutex_);
    return pool_ = std::move(pool);
  } catch (const std::exception&) {
    failed();
    throw;
  }
}

wire::IpcCacheServerKey Client::key(std::span<const std::int32_t> tokens, std::int64_t begin,
                                    std::int64_t end, const std::string& request) const {
  wire::IpcCacheServerKey out;
  out.set_model_name(model_);
  out.set_world_size(1);
  out.mutable_token_ids()->Add(tokens.begin(), tokens.end());
  out.set_start(begin);
  out.set_end(end);
  out.set_request_id(request);
  out.set_num_kv_readers(1);
  return out;
}

Slots Client::read_slots(const std::string& encoded, const SharedPool& pool) const {
  const nlohmann::json context = nlohmann::json::from_msgpack(encoded);
  Slots out;
  for (const nlohmann::json& slot : context.at("slots")) {
    const auto length = slot.at("length").get<std::size_t>();
    if (length < config_.chunk_bytes + sizeof(Seal)) throw std::runtime_error("LMCache: a slot is too small");
    out.slots.push_back(pool.slot(slot.at("offset").get<std::size_t>(), length));
  }
  if (context.contains("chunk_indices"))
    out.chunks = context.at("chunk_indices").get<std::vector<std::int64_t>>();
  return out;
}

Buffer Client::open(std::span<const std::byte> slot, std::span<const std::int32_t> tokens) const {
  // Copied before it is checked: another process can write to the pool.
  Buffer bytes = config_.allocate();
  std::memcpy(bytes.data(), slot.data(), config_.chunk_bytes);
  Seal seal{};
  std::memcpy(&seal, slot.data() + config_.chunk_bytes, sizeof(seal));
  if (seal != seal_of(config_.salt, tokens, {bytes.data(), config_.chunk_bytes})) return {};
  return bytes;
}

std::unique_ptr<TierMatch> Client::look_up(std::span<const std::int32_t> tokens) {
  const std::shared_ptr<SharedPool> pool = registered_pool();
  const auto whole = std::ssize(tokens) / kChunkTokens * kChunkTokens;
  if (whole == 0) return nullptr;
  const std::string request = new_request();
  wire::LookupRequest ask;
  *ask.mutable_key() = key(tokens.first(static_cast<std::size_t>(whole)), 0, whole, request);
  ask.set_tp_size(1);
  wire::LookupResponse begun;
  call(lookups(), &wire::LookupService::Stub::Lookup, ask, begun);
  // From here on there is a session, which the match ends.
  auto match = std::make_unique<LmCacheMatch>(shared_from_this(), pool, tokens, request, 0);
  wire::WaitPrefetchStatusRequest wait;
  wait.set_request_id(request);
  wait.set_timeout(std::chrono::duration<double>(kPrefetch).count());
  wire::WaitPrefetchStatusResponse found;
  call(lookups(), &wire::LookupService::Stub::WaitPrefetchStatus, wait, found, kPrefetch + kCall);
  const std::int64_t chunks =
      found.has_chunk_count() ? std::clamp<std::int64_t>(found.chunk_count(), 0, whole / kChunkTokens) : 0;
  if (chunks == 0) return nullptr;
  match->set_num_chunks(chunks);
  return match;
}

bool Client::store(std::span<const std::int32_t> tokens, const Buffer& bytes) {
  const std::shared_ptr<SharedPool> pool = registered_pool();
  const std::int64_t end = std::ssize(tokens);
  const std::string request = new_request();
  wire::PrepareStoreRequest prepare;
  *prepare.mutable_key() = key(tokens, end - kChunkTokens, end, request);
  prepare.mutable_key()->set_worker_id(0);
  prepare.set_instance_id(instance_);
  wire::PrepareStoreResponse prepared;
  call(transfers(), &wire::EngineDrivenService::Stub::PrepareStore, prepare, prepared);
  const Slots slots = read_slots(prepared.encoded_context(), *pool);
  if (!slots.slots.empty()) {
    const std::span<std::byte> slot = slots.slots.front();
    const Seal seal = seal_of(config_.salt, tokens, {bytes.data(), config_.chunk_bytes});
    std::memcpy(slot.data(), bytes.data(), config_.chunk_bytes);
    std::memcpy(slot.data() + config_.chunk_bytes, &seal, sizeof(seal));
    wire::CommitStoreRequest commit;
    *commit.mutable_key() = prepare.key();
    commit.set_instance_id(instance_);
    wire::CommitStoreResponse committed;
    call(transfers(), &wire::EngineDrivenService::Stub::CommitStore, commit, committed);
    if (!committed.success()) return false;
  }
  wire::EndSessionRequest over;
  over.set_request_id(request);
  wire::EndSessionResponse ended;
  call(lookups(), &wire::LookupService::Stub::EndSession, over, ended);
  return true;
}

wire::IpcCacheServerKey LmCacheMatch::key(std::int64_t first, std::int64_t last, bool moves) const {
  const auto tokens = std::span(tokens_).first(static_cast<std::size_t>(last * kChunkTokens));
  wire::IpcCacheServerKey out = client_->key(tokens, first * kChunkTokens, last * kChunkTokens, request_);
  if (moves) out.set_worker_id(0);
  return out;
}

Buffer LmCacheMatch::read(std::int64_t chunk) {
  if (first_ < 0) {
    first_ = chunk;
    wire::PrepareRetrieveRequest prepare;
    *prepare.mutable_key() = key(chunk, num_chunks_, /*moves=*/true);
    prepare.set_instance_id(client_->instance());
    wire::PrepareRetrieveResponse prepared;
    client_->call(client_->transfers(), &wire::EngineDrivenService::Stub::PrepareRetrieve, prepare, prepared);
    if (prepared.success()) slots_ = client_->read_slots(prepared.encoded_context(), *pool_);
  }
  const auto place = static_cast<std::size_t>(chunk - first_);
  if (chunk < first_ || place >= slots_.slots.size()) return {};
  return client_->open(slots_.slots[place],
                       std::span(tokens_).first(static_cast<std::size_t>((chunk + 1) * kChunkTokens)));
}

LmCacheMatch::~LmCacheMatch() {
  try {
    if (!slots_.slots.empty()) {
      wire::CommitRetrieveRequest commit;
      *commit.mutable_key() = key(first_, num_chunks_, /*moves=*/true);
      commit.set_instance_id(client_->instance());
      wire::CommitRetrieveResponse committed;
      client_->call(client_->transfers(), &wire::EngineDrivenService::Stub::CommitRetrieve, commit,
                    committed);
    }
    if (const std::int64_t locked = slots_.slots.empty() ? num_chunks_ : first_; locked > 0) {
      wire::FreeLookupLocksRequest release;
      *release.mutable_key() = key(0, locked, /*moves=*/false);
      release.set_tp_size(1);
      wire::FreeLookupLocksResponse released;
      client_->call(client_->lookups(), &wire::LookupService::Stub::FreeLookupLocks, release, released);
    }
    wire::EndSessionRequest over;
    over.set_request_id(request_);
    wire::EndSessionResponse ended;
    client_->call(client_->lookups(), &wire::LookupService::Stub::EndSession, over, ended);
  } catch (const std::exception&) {
    // The server lets go of them by itself after a while.
  }
}

class LmCacheTier : public KvTier {
 public:
  LmCacheTier(const std::string& address, const TierConfig& config)
      : client_(std::make_shared<Client>(address, config)) {}
  const char* name() const override { return "lmcache"; }
  std::unique_ptr<TierMatch> look_up(std::span<const std::int32_t> tokens) override {
    return client_->look_up(tokens);
  }
  bool store(std::span<const std::int32_t> tokens, const Buffer& bytes) override {
    return client_->store(tokens, bytes);
  }

 private:
  std::shared_ptr<Client> client_;
};

}  // namespace

std::unique_ptr<KvTier> make_lmcache_tier(const std::string& address, const TierConfig& config) {
  return std::make_unique<LmCacheTier>(address, config);
}

}  // namespace flash_mla::kv
