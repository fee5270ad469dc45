#include "kv/lmcache/client.h"

#include <fmt/format.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>
#include <utility>

#include "kv/kv_tier.h"
#include "lmcache.grpc.pb.h"

namespace flash_mla::kv {
namespace {

namespace wire = lmcache::mp;
using std::chrono::milliseconds;
using Slots = std::vector<std::span<std::byte>>;
using Tokens = std::span<const std::int32_t>;

// A call that takes longer has failed. What a store of the server's has not brought by then is a miss.
constexpr milliseconds kCall{2000}, kPrefetch{5000};
constexpr milliseconds kPause{1000};

std::int64_t random_instance() {
  std::random_device random;
  return static_cast<std::int64_t>((std::uint64_t{random()} << 31) ^ random());
}

/// Of chunks [first, last) of `tokens`. The server names chunks by all tokens before their ends.
wire::IpcCacheServerKey key_of(const LmCacheLayout& layout, const std::string& request, Tokens tokens,
                               std::int64_t first, std::int64_t last) {
  const Tokens until = tokens.first(static_cast<std::size_t>(last * kChunkTokens));
  wire::IpcCacheServerKey out;
  out.set_model_name(layout.model);
  out.set_world_size(1);
  out.mutable_token_ids()->Add(until.begin(), until.end());
  out.set_start(first * kChunkTokens);
  out.set_end(last * kChunkTokens);
  out.set_request_id(request);
  out.set_num_kv_readers(1);
  return out;
}

/// The same where bytes move.
wire::IpcCacheServerKey moving_key_of(const LmCacheLayout& layout, const std::string& request, Tokens tokens,
                                      std::int64_t first, std::int64_t last) {
  wire::IpcCacheServerKey out = key_of(layout, request, tokens, first, last);
  out.set_worker_id(0);
  return out;
}

/// Slots that a context in MessagePack names: {"slots": [{"offset", "length", ...}], ...}.
Slots slots_of(const std::string& context, const SharedPool& pool) {
  Slots out;
  const nlohmann::json parsed = nlohmann::json::from_msgpack(context);
  for (const nlohmann::json& slot : parsed.at("slots")) {
    out.push_back(pool.slot(slot.at("offset").get<std::size_t>(), slot.at("length").get<std::size_t>()));
  }
  return out;
}

/// A server that has been away is found again within a second: gRPC would wait for up to two minutes.
std::shared_ptr<grpc::Channel> channel_to(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 500);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

}  // namespace

struct LmCacheClient::Stubs {
  explicit Stubs(const std::string& address)
      : channel(channel_to(address)),
        transfers(wire::EngineDrivenService::NewStub(channel)),
        lookups(wire::LookupService::NewStub(channel)) {}
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<wire::EngineDrivenService::Stub> transfers;
  std::unique_ptr<wire::LookupService::Stub> lookups;
};

LmCacheClient::LmCacheClient(const std::string& address, LmCacheLayout layout)
    : layout_(std::move(layout)), instance_(random_instance()), stubs_(std::make_unique<Stubs>(address)) {}

LmCacheClient::~LmCacheClient() {
  if (!pool_) return;
  wire::UnregisterKvCacheEngineDrivenContextRequest request;
  wire::UnregisterKvCacheEngineDrivenContextResponse answer;
  request.set_instance_id(instance_);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kCall);
  stubs_->transfers->UnregisterKvCacheEngineDrivenContext(&context, request, &answer);
}

void LmCacheClient::failed() {
  const std::lock_guard lock(mutex_);
  pool_.reset();
  pause_end_ = std::chrono::steady_clock::now() + kPause;
}

template <class Stub, class Method, class Request, class Answer>
void LmCacheClient::call(Stub& stub, Method method, const Request& request, Answer& answer,
                         milliseconds limit) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + limit);
  const grpc::Status status = (stub.*method)(&context, request, &answer);
  if (status.ok()) return;
  failed();
  throw std::runtime_error(fmt::format("LMCache: {}", status.error_message()));
}

std::shared_ptr<SharedPool> LmCacheClient::pool() {
  {
    const std::lock_guard lock(mutex_);
    if (pool_) return pool_;
    if (std::chrono::steady_clock::now() < pause_end_)
      throw std::runtime_error("LMCache: no answer a moment ago");
  }
  wire::RegisterKvCacheEngineDrivenContextRequest request;
  request.set_instance_id(instance_);
  request.set_model_name(layout_.model);
  request.set_world_size(1);
  request.set_block_size(kPageSize);
  request.set_num_layers(layout_.layers);
  request.set_hidden_dim_size(layout_.width);
  request.set_dtype_str(layout_.dtype);
  request.set_use_mla(true);
  wire::RegisterKvCacheEngineDrivenContextResponse answer;
  call(*stubs_->transfers, &wire::EngineDrivenService::Stub::RegisterKvCacheEngineDrivenContext, request,
       answer, kCall);
  try {
    auto pool = std::make_shared<SharedPool>(answer.shm_name(), answer.pool_size());
    const std::lock_guard lock(mutex_);
    return pool_ = std::move(pool);
  } catch (const std::exception&) {
    failed();
    throw;
  }
}

