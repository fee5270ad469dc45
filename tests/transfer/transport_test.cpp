// Ways for pages from one process to another, each with both ends here and with the other end in a process of its own.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "flash_mla/error.h"
#include "transfer/connection.h"
#include "transfer/page_transport.h"
#include "transfer/transports.h"

namespace flash_mla::transfer {
namespace {

constexpr std::size_t kLandings = std::size_t{64} << 20;

Clock::time_point soon() { return Clock::now() + std::chrono::seconds(60); }

std::vector<std::byte> random_bytes(std::size_t count, unsigned seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> out(count);
  for (std::byte& b : out) b = static_cast<std::byte>(random());
  return out;
}

std::vector<std::byte> read_all(Landing& landing, std::size_t bytes) {
  std::vector<std::byte> out(bytes);
  landing.read(0, out);
  return out;
}

class TransportTest : public testing::TestWithParam<std::string> {
 protected:
  /// Of the process that is written to, and of the one that writes.
  std::unique_ptr<PageTransport> here_ = make_transport(GetParam(), kLandings);
  std::unique_ptr<PageTransport> there_ = make_transport(GetParam(), kLandings);
};

INSTANTIATE_TEST_SUITE_P(All, TransportTest, testing::ValuesIn(testable_transports()),
                         [](const auto& of) { return of.param; });

TEST_P(TransportTest, PiecesComeWhereTheyBelong) {
  const std::size_t bytes = 3'000'001;
  const std::unique_ptr<Landing> landing = here_->land(bytes);
  const std::unique_ptr<Peer> peer = there_->reach(here_->describe());
  const std::unique_ptr<Target> target = peer->open(landing->address(), bytes);
  const std::vector<std::byte> sent = random_bytes(bytes, 1);
  // Last parts first, of unequal lengths, in two calls.
  const std::size_t a = 1, b = 1'500'000, c = 2'999'999;
  target->write(std::vector<Piece>{{sent.data() + c, c, bytes - c}, {sent.data() + b, b, c - b}}, soon());
  target->write(std::vector<Piece>{{sent.data() + a, a, b - a}, {sent.data(), 0, a}}, soon());
  EXPECT_EQ(read_all(*landing, bytes), sent);
}

TEST_P(TransportTest, MoreThanIsSentAtOnce) {
  const std::size_t bytes = std::size_t{40} << 20;
  const std::unique_ptr<Landing> landing = here_->land(bytes);
  const std::unique_ptr<Peer> peer = there_->reach(here_->describe());
  const std::vector<std::byte> sent = random_bytes(bytes, 2);
  peer->open(landing->address(), bytes)->write(std::vector<Piece>{{sent.data(), 0, bytes}}, soon());
  EXPECT_EQ(read_all(*landing, bytes), sent);
}

TEST_P(TransportTest, NothingGoesPastALanding) {
  const std::size_t bytes = 100'000;
  const std::unique_ptr<Landing> before = here_->land(bytes), landing = here_->land(bytes),
                                 behind = here_->land(bytes);
  const std::unique_ptr<Peer> peer = there_->reach(here_->describe());
  const std::vector<std::byte> first = random_bytes(bytes, 3), second = random_bytes(bytes, 4);
  peer->open(before->address(), bytes)->write(std::vector<Piece>{{first.data(), 0, bytes}}, soon());
  peer->open(behind->address(), bytes)->write(std::vector<Piece>{{second.data(), 0, bytes}}, soon());
  const std::unique_ptr<Target> target = peer->open(landing->address(), bytes);
  const std::vector<std::byte> more = random_bytes(2 * bytes, 5);
  EXPECT_THROW(target->write(std::vector<Piece>{{more.data(), 1, bytes}}, soon()), TransferError);
  EXPECT_THROW(target->write(std::vector<Piece>{{more.data(), bytes + 1, 0}}, soon()), TransferError);
  EXPECT_THROW(target->write(std::vector<Piece>{{more.data(), 0, 2 * bytes}}, soon()), TransferError);
  EXPECT_THROW(target->write(std::vector<Piece>{{more.data(), ~std::size_t{0} - 7, bytes}}, soon()),
               TransferError);
  EXPECT_EQ(read_all(*before, bytes), first);
  EXPECT_EQ(read_all(*behind, bytes), second);
  std::vector<std::byte> out(2);
  EXPECT_THROW(landing->read(bytes - 1, out), TransferError);
  EXPECT_THROW(landing->read(~std::size_t{0}, out), TransferError);
}

TEST_P(TransportTest, LandingsAreBounded) {
  std::unique_ptr<Landing> first = here_->land(kLandings / 2);
  EXPECT_THROW(here_->land(kLandings / 2 + 1), TransferError);
  EXPECT_THROW(here_->land(~std::size_t{0} / 2), TransferError);
  std::unique_ptr<Landing> second = here_->land(kLandings / 2);
  EXPECT_THROW(here_->land(1), TransferError);
  first.reset();
  second.reset();
  EXPECT_NE(here_->land(kLandings), nullptr);
}

TEST_P(TransportTest, AddressesOfNothingAreRefused) {
  const std::unique_ptr<Peer> peer = there_->reach(here_->describe());
  for (const char* address :
       {"", "/etc/passwd", "1:2:/etc/passwd", ":::", "-1", "0x10", "1:", "1:2:flash-mla-0",
        "1:2:flash-mla-0123456789abcdef0123456789abcde/", "-1:2:flash-mla-0123456789abcdef0123456789abcdef",
        "1:99999999999:flash-mla-0123456789abcdef0123456789abcdef",
        "99999999:2:flash-mla-0123456789abcdef0123456789abcdef"}) {
    EXPECT_THROW(peer->open(address, 4096), TransferError) << address;
  }
}

// A whole landing from a process of its own.
TEST_P(TransportTest, FromAnotherProcess) {
  const std::size_t bytes = 5'000'000;
  const std::vector<std::byte> sent = random_bytes(bytes, 6);
  int to_child[2];
  ASSERT_EQ(::pipe(to_child), 0);
  // Forked before this process has made anything with threads.
  here_.reset();
  there_.reset();
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    int code = 1;
    try {
      std::string words;
      char c = 0;
      while (::read(to_child[0], &c, 1) == 1 && c != '\n') words += c;
      const std::size_t space = words.find(' ');
      const auto transport = make_transport(GetParam(), kLandings);
      const auto peer = transport->reach(from_hex(words.substr(0, space)));
      peer->open(words.substr(space + 1), bytes)->write(std::vector<Piece>{{sent.data(), 0, bytes}}, soon());
      code = 0;
    } catch (const std::exception& e) {
      std::fprintf(stderr, "%s\n", e.what());
    }
    ::_exit(code);
  }
  here_ = make_transport(GetParam(), kLandings);
  const std::unique_ptr<Landing> landing = here_->land(bytes);
  const std::string words = to_hex(here_->describe()) + " " + landing->address() + "\n";
  ASSERT_EQ(::write(to_child[1], words.data(), words.size()), static_cast<ssize_t>(words.size()));
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(read_all(*landing, bytes), sent);
  ::close(to_child[0]);
  ::close(to_child[1]);
}

TEST(SharedMemoryTransportTest, NothingElseOfAProcessIsOpened) {
  const auto transport = make_shared_memory_transport(kLandings);
  const std::unique_ptr<Peer> peer = transport->reach({});
  std::unique_ptr<Landing> landing = transport->land(1000);
  const std::string address = landing->address(), name = address.substr(address.rfind(':'));
  EXPECT_NO_THROW(peer->open(address, 1000));
  EXPECT_THROW(peer->open(address, 999), TransferError);
  EXPECT_THROW(peer->open(address, 1001), TransferError);
  const std::unique_ptr<Landing> other = transport->land(1000);
  const std::string its_name = other->address().substr(other->address().rfind(':'));
  EXPECT_THROW(peer->open(address.substr(0, address.size() - name.size()) + its_name, 1000), TransferError);
  // A file of this process, with another of the same size by its side.
  std::FILE* const file = std::tmpfile();
  ASSERT_NE(file, nullptr);
  ASSERT_EQ(::ftruncate(fileno(file), 1000), 0);
  EXPECT_THROW(peer->open(std::to_string(::getpid()) + ":" + std::to_string(fileno(file)) + name, 1000),
               TransferError);
  std::fclose(file);
  // It keeps its size, and ends with its object.
  const std::string path =
      "/proc/self/fd/" + address.substr(address.find(':') + 1, address.rfind(':') - address.find(':') - 1);
  EXPECT_NE(::truncate(path.c_str(), 10), 0);
  EXPECT_NE(::truncate(path.c_str(), 2000), 0);
  landing.reset();
  EXPECT_THROW(peer->open(address, 1000), TransferError);
}

TEST(NixlTransportTest, IsAbsentWithoutHarm) {
  try {
    make_nixl_transport(kLandings, "/no/such/libnixl_capi.so");
    FAIL() << "opened what is not there";
  } catch (const Unsupported& e) {
    EXPECT_NE(std::string(e.what()).find("/no/such/libnixl_capi.so"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("FLASH_MLA_NIXL"), std::string::npos) << e.what();
  }
  EXPECT_THROW(make_nixl_transport(kLandings, "libc.so.6"), Unsupported);
}

TEST(HexTest, IsWhatItWas) {
  std::string bytes;
  for (int i = 0; i < 256; ++i) bytes += static_cast<char>(i);
  EXPECT_EQ(from_hex(to_hex(bytes)), bytes);
  EXPECT_THROW(from_hex("0"), TransferError);
  EXPECT_THROW(from_hex("0g"), TransferError);
}

}  // namespace
}  // namespace flash_mla::transfer
