#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <string_view>
#include <thread>
#include <utility>

#include "base/aligned.h"
#include "base/buffer.h"
#include "flash_mla/error.h"
#include "transfer/nixl_library.h"
#include "transfer/page_transport.h"

// The decode side registers one region, which its landings are cut from, and describes it once; the prefill side copies
// pieces to registered memory of its own and writes that. The cache itself is never registered: a peer that writes where
// it may not spoils another landing at most, whose checksums then say so.

namespace flash_mla::transfer {
namespace {

constexpr const char* kPlugin = "UCX";
constexpr std::size_t kStagingBytes = std::size_t{8} << 20;
constexpr std::size_t kLandingAlignment = 4096;

void check(NixlStatus status, const char* call) {
  if (status < 0) throw TransferError(fmt::format("NIXL's {} failed with status {}", call, status));
}

/// A handle and what frees it.
template <class Free>
class Handle {
 public:
  explicit Handle(Free free) : free_(free) {}
  ~Handle() {
    if (handle_ != nullptr) free_(handle_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  NixlHandle* out() { return &handle_; }
  NixlHandle get() const { return handle_; }
  NixlHandle release() { return std::exchange(handle_, nullptr); }

 private:
  NixlHandle handle_ = nullptr;
  Free free_;
};

std::string random_agent_name() {
  std::random_device entropy;
  return fmt::format("flash-mla-{:08x}{:08x}", entropy(), entropy());
}

/// The agent of this process. Its calls are made one at a time.
class Agent {
 public:
  explicit Agent(const NixlLibrary& library) : library_(library) {
    check(library_.create_agent(random_agent_name().c_str(), &agent_), "create_agent");
    try {
      Handle memories(library_.destroy_mem_list), params(library_.destroy_params);
      check(library_.get_plugin_params(agent_, kPlugin, memories.out(), params.out()), "get_plugin_params");
      check(library_.create_backend(agent_, kPlugin, params.get(), &backend_), "create_backend");
    } catch (...) {
      library_.destroy_agent(agent_);
      throw;
    }
  }
  ~Agent() {
    library_.destroy_backend(backend_);
    library_.destroy_agent(agent_);
  }
  Agent(const Agent&) = delete;
  Agent& operator=(const Agent&) = delete;

  const NixlLibrary& library() const { return library_; }
  NixlHandle get() const { return agent_; }
  std::mutex& mutex() { return mutex_; }

  /// Memory stays registered until deregister(), which takes the list.
  NixlHandle register_memory(const Buffer& memory) {
    const std::lock_guard lock(mutex_);
    Handle list(library_.destroy_reg_dlist);
    check(library_.create_reg_dlist(kNixlHostMemory, list.out(), false), "create_reg_dlist");
    check(library_.reg_dlist_add_desc(list.get(), reinterpret_cast<std::uintptr_t>(memory.data()),
                                      memory.bytes(), 0, nullptr, 0),
          "reg_dlist_add_desc");
    Handle args(library_.destroy_opt_args);
    check(library_.create_opt_args(args.out()), "create_opt_args");
    check(library_.opt_args_add_backend(args.get(), backend_), "opt_args_add_backend");
    check(library_.register_mem(agent_, list.get(), args.get()), "register_mem");
    return list.release();
  }
  void deregister(NixlHandle list) {
    const std::lock_guard lock(mutex_);
    library_.deregister_mem(agent_, list, nullptr);
    library_.destroy_reg_dlist(list);
  }

 private:
  NixlLibrary library_;
  NixlHandle agent_ = nullptr, backend_ = nullptr;
  std::mutex mutex_;
};

/// The memory that landings are cut from.
class Region {
 public:
  Region(Agent& agent, std::size_t bytes)
      : agent_(agent), memory_(allocate_aligned(bytes)), registered_(agent.register_memory(memory_)) {
    free_.emplace(0, bytes);
  }
  ~Region() { agent_.deregister(registered_); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  std::size_t take(std::size_t bytes) {
    bytes = rounded(bytes);
    const std::lock_guard lock(mutex_);
    const auto place = std::ranges::find_if(free_, [&](const auto& gap) { return gap.second >= bytes; });
    if (place == free_.end()) {
      throw TransferError(
          fmt::format("of {} bytes for transfers no {} together are free", memory_.bytes(), bytes));
    }
    const auto [begin, size] = *place;
    free_.erase(place);
    if (size > bytes) free_.emplace(begin + bytes, size - bytes);
    return begin;
  }
  void give_back(std::size_t begin, std::size_t bytes) {
    bytes = rounded(bytes);
    const std::lock_guard lock(mutex_);
    auto place = free_.emplace(begin, bytes).first;
    if (const auto next = std::next(place); next != free_.end() && next->first == begin + bytes) {
      place->second += next->second;
      free_.erase(next);
    }
    if (place == free_.begin()) return;
    if (const auto before = std::prev(place); before->first + before->second == begin) {
      before->second += place->second;
      free_.erase(place);
    }
  }
  std::byte* at(std::size_t offset) const { return memory_.data() + offset; }

 private:
  static std::size_t rounded(std::size_t bytes) {
    return (std::max<std::size_t>(bytes, 1) + kLandingAlignment - 1) / kLandingAlignment * kLandingAlignment;
  }

  Agent& agent_;
  Buffer memory_;
  NixlHandle registered_;
  std::mutex mutex_;
  std::map<std::size_t, std::size_t> free_;  // begin to bytes
};

class NixlLanding : public Landing {
 public:
  NixlLanding(Region& region, std::size_t bytes)
      : region_(region),
        bytes_(bytes),
        begin_(region.take(bytes)),
        address_(fmt::format("{}", reinterpret_cast<std::uintptr_t>(region.at(begin_)))) {}
  ~NixlLanding() override { region_.give_back(begin_, bytes_); }
  NixlLanding(const NixlLanding&) = delete;
  NixlLanding& operator=(const NixlLanding&) = delete;

  const std::string& address() const override { return address_; }
  void read(std::size_t offset, std::span<std::byte> to) override {
    check_in_landing(offset, to.size(), bytes_, "a landing");
    std::memcpy(to.data(), region_.at(begin_ + offset), to.size());
  }

 private:
  Region& region_;
  std::size_t bytes_, begin_;
  std::string address_;
};

/// One write at a time, through registered memory of its own.
class NixlPeer : public Peer {
 public:
  NixlPeer(Agent& agent, const std::string& description)
      : agent_(agent),
        staging_(allocate_aligned(kStagingBytes)),
        registered_(agent.register_memory(staging_)) {
    const std::lock_guard lock(agent_.mutex());
    char* name = nullptr;
    const NixlStatus status =
        agent_.library().load_remote_md(agent_.get(), description.data(), description.size(), &name);
    if (name != nullptr) name_ = name;
    std::free(name);  // NOLINT(cppcoreguidelines-no-malloc): it is the library's
    if (status < 0 || name_.empty())
      throw TransferError(fmt::format("NIXL cannot use what the peer says of itself: status {}", status));
  }
  ~NixlPeer() override {
    {
      const std::lock_guard lock(agent_.mutex());
      agent_.library().invalidate_remote_md(agent_.get(), name_.c_str());
    }
    if (stuck_) {
      static_cast<void>(new Buffer(staging_));  // NOLINT: NIXL may read it for ever
    } else {
      agent_.deregister(registered_);
    }
  }
  NixlPeer(const NixlPeer&) = delete;
  NixlPeer& operator=(const NixlPeer&) = delete;

  std::unique_ptr<Target> open(const std::string& address, std::size_t bytes) override;

  /// Copies as many pieces as there is room for and writes them to addresses that begin at `base`.
  void write(std::span<const Piece> pieces, std::uintptr_t base, Clock::time_point deadline) {
    std::size_t filled = 0;
    std::vector<Piece> staged;
    const auto flush = [&] {
      if (!staged.empty()) post(staged, base, deadline);
      staged.clear();
      filled = 0;
    };
    for (Piece piece : pieces) {
      while (piece.bytes > 0) {
        if (filled == kStagingBytes) flush();
        const std::size_t now = std::min(piece.bytes, kStagingBytes - filled);
        std::memcpy(staging_.data() + filled, piece.from, now);
        staged.push_back({staging_.data() + filled, piece.offset, now});
        filled += now;
        piece = {piece.from + now, piece.offset + now, piece.bytes - now};
      }
    }
    flush();
  }

 private:
  void post(std::span<const Piece> staged, std::uintptr_t base, Clock::time_point deadline) {
    if (stuck_) throw TransferError("an earlier write to the peer has not ended");
    const NixlLibrary& nixl = agent_.library();
    Handle from(nixl.destroy_xfer_dlist), to(nixl.destroy_xfer_dlist);
    NixlHandle request = nullptr;
    NixlStatus status = 0;
    {
      const std::lock_guard lock(agent_.mutex());
      check(nixl.create_xfer_dlist(kNixlHostMemory, from.out(), false), "create_xfer_dlist");
      check(nixl.create_xfer_dlist(kNixlHostMemory, to.out(), false), "create_xfer_dlist");
      for (const Piece& piece : staged) {
        check(nixl.xfer_dlist_add_desc(from.get(), reinterpret_cast<std::uintptr_t>(piece.from), piece.bytes,
                                       0),
              "xfer_dlist_add_desc");
        check(nixl.xfer_dlist_add_desc(to.get(), base + piece.offset, piece.bytes, 0), "xfer_dlist_add_desc");
      }
      check(nixl.create_xfer_req(agent_.get(), kNixlWrite, from.get(), to.get(), name_.c_str(), &request,
                                 nullptr),
            "create_xfer_req");
      status = nixl.post_xfer_req(agent_.get(), request, nullptr);
    }
    for (int turn = 0; status == kNixlInProgress && Clock::now() < deadline; ++turn) {
      std::this_thread::sleep_for(std::chrono::microseconds(turn < 20 ? 50 : 500));
      const std::lock_guard lock(agent_.mutex());
      status = nixl.get_xfer_status(agent_.get(), request);
    }
    {
      const std::lock_guard lock(agent_.mutex());
      // Of a transfer that goes on it may refuse: then its memory stays.
      stuck_ = nixl.release_xfer_req(agent_.get(), request) < 0;
      if (!stuck_) nixl.destroy_xfer_req(request);
    }
    if (status == kNixlInProgress) throw TransferError("the time for the transfer is over");
    check(status, "transfer");
  }

  Agent& agent_;
  Buffer staging_;
  NixlHandle registered_;
  std::string name_;
  bool stuck_ = false;
};

class NixlTarget : public Target {
 public:
  NixlTarget(NixlPeer& peer, std::uintptr_t base, std::size_t bytes)
      : peer_(peer), base_(base), bytes_(bytes) {}

  void write(std::span<const Piece> pieces, Clock::time_point deadline) override {
    for (const Piece& piece : pieces) {
      check_in_landing(piece.offset, piece.bytes, bytes_, "the peer's landing");
    }
    peer_.write(pieces, base_, deadline);
  }

 private:
  NixlPeer& peer_;
  std::uintptr_t base_;
  std::size_t bytes_;
};

std::unique_ptr<Target> NixlPeer::open(const std::string& address, std::size_t bytes) {
  if (address.empty() || address.size() > 20 || address.find_first_not_of("0123456789") != std::string::npos)
    throw TransferError("the peer's landing has no address of NIXL's");
  return std::make_unique<NixlTarget>(*this, std::strtoull(address.c_str(), nullptr, 10), bytes);
}

class NixlTransport : public PageTransport {
 public:
  NixlTransport(std::size_t landing_bytes, const std::string& library)
      : landing_bytes_(landing_bytes), agent_(open_nixl(library)) {}

  const char* name() const override { return "nixl"; }
  std::string describe() const override {
    region();  // is part of what is said
    const std::lock_guard lock(agent_.mutex());
    void* data = nullptr;
    std::size_t bytes = 0;
    check(agent_.library().get_local_md(agent_.get(), &data, &bytes), "get_local_md");
    std::string out(static_cast<const char*>(data), bytes);
    std::free(data);  // NOLINT(cppcoreguidelines-no-malloc): it is the library's
    return out;
  }
  std::unique_ptr<Landing> land(std::size_t bytes) override {
    return std::make_unique<NixlLanding>(region(), bytes);
  }
  std::unique_ptr<Peer> reach(const std::string& description) override {
    return std::make_unique<NixlPeer>(agent_, description);
  }

 private:
  /// Made when it is first needed: a process that only writes has none.
  Region& region() const {
    const std::lock_guard lock(mutex_);
    if (!region_) region_ = std::make_unique<Region>(agent_, landing_bytes_);
    return *region_;
  }

  const std::size_t landing_bytes_;
  mutable Agent agent_;
  mutable std::mutex mutex_;
  mutable std::unique_ptr<Region> region_;
};

}  // namespace

std::unique_ptr<PageTransport> make_nixl_transport(std::size_t landing_bytes, const std::string& library) {
  const char* const variable =
      std::getenv("FLASH_MLA_NIXL");  // NOLINT(concurrency-mt-unsafe): nobody sets it
  const std::string path = !library.empty() ? library : variable != nullptr ? variable : "libnixl_capi.so";
  try {
    return std::make_unique<NixlTransport>(landing_bytes, path);
  } catch (const TransferError& e) {
    throw Unsupported(e.what());
  }
}

}  // namespace flash_mla::transfer
