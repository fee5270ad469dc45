#include "flash_mla/event_queue.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <optional>
#include <thread>
#include <unordered_set>

#include "harness.h"

namespace flash_mla::engine {
namespace {

bool readable(const EventQueue& queue, int milliseconds) {
  pollfd file{queue.file_descriptor(), POLLIN, 0};
  return poll(&file, 1, milliseconds) == 1;
}

GenerationEvent event_of(RequestId request) {
  GenerationEvent out;
  out.request = request;
  out.token_ids = {static_cast<std::int32_t>(request)};
  return out;
}

TEST(EventQueue, IsReadableWhileThereAreEvents) {
  EventQueue queue;
  EXPECT_FALSE(readable(queue, 0));
  EXPECT_TRUE(queue.take().empty());
  const EventHandler handler = queue.handler();
  handler(event_of(1));
  handler(event_of(2));
  EXPECT_TRUE(readable(queue, 0));
  const std::vector<GenerationEvent> events = queue.take();
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[1].request, 2u);
  EXPECT_EQ(events[1].token_ids, Tokens{2});
  EXPECT_FALSE(readable(queue, 0));
  handler(event_of(3));
  EXPECT_TRUE(readable(queue, 0));
}

TEST(EventQueue, AHandlerOutlivesIt) {
  std::optional<EventQueue> queue(std::in_place);
  const EventHandler handler = queue->handler();
  handler(event_of(1));
  queue.reset();
  handler(event_of(2));
}

TEST(EventQueue, LosesNothingOfSeveralThreads) {
  constexpr int kThreads = 3, kEvents = 2000;
  EventQueue queue;
  std::vector<std::jthread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([handler = queue.handler(), t] {
      for (int i = 0; i < kEvents; ++i) handler(event_of(static_cast<RequestId>(t * kEvents + i)));
    });
  }
  std::vector<RequestId> last(kThreads, 0);
  for (int left = kThreads * kEvents; left > 0;) {
    ASSERT_TRUE(readable(queue, 60000)) << left << " events never came";
    for (const GenerationEvent& e : queue.take()) {
      RequestId& of = last[e.request / kEvents];
      ASSERT_EQ(e.request % kEvents, of++) << "out of order";
      --left;
    }
  }
}

TEST(EventQueue, HasAnEnginesEvents) {
  Harness h;
  EventQueue queue;
  const Tokens prompt = {5, 6, 7};
  const RequestId id = h.core->submit(request(prompt, greedy(10)), queue.handler());
  while (h.core->step()) {
  }
  Tokens tokens;
  const std::vector<GenerationEvent> events = queue.take();
  for (const GenerationEvent& e : events) {
    EXPECT_EQ(e.request, id);
    tokens.insert(tokens.end(), e.token_ids.begin(), e.token_ids.end());
  }
  EXPECT_EQ(tokens, continuation(prompt, 10));
  EXPECT_TRUE(events.back().last);
}

// The blocks that events say are cached, and that are found again.
TEST(CacheEvents, SayWhichPromptsAreFoundAgain) {
  EngineOptions options = Harness::defaults();
  options.num_pages = 24;
  options.cache_events = true;
  Harness h(options);
  std::mt19937 random(4);
  std::unordered_set<std::uint64_t> cached;
  std::map<std::uint64_t, Tokens> ends;  // all tokens to a block's end
  std::vector<Tokens> prompts;
  for (int i = 0; i < 40; ++i) {
    const Tokens prefix = prompts.empty() ? Tokens() : prompts[random() % prompts.size()];
    prompts.push_back(random_prompt(random, 100 + random() % 500,
                                    Tokens(prefix.begin(), prefix.begin() + std::ssize(prefix) / 2)));
    const Result r = h.generate(prompts.back(), greedy(5));
    std::int64_t expected = 0;
    for (const std::uint64_t block : cached) {
      const Tokens& end = ends.at(block);
      const bool begins =
          end.size() < prompts.back().size() && std::equal(end.begin(), end.end(), prompts.back().begin());
      if (begins) expected = std::max(expected, std::ssize(end));
    }
    EXPECT_EQ(r.usage.cached_tokens, expected) << "request " << i;
    for (const CacheEvent& e : h.core->take_cache_events()) {
      if (e.kind == CacheEvent::Kind::kRemoved) {
        EXPECT_EQ(cached.erase(e.block), 1u);
        continue;
      }
      Tokens end = e.parent ? ends.at(*e.parent) : Tokens();
      end.insert(end.end(), e.tokens.begin(), e.tokens.end());
      ends[e.block] = std::move(end);
      EXPECT_TRUE(cached.insert(e.block).second);
    }
  }
  const EngineLoad load = h.core->load();
  EXPECT_EQ(static_cast<std::size_t>(load.pages_cached), cached.size());
  EXPECT_EQ(load.pages_total, 24);
  EXPECT_EQ(load.pages_used, 0);
  EXPECT_EQ(load.running + load.waiting, 0);
  EXPECT_GT(load.prefix_tokens_hit, 0);
  EXPECT_GT(h.core->stats().pages_evicted, 100);
}

TEST(CacheEvents, AreNotKeptUnlessTheyAreWanted) {
  Harness h;
  h.generate(Tokens(200, 3), greedy(5));
  EXPECT_TRUE(h.core->take_cache_events().empty());
  EXPECT_EQ(h.core->load().pages_cached, 3);
}

TEST(CacheEvents, ALoadCountsWhatWaits) {
  Harness h;
  h.submit({1, 2, 3}, greedy(50));
  EXPECT_EQ(h.core->load().waiting, 1);
  h.core->step();
  EXPECT_EQ(h.core->load().running, 1);
  EXPECT_EQ(h.core->load().pages_used, 1);
  h.run();
}

}  // namespace
}  // namespace flash_mla::engine
