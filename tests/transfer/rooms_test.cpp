// The bootstrap-room protocol: both sides in this process, over loopback, and peers that do not keep to it.

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "flash_mla/error.h"
#include "transfer/page_receiver.h"
#include "transfer/page_sender.h"
#include "transfer/transports.h"

namespace flash_mla::transfer {
namespace {

using Tokens = std::vector<std::int32_t>;

constexpr std::size_t kLandings = std::size_t{8} << 20;
constexpr int kPageTokens = 64;

Identity identity() { return {"weights", "rows of a kind", kPageTokens, false, {1000, 24, 1000}}; }

// The machine may be busy.
void wait_until(const std::function<bool()>& condition) {
  const Clock::time_point end = Clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    ASSERT_LT(Clock::now(), end);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

Tokens prompt(std::size_t length, std::int32_t first = 1) {
  Tokens out;
  for (std::size_t i = 0; i < length; ++i) out.push_back(first + static_cast<std::int32_t>(i * i % 1000));
  return out;
}

std::vector<std::byte> random_bytes(std::size_t count, unsigned seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> out(count);
  for (std::byte& b : out) b = static_cast<std::byte>(random());
  return out;
}

class RoomsTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { start_sender(); }
  void TearDown() override {
    if (sender_) wait_until([&] { return sender_->num_rooms() == 0; });
    wait_until([&] {
      if (receiver_) receiver_->poll();
      return !receiver_ || receiver_->num_landings() == 0;
    });
  }

  void start_sender(int port = 0) {
    sender_ = std::make_unique<PageSender>(
        *there_, PageSender::Options{sender_identity_, "127.0.0.1", port, "secret", sender_lease_, [] {}});
  }
  PageReceiver& receiver() {
    if (!receiver_) {
      receiver_ = std::make_unique<PageReceiver>(
          *here_, PageReceiver::Options{receiver_identity_, key_, {"*"}, receiver_lease_, [] {}});
    }
    return *receiver_;
  }
  std::shared_ptr<IncomingRoom> ask(std::int64_t room, const Tokens& tokens, bool with_pages = true) {
    return receiver().ask("127.0.0.1", sender_ ? sender_->port() : port_, room, tokens, with_pages);
  }
  std::shared_ptr<OutgoingRoom> expect(std::int64_t room, const Tokens& tokens) {
    return sender_->expect(room, digest_of(tokens), std::ssize(tokens));
  }
  /// Bytes as PageCopies::download would give them, of pages [page, page + count) of all that are `sent`.
  static std::vector<std::byte> part(const PageLayout& layout, const std::vector<std::byte>& sent, int layer,
                                     std::int64_t page, std::int64_t count) {
    std::vector<std::byte> out;
    for (const Piece& piece : layout.pieces(layer, page, count)) {
      const auto begin = sent.begin() + static_cast<std::ptrdiff_t>(piece.offset);
      out.insert(out.end(), begin, begin + static_cast<std::ptrdiff_t>(piece.bytes));
    }
    return out;
  }
  void settle(const std::shared_ptr<IncomingRoom>& room) {
    wait_until([&] {
      receiver().poll();
      return room->settled();
    });
  }
  void expect_trouble(const std::shared_ptr<IncomingRoom>& room, Trouble trouble, const std::string& words) {
    settle(room);
    EXPECT_FALSE(room->arrived());
    EXPECT_STREQ(trouble_name(room->trouble()), trouble_name(trouble)) << room->reason();
    EXPECT_NE(room->reason().find(words), std::string::npos) << room->reason();
    receiver().drop(room);
  }

  std::unique_ptr<PageTransport> here_ = make_transport(GetParam(), kLandings);
  std::unique_ptr<PageTransport> there_ = make_transport(GetParam(), kLandings);
  Identity sender_identity_ = identity(), receiver_identity_ = identity();
  std::string key_ = "secret";
  double sender_lease_ = 60, receiver_lease_ = 60;
  int port_ = 0;
  std::unique_ptr<PageSender> sender_;
  std::unique_ptr<PageReceiver> receiver_;
};

INSTANTIATE_TEST_SUITE_P(All, RoomsTest, testing::ValuesIn(testable_transports()),
                         [](const auto& of) { return of.param; });

TEST_P(RoomsTest, PagesArriveWholeAndByLayerWhoeverComesFirst) {
  const Tokens tokens = prompt(5 * kPageTokens + 7);
  const PageLayout layout(identity(), 6);
  for (const bool asks_first : {true, false}) {
    for (const bool by_layer : {true, false}) {
      const std::vector<std::byte> sent = random_bytes(layout.bytes(), 7);
      std::shared_ptr<IncomingRoom> in;
      std::shared_ptr<OutgoingRoom> out;
      if (asks_first) {
        in = ask(5, tokens);
        wait_until([&] { return sender_->num_rooms() == 1; });
        out = expect(5, tokens);
      } else {
        out = expect(5, tokens);
        in = ask(5, tokens);
      }
      wait_until([&] { return out->asked(); });
      ASSERT_TRUE(out->wanted());
      std::size_t bytes = 0;
      if (by_layer) {
        for (int layer = 0; layer < 3; ++layer) {
          bytes += out->write(layer, 0, 4, part(layout, sent, layer, 0, 4).data());
          bytes += out->write(layer, 4, 2, part(layout, sent, layer, 4, 2).data());
        }
      } else {
        bytes += out->write(-1, 0, 4, part(layout, sent, -1, 0, 4).data());
        bytes += out->write(-1, 4, 2, part(layout, sent, -1, 4, 2).data());
      }
      EXPECT_FALSE(in->settled());
      out->finish();
      EXPECT_EQ(bytes, layout.bytes());
      settle(in);
      ASSERT_TRUE(in->arrived()) << in->reason();
      EXPECT_GT(in->seconds(), 0);
      std::vector<std::byte> received(layout.bytes());
      ASSERT_TRUE(in->take(received)) << in->reason();
      EXPECT_EQ(received, sent);
      receiver().drop(in);
      out.reset();
      wait_until([&] { return sender_->num_rooms() == 0; });
    }
  }
}

TEST_P(RoomsTest, SidesThatDifferRefuseEachOther) {
  const std::vector<std::pair<std::function<void(Identity&)>, std::string>> changes = {
      {[](Identity& i) { i.weights = "others"; }, "weights is \"others\", expected \"weights\""},
      {[](Identity& i) { i.page_format = "fp8"; }, "page_format is \"fp8\", expected \"rows of a kind\""},
      {[](Identity& i) { i.page_tokens = 32; }, "page_tokens is 32, expected 64"},
      {[](Identity& i) {
         i.layer_bytes = {1000, 24};
       },
       "layer_bytes is [1000,24], expected [1000,24,1000]"},
      {[](Identity& i) { i.batch_invariant = true; }, "batch_invariant is true, expected false"}};
  for (const auto& [change, words] : changes) {
    receiver_.reset();
    receiver_identity_ = identity();
    change(receiver_identity_);
    const auto room = ask(1, prompt(100));
    expect_trouble(room, Trouble::kRefused, words);
    // And at once when it comes again.
    expect_trouble(ask(2, prompt(100)), Trouble::kRefused, words);
  }
  receiver_.reset();
  receiver_identity_ = identity();
  key_ = "Secret";
  expect_trouble(ask(1, prompt(100)), Trouble::kRefused, "the key is wrong");
}

TEST_P(RoomsTest, OnlyWhoKnowsThePromptGetsItsPages) {
  const Tokens tokens = prompt(100);
  const auto out = expect(1, tokens);
  expect_trouble(ask(1, prompt(100, 2)), Trouble::kGivenUp, "digest");
  expect_trouble(ask(1, prompt(101)), Trouble::kGivenUp, "the prompt has 101 tokens");
  EXPECT_FALSE(out->asked());
  const auto in = ask(1, tokens);
  wait_until([&] { return out->asked(); });
  out->fail("enough");
  expect_trouble(in, Trouble::kGivenUp, "enough");
}

TEST_P(RoomsTest, ARoomIsOneRequests) {
  const auto first = expect(1, prompt(10));
  EXPECT_THROW(expect(1, prompt(10)), InvalidArgument);
  const auto in = ask(1, prompt(10));
  wait_until([&] { return first->asked(); });
  expect_trouble(ask(1, prompt(10)), Trouble::kGivenUp, "another request has the room");
  receiver().drop(in);
  wait_until([&] { return first->over(); });
}

TEST_P(RoomsTest, APrefillServerThatEndsIsNoticed) {
  auto out = expect(1, prompt(100));
  const auto in = ask(1, prompt(100)), early = ask(2, prompt(100));
  wait_until([&] { return out->asked() && sender_->num_rooms() == 2; });
  port_ = sender_->port();
  out.reset();
  sender_.reset();
  settle(in);
  EXPECT_FALSE(in->arrived());
  receiver().drop(in);
  expect_trouble(early, Trouble::kGone, "");
  // Nobody is there: known soon, and from then on at once.
  expect_trouble(ask(3, prompt(100)), Trouble::kGone, "");
  EXPECT_EQ(receiver().num_landings(), 0U);
  // And one that comes back is used again.
  start_sender(port_);
  const auto back = expect(4, prompt(100));
  std::shared_ptr<IncomingRoom> again;
  wait_until([&] {
    if (again && !again->settled()) return back->asked();
    if (again) receiver().drop(again);
    again = ask(4, prompt(100));
    return false;
  });
  receiver().drop(again);
}

TEST_P(RoomsTest, ADecodeServerThatEndsIsNoticed) {
  const auto out = expect(1, prompt(100));
  const auto in = ask(1, prompt(100)), waits = ask(2, prompt(100));
  wait_until([&] { return out->asked() && sender_->num_rooms() == 2; });
  receiver().drop(in);
  receiver().drop(waits);
  receiver_.reset();
  wait_until([&] { return out->over(); });
  const std::vector<std::byte> bytes(PageLayout(identity(), 2).bytes());
  EXPECT_EQ(out->write(-1, 0, 2, bytes.data()), 0U);
}

TEST_P(RoomsTest, LeasesEnd) {
  receiver_lease_ = 0.05;
  auto out = expect(1, prompt(100));
  const auto in = ask(1, prompt(100));
  expect_trouble(in, Trouble::kLate, "the lease is over");
  wait_until([&] { return out->over(); });
  out.reset();
  receiver_.reset();
  sender_.reset();
  // Of a prefill server's request that nobody asks for, and of one asked for that has no request.
  sender_lease_ = 0.05;
  receiver_lease_ = 60;
  start_sender();
  const auto never = expect(2, prompt(100));
  wait_until([&] { return never->late(); });
  EXPECT_FALSE(never->asked());
  expect_trouble(ask(3, prompt(100)), Trouble::kGivenUp, "no request for the room has come");
}

TEST_P(RoomsTest, MoreRoomsThanMemoryWaitForIt) {
  // Each takes more than a third of the memory: two at a time.
  const std::int64_t pages = 1500;
  const Tokens tokens = prompt(static_cast<std::size_t>(pages) * kPageTokens);
  const PageLayout layout(identity(), pages);
  ASSERT_GT(3 * layout.bytes(), kLandings);
  ASSERT_LT(2 * layout.bytes() + 100'000, kLandings);
  const std::vector<std::byte> sent = random_bytes(layout.bytes(), 8);
  std::vector<std::shared_ptr<OutgoingRoom>> out;
  std::vector<std::shared_ptr<IncomingRoom>> in;
  for (int i = 0; i < 7; ++i) {
    out.push_back(expect(i, tokens));
    in.push_back(ask(i, tokens));
  }
  std::vector<std::byte> received(layout.bytes());
  std::size_t done = 0;
  std::vector<bool> served(7, false), taken(7, false);
  wait_until([&] {
    receiver().poll();
    EXPECT_LE(receiver().num_landings(), 2U);
    for (std::size_t i = 0; i < 7; ++i) {
      if (out[i]->asked() && !served[i]) {
        served[i] = true;
        out[i]->write(-1, 0, pages, sent.data());
        out[i]->finish();
      }
      if (in[i]->settled() && !taken[i]) {
        taken[i] = true;
        EXPECT_TRUE(in[i]->arrived()) << in[i]->reason();
        EXPECT_TRUE(in[i]->take(received));
        EXPECT_EQ(received, sent);
        receiver().drop(in[i]);
        ++done;
      }
    }
    return done == 7;
  });
  // What could never fit is said at once.
  expect_trouble(ask(8, prompt(20 * tokens.size())), Trouble::kMemory, "bytes");
}

TEST_P(RoomsTest, ChangedBytesAreNoticed) {
  const Tokens tokens = prompt(100);
  const PageLayout layout(identity(), 2);
  const std::vector<std::byte> sent = random_bytes(layout.bytes(), 9);
  const auto out = expect(1, tokens);
  const auto in = ask(1, tokens);
  wait_until([&] { return out->asked(); });
  out->write(-1, 0, 2, sent.data());
  // The same pages again are none of the protocol; here it says afterwards that others had been written.
  out->finish();
  settle(in);
  ASSERT_TRUE(in->arrived());
  std::vector<std::byte> wrong_size(layout.bytes() - 1);
  EXPECT_FALSE(in->take(wrong_size));
  EXPECT_STREQ(trouble_name(in->trouble()), "changed");
  receiver().drop(in);
}

TEST_P(RoomsTest, WithoutPagesThePrefillServerIsToldSo) {
  const auto out = expect(1, prompt(100));
  const auto in = ask(1, prompt(100), /*with_pages=*/false);
  wait_until([&] { return out->asked(); });
  EXPECT_FALSE(out->wanted());
  EXPECT_FALSE(out->over());
  out->finish();
  settle(in);
}

TEST_P(RoomsTest, ServersThatAreNoPeersAreNotAsked) {
  PageReceiver strict(*here_, PageReceiver::Options{identity(), "", {"10.0.0.1:8998"}, 60, [] {}});
  EXPECT_NO_THROW(strict.check_peer("10.0.0.1", 8998));
  for (const auto& [host, port] :
       {std::pair("10.0.0.1", 8999), std::pair("10.0.0.2", 8998), std::pair("*", 1)}) {
    EXPECT_THROW(strict.ask(host, port, 1, prompt(10), true), InvalidArgument);
  }
  EXPECT_THROW(receiver().check_peer("10.0.0.1", 0), InvalidArgument);
  EXPECT_THROW(receiver().check_peer("10.0.0.1", 65536), InvalidArgument);
}

// A decode server that does not keep to the protocol.
TEST_P(RoomsTest, StrangersToThePrefillServerAreShutOut) {
  const auto out = expect(1, prompt(100));
  const auto connect = [&] {
    return Connection::connect("127.0.0.1", sender_->port(), std::chrono::seconds(10));
  };
  const auto expect_closed = [](Connection& connection) {
    EXPECT_THROW(while (connection.receive(Clock::now() + std::chrono::seconds(60))){}, TransferError);
  };
  const Json ask = {{"kind", "ask"}, {"room", 1},  {"digest", digest_of(prompt(100))},
                    {"tokens", 100}, {"pages", 2}, {"landing", "/etc/passwd"}};
  const Json hello = {{"kind", "hello"},
                      {"key", "secret"},
                      {"identity", to_json(identity())},
                      {"transport", there_->name()},
                      {"description", to_hex(here_->describe())}};
  for (const Json& first : {ask, Json::object(), Json{{"kind", 3}}, Json{{"kind", "hello"}}}) {
    Connection connection = connect();
    connection.send(first);
    expect_closed(connection);
  }
  {
    Connection connection = connect();
    Json other = hello;
    other["transport"] = "pigeons";
    connection.send(other);
    const auto answer = connection.receive(Clock::now() + std::chrono::seconds(60));
    ASSERT_TRUE(answer);
    EXPECT_EQ(answer->at("reason"), std::string("transport is \"pigeons\", expected ") + there_->name());
    expect_closed(connection);
  }
  Connection connection = connect();
  connection.send(hello);
  auto answer = connection.receive(Clock::now() + std::chrono::seconds(60));
  ASSERT_TRUE(answer);
  ASSERT_EQ(answer->at("kind"), "welcome");
  std::vector<Json> wrong(4, ask);
  wrong[1]["pages"] = 3;
  wrong[2]["pages"] = -1;
  wrong[3].erase("tokens");
  for (const Json& message : wrong) {  // the first names a landing that is none
    connection.send(message);
    answer = connection.receive(Clock::now() + std::chrono::seconds(60));
    ASSERT_TRUE(answer);
    EXPECT_EQ(answer->at("kind"), "failed") << *answer;
    EXPECT_FALSE(out->asked());
  }
  connection.send({{"kind", "drop"}, {"room", 99}});  // of which nobody knows
  connection.send({{"kind", "sing"}, {"room", 1}});
  expect_closed(connection);
}

// A prefill server that does not keep to the protocol. Nothing that it says is taken for pages.
class FalsePrefillTest : public testing::Test {
 protected:
  /// Answers the hello and the ask, then says `messages`.
  void serve(const std::vector<Json>& messages) {
    thread_ = std::jthread([this, messages] {
      std::optional<Connection> connection = listener_.accept();
      if (!connection) return;
      try {
        connection->receive();
        connection->send({{"kind", "welcome"}});
        connection->receive();
        for (const Json& message : messages) connection->send(message);
        while (connection->receive()) {
        }
      } catch (const TransferError&) {
        // as it should be
      }
    });
    room_ = receiver_.ask("127.0.0.1", listener_.port(), 1, prompt(100), true);
    wait_until([&] {
      receiver_.poll();
      return room_->settled();
    });
    receiver_.drop(room_);
    wait_until([&] { return receiver_.num_landings() == 0; });
  }
  static Json wrote(std::int64_t layer, std::int64_t page, std::int64_t count, const std::string& sum = "0") {
    return {{"kind", "wrote"}, {"room", 1},      {"layer", layer},
            {"page", page},    {"count", count}, {"checksum", sum}};
  }
  void TearDown() override { listener_.close(); }

  std::unique_ptr<PageTransport> transport_ = make_shared_memory_transport(kLandings);
  Listener listener_{"127.0.0.1", 0};
  std::jthread thread_;
  std::shared_ptr<IncomingRoom> room_;
  PageReceiver receiver_{*transport_, PageReceiver::Options{identity(), "", {"*"}, 60, [] {}}};
};

class FalsePrefillSaysTest : public FalsePrefillTest, public testing::WithParamInterface<int> {};

INSTANTIATE_TEST_SUITE_P(All, FalsePrefillSaysTest, testing::Range(0, 9));

TEST_P(FalsePrefillSaysTest, WhatIsNotTrue) {
  const Json done = {{"kind", "done"}, {"room", 1}};
  const std::vector<std::vector<Json>> lies = {{done},
                                               {wrote(-1, 0, 1), done},
                                               {wrote(-1, 0, 2), wrote(0, 1, 1)},
                                               {wrote(3, 0, 1)},
                                               {wrote(-2, 0, 1)},
                                               {wrote(0, 1, 2)},
                                               {wrote(0, -1, 1)},
                                               {wrote(0, INT64_MAX, 1)},
                                               {wrote(0, 0, 2, "no sum")}};
  serve(lies.at(static_cast<std::size_t>(GetParam())));
  EXPECT_FALSE(room_->arrived());
  EXPECT_STREQ(trouble_name(room_->trouble()), "gone") << room_->reason();
}

TEST_F(FalsePrefillTest, WrongSumsAreNoticed) {
  thread_ = std::jthread([this] {
    std::optional<Connection> connection = listener_.accept();
    connection->receive();
    connection->send({{"kind", "welcome"}});
    connection->receive();
    connection->send(wrote(-1, 0, 2, "0123456789abcdef"));
    connection->send({{"kind", "done"}, {"room", 1}});
  });
  room_ = receiver_.ask("127.0.0.1", listener_.port(), 1, prompt(100), true);
  wait_until([&] { return room_->settled(); });
  ASSERT_TRUE(room_->arrived());
  std::vector<std::byte> bytes(PageLayout(identity(), 2).bytes());
  EXPECT_FALSE(room_->take(bytes));
  EXPECT_STREQ(trouble_name(room_->trouble()), "changed");
  EXPECT_NE(room_->reason().find("are not what was sent"), std::string::npos) << room_->reason();
  receiver_.drop(room_);
}

// Words of any kind, of any length.
TEST_F(FalsePrefillTest, GarbageIsNoMessage) {
  thread_ = std::jthread([this] {
    std::mt19937 random(3);
    for (int i = 0; i < 20; ++i) {
      std::optional<Connection> connection = listener_.accept();
      if (!connection) return;
      try {
        connection->receive();
        connection->send({{"kind", "welcome"}, {"more", std::string(random() % 1000, 'x')}});
        connection->receive();
        connection->send({{"kind", "failed"}, {"room", 1}, {"reason", std::string(100'000, '\xff')}});
      } catch (const TransferError&) {
        // it has been closed
      }
    }
  });
  for (int i = 0; i < 20; ++i) {
    room_ = receiver_.ask("127.0.0.1", listener_.port(), 1, prompt(100), true);
    wait_until([&] {
      receiver_.poll();
      return room_->settled();
    });
    EXPECT_LE(room_->reason().size(), 4000U);
    receiver_.drop(room_);
    wait_until([&] { return receiver_.num_landings() == 0; });
  }
}

}  // namespace
}  // namespace flash_mla::transfer