std::string LmCacheClient::new_request() {
  const std::lock_guard lock(mutex_);
  return fmt::format("flash_mla-{:x}-{}", instance_, ++num_requests_);
}

std::int64_t LmCacheClient::look_up(const std::string& request, Tokens tokens) {
  const std::int64_t chunks = std::ssize(tokens) / kChunkTokens;
  wire::LookupRequest ask;
  *ask.mutable_key() = key_of(layout_, request, tokens, 0, chunks);
  ask.set_tp_size(1);
  wire::LookupResponse begun;
  call(*stubs_->lookups, &wire::LookupService::Stub::Lookup, ask, begun, kCall);
  wire::WaitPrefetchStatusRequest wait;
  wait.set_request_id(request);
  wait.set_timeout(std::chrono::duration<double>(kPrefetch).count());
  wire::WaitPrefetchStatusResponse found;
  call(*stubs_->lookups, &wire::LookupService::Stub::WaitPrefetchStatus, wait, found, kPrefetch + kCall);
  return found.has_chunk_count() ? std::clamp<std::int64_t>(found.chunk_count(), 0, chunks) : 0;
}

Slots LmCacheClient::prepare_retrieve(const std::string& request, Tokens tokens, std::int64_t first,
                                      std::int64_t last, const SharedPool& pool) {
  wire::PrepareRetrieveRequest prepare;
  *prepare.mutable_key() = moving_key_of(layout_, request, tokens, first, last);
  prepare.set_instance_id(instance_);
  wire::PrepareRetrieveResponse prepared;
  call(*stubs_->transfers, &wire::EngineDrivenService::Stub::PrepareRetrieve, prepare, prepared, kCall);
  return prepared.success() ? slots_of(prepared.encoded_context(), pool) : Slots{};
}

void LmCacheClient::commit_retrieve(const std::string& request, Tokens tokens, std::int64_t first,
                                    std::int64_t last) {
  wire::CommitRetrieveRequest commit;
  *commit.mutable_key() = moving_key_of(layout_, request, tokens, first, last);
  commit.set_instance_id(instance_);
  wire::CommitRetrieveResponse committed;
  call(*stubs_->transfers, &wire::EngineDrivenService::Stub::CommitRetrieve, commit, committed, kCall);
}

void LmCacheClient::free_locks(const std::string& request, Tokens tokens, std::int64_t last) {
  wire::FreeLookupLocksRequest release;
  *release.mutable_key() = key_of(layout_, request, tokens, 0, last);
  release.set_tp_size(1);
  wire::FreeLookupLocksResponse released;
  call(*stubs_->lookups, &wire::LookupService::Stub::FreeLookupLocks, release, released, kCall);
}

void LmCacheClient::end_session(const std::string& request) {
  wire::EndSessionRequest over;
  over.set_request_id(request);
  wire::EndSessionResponse ended;
  call(*stubs_->lookups, &wire::LookupService::Stub::EndSession, over, ended, kCall);
}

Slots LmCacheClient::prepare_store(const std::string& request, Tokens tokens, const SharedPool& pool) {
  const std::int64_t last = std::ssize(tokens) / kChunkTokens;
  wire::PrepareStoreRequest prepare;
  *prepare.mutable_key() = moving_key_of(layout_, request, tokens, last - 1, last);
  prepare.set_instance_id(instance_);
  wire::PrepareStoreResponse prepared;
  call(*stubs_->transfers, &wire::EngineDrivenService::Stub::PrepareStore, prepare, prepared, kCall);
  return slots_of(prepared.encoded_context(), pool);
}

bool LmCacheClient::commit_store(const std::string& request, Tokens tokens) {
  const std::int64_t last = std::ssize(tokens) / kChunkTokens;
  wire::CommitStoreRequest commit;
  *commit.mutable_key() = moving_key_of(layout_, request, tokens, last - 1, last);
  commit.set_instance_id(instance_);
  wire::CommitStoreResponse committed;
  call(*stubs_->transfers, &wire::EngineDrivenService::Stub::CommitStore, commit, committed, kCall);
  return committed.success();
}

}  // namespace flash_mla::kv
