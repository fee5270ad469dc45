#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <random>
#include <string_view>
#include <system_error>
#include <utility>

#include "transfer/page_transport.h"

// A landing is an anonymous file in memory, which the peer opens through /proc: it ends with the processes that have it
// open, however they end. It is sealed to its size, and both sides use pread and pwrite.

namespace flash_mla::transfer {
namespace {

constexpr std::string_view kPrefix = "flash-mla-";
constexpr std::size_t kNameDigits = 32;

TransferError error_of(const char* what, int error) {
  return TransferError(
      fmt::format("shared memory cannot be {}: {}", what, std::generic_category().message(error)));
}

class File {
 public:
  explicit File(int fd) : fd_(fd) {}
  File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  File& operator=(File&&) = delete;
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

/// All of a span, by pread or pwrite.
template <class Call, class Byte>
void transfer_all(const char* what, Call call, int fd, Byte* data, std::size_t bytes, std::size_t offset) {
  while (bytes > 0) {
    const ssize_t n = call(fd, data, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw error_of(what, n < 0 ? errno : EIO);
    data += n;
    bytes -= static_cast<std::size_t>(n);
    offset += static_cast<std::size_t>(n);
  }
}

std::string random_name() {
  std::random_device entropy;
  const auto draw = [&] { return (std::uint64_t{entropy()} << 32) | entropy(); };
  return fmt::format("{}{:016x}{:016x}", kPrefix, draw(), draw());
}

/// Another process's word for an object: nothing but a name of random_name's form is opened.
bool is_name(std::string_view name) {
  return name.size() == kPrefix.size() + kNameDigits && name.starts_with(kPrefix) &&
         name.find_first_not_of("0123456789abcdef", kPrefix.size()) == std::string_view::npos;
}

/// The processes' way to a landing, "PID:FD:NAME": the name says that it still is what it was.
struct Address {
  int pid = 0, fd = 0;
  std::string name;

  std::string text() const { return fmt::format("{}:{}:{}", pid, fd, name); }
  static Address parse(std::string_view text) {
    Address out;
    const auto number = [&](int& to) {
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), to);
      const auto digits = static_cast<std::size_t>(end - text.data());
      if (error != std::errc() || digits >= text.size() || text[digits] != ':' || to < 0) text = {};
      text.remove_prefix(std::min(text.size(), digits + 1));
    };
    number(out.pid);
    number(out.fd);
    out.name = text;
    if (!is_name(text)) throw TransferError("the peer's landing has no address of shared memory");
    return out;
  }
};

class SharedLanding : public Landing {
 public:
  SharedLanding(std::size_t bytes, std::atomic<std::size_t>& used)
      : name_(random_name()),
        file_(::memfd_create(name_.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING)),
        bytes_(bytes),
        used_(used) {
    if (file_.get() < 0) throw error_of("made", errno);
    // Taken now: memory that is not there says so here.
    if (const int error = ::posix_fallocate(file_.get(), 0, static_cast<off_t>(bytes)); error != 0)
      throw error_of("had", error);
    if (::fcntl(file_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
      throw error_of("sealed", errno);
    address_ = Address{::getpid(), file_.get(), name_}.text();
  }
  ~SharedLanding() override { used_ -= bytes_; }
  SharedLanding(const SharedLanding&) = delete;
  SharedLanding& operator=(const SharedLanding&) = delete;

  const std::string& address() const override { return address_; }
  void read(std::size_t offset, std::span<std::byte> to) override {
    check_in_landing(offset, to.size(), bytes_, "a landing");
    transfer_all("read", ::pread, file_.get(), to.data(), to.size(), offset);
  }

 private:
  std::string name_, address_;
  File file_;
  std::size_t bytes_;
  std::atomic<std::size_t>& used_;
};

class SharedTarget : public Target {
 public:
  SharedTarget(File file, std::size_t bytes) : file_(std::move(file)), bytes_(bytes) {}

  void write(std::span<const Piece> pieces, Clock::time_point deadline) override {
    for (const Piece& piece : pieces) {
      check_in_landing(piece.offset, piece.bytes, bytes_, "the peer's landing");
      if (Clock::now() > deadline) throw TransferError("the time for the transfer is over");
      transfer_all("written", ::pwrite, file_.get(), piece.from, piece.bytes, piece.offset);
    }
  }

 private:
  File file_;
  std::size_t bytes_;
};

class SharedPeer : public Peer {
 public:
  std::unique_ptr<Target> open(const std::string& address, std::size_t bytes) override {
    const Address a = Address::parse(address);
    File file(::open(fmt::format("/proc/{}/fd/{}", a.pid, a.fd).c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
    if (file.get() < 0) throw error_of("opened (are both on one machine, as one user?)", errno);
    // Whatever else the peer has open, or another process by now, is not for us.
    std::array<char, 128> link{};
    const ssize_t n =
        ::readlink(fmt::format("/proc/self/fd/{}", file.get()).c_str(), link.data(), link.size());
    if (n < 0 || std::string_view(link.data(), static_cast<std::size_t>(n)) !=
                     fmt::format("/memfd:{} (deleted)", a.name))
      throw TransferError("the peer's landing is no shared memory of that name");
    struct stat about {};
    if (::fstat(file.get(), &about) != 0) throw error_of("opened", errno);
    if (about.st_uid != ::geteuid() || static_cast<std::size_t>(about.st_size) != bytes) {
      throw TransferError(fmt::format("the peer's landing has {} bytes of user {}, expected {} of user {}",
                                      about.st_size, about.st_uid, bytes, ::geteuid()));
    }
    return std::make_unique<SharedTarget>(std::move(file), bytes);
  }
};

class SharedMemoryTransport : public PageTransport {
 public:
  explicit SharedMemoryTransport(std::size_t landing_bytes) : landing_bytes_(landing_bytes) {}

  const char* name() const override { return "shm"; }
  std::string describe() const override { return {}; }
  std::unique_ptr<Landing> land(std::size_t bytes) override {
    std::size_t used = used_;
    do {
      if (bytes > landing_bytes_ || used > landing_bytes_ - bytes) {
        throw TransferError(fmt::format("{} of {} bytes for transfers are in use, and {} are needed", used,
                                        landing_bytes_, bytes));
      }
    } while (!used_.compare_exchange_weak(used, used + bytes));
    try {
      return std::make_unique<SharedLanding>(bytes, used_);
    } catch (...) {
      used_ -= bytes;
      throw;
    }
  }
  std::unique_ptr<Peer> reach(const std::string& /*description*/) override {
    return std::make_unique<SharedPeer>();
  }

 private:
  const std::size_t landing_bytes_;
  std::atomic<std::size_t> used_ = 0;
};

}  // namespace

std::unique_ptr<PageTransport> make_shared_memory_transport(std::size_t landing_bytes) {
  return std::make_unique<SharedMemoryTransport>(landing_bytes);
}

}  // namespace flash_mla::transfer
