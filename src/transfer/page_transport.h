#pragma once

#include <fmt/format.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>

namespace flash_mla::transfer {

using Clock = std::chrono::steady_clock;

/// What went wrong between this process and a peer: the peer is gone, slow, or has said or asked for what it may not.
class TransferError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Bytes that go to a peer, and where in its landing they go.
struct Piece {
  const std::byte* from = nullptr;
  std::size_t offset = 0, bytes = 0;
};

/// Throws TransferError unless [offset, offset + size) lies in a landing of `bytes`; `landing` names it.
inline void check_in_landing(std::size_t offset, std::size_t size, std::size_t bytes, const char* landing) {
  if (offset > bytes || size > bytes - offset) {
    throw TransferError(fmt::format("{} bytes at {} are not in {} of {}", size, offset, landing, bytes));
  }
}

/// Memory for what one peer sends, and nobody else's: never the cache itself. It ends with the object, which is to live
/// as long as the peer may write.
class Landing {
 public:
  virtual ~Landing() = default;
  /// What the peer opens it by, in words.
  virtual const std::string& address() const = 0;
  /// Copies what has arrived at [offset, offset + to.size()). Throws TransferError.
  virtual void read(std::size_t offset, std::span<std::byte> to) = 0;
};

/// A peer's landing, to be written to.
class Target {
 public:
  virtual ~Target() = default;
  /// Returns when all have arrived. Throws TransferError, for a peer that is gone, when it takes past `deadline`, and for
  /// what does not lie in the landing; then some may have been written.
  virtual void write(std::span<const Piece> pieces, Clock::time_point deadline) = 0;
};

/// A process that has landings. What is made of it must not outlive it.
class Peer {
 public:
  virtual ~Peer() = default;
  /// The landing with this address, of `bytes`. Throws TransferError.
  virtual std::unique_ptr<Target> open(const std::string& address, std::size_t bytes) = 0;
};

/// A way for pages from one process to another. All may be called from any thread; what it makes, by one at a time. It
/// outlives what it makes.
class PageTransport {
 public:
  virtual ~PageTransport() = default;
  /// Both sides must have the same: "shm", "nixl".
  virtual const char* name() const = 0;
  /// Of this process, for reach() in another.
  virtual std::string describe() const = 0;
  /// Throws TransferError where there is no room, now (a landing that ends may make it) or at all.
  virtual std::unique_ptr<Landing> land(std::size_t bytes) = 0;
  /// The process that has described itself so. Throws TransferError.
  virtual std::unique_ptr<Peer> reach(const std::string& description) = 0;
};

/// Between processes of one machine and one user: each landing is an anonymous file in memory of its
/// own, of at most `landing_bytes` all together.
std::unique_ptr<PageTransport> make_shared_memory_transport(std::size_t landing_bytes);

/// By NIXL's C library (libnixl_capi.so, version 1.5), which is opened now: RDMA, TCP, or whatever else its UCX finds.
/// All landings lie in one region of `landing_bytes`, which is what peers can write to. `library`: its path; empty: as
/// the dynamic linker finds it, or the variable FLASH_MLA_NIXL says. Throws Unsupported where it is not there or not
/// what is expected, with the reason.
std::unique_ptr<PageTransport> make_nixl_transport(std::size_t landing_bytes,
                                                   const std::string& library = {});

}  // namespace flash_mla::transfer
