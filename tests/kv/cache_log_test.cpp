#include "kv/cache_log.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "kv/page_pool.h"

namespace flash_mla::kv {
namespace {

using Tokens = std::vector<std::int32_t>;

// Who plays events back: by block, all tokens from the sequence's first to the block's last. Two pages may have the same
// block where hashes collide.
class Replay {
 public:
  void play(const std::vector<CacheEvent>& events) {
    for (const CacheEvent& e : events) {
      if (e.kind == CacheEvent::Kind::kStored) {
        store(e);
      } else {
        const auto it = prefixes_.find(e.block);
        ASSERT_NE(it, prefixes_.end()) << "removed, and was never stored";
        prefixes_.erase(it);
      }
    }
  }

  // Sorted.
  std::vector<Tokens> prefixes() const {
    std::vector<Tokens> out;
    for (const auto& [block, tokens] : prefixes_) out.push_back(tokens);
    std::ranges::sort(out);
    return out;
  }

 private:
  void store(const CacheEvent& e) {
    ASSERT_EQ(std::ssize(e.tokens), kPageSize);
    Tokens tokens;
    if (e.parent) {
      const auto parent = prefixes_.find(*e.parent);
      ASSERT_NE(parent, prefixes_.end()) << "stored behind a block that is not there";
      tokens = parent->second;
    }
    tokens.insert(tokens.end(), e.tokens.begin(), e.tokens.end());
    prefixes_.emplace(e.block, std::move(tokens));
  }

  std::multimap<std::uint64_t, Tokens> prefixes_;
};

// Sequences that come, grow and go in a pool, and every prefix that they may have left in its cache.
class Traffic {
 public:
  Traffic(int num_pages, std::uint64_t seed) : pool_(num_pages, true, nullptr, &log_), random_(seed) {
    for (int i = 0; i < 20; ++i) {
      Tokens text = texts_.empty() ? Tokens() : texts_[below(texts_.size())];
      text.resize(std::min(text.size(), below(6) * kPageSize + below(2) * below(kPageSize)));
      while (text.size() < 600) text.push_back(static_cast<std::int32_t>(below(3)));
      texts_.push_back(std::move(text));
    }
  }
  ~Traffic() {
    while (!live_.empty()) finish(true);
  }
  Traffic(const Traffic&) = delete;
  Traffic& operator=(const Traffic&) = delete;

  // A few operations, as a step has them.
  void step() {
    for (std::size_t i = 1 + below(4); i > 0; --i) {
      if (live_.empty() || (below(4) == 0 && live_.size() < 8)) {
        admit();
      } else if (below(4) != 0) {
        grow();
      } else {
        finish(below(6) != 0);
      }
    }
    log_.hand_over();
  }

  // By asking the pool for each.
  std::vector<Tokens> cached() const {
    std::vector<Tokens> out;
    for (const Tokens& text : texts_) {
      Tokens probe = text;
      probe.push_back(-1);  // what is asked for has one token more than is found
      const auto found = static_cast<std::ptrdiff_t>(pool_.cached_prefix(probe));
      for (std::ptrdiff_t end = kPageSize; end <= found; end += kPageSize) {
        out.emplace_back(text.begin(), text.begin() + end);
      }
    }
    std::ranges::sort(out);
    out.erase(std::unique(out.begin(), out.end()), out.end());
    return out;
  }

  CacheLog& log() { return log_; }
  const PagePool& pool() const { return pool_; }

 private:
  struct Sequence {
    SequencePages pages;
    const Tokens* text = nullptr;
  };

  std::size_t below(std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random_); }

  void admit() {
    Sequence s;
    s.text = &texts_[below(texts_.size())];
    pool_.admit(s.pages, *s.text);
    live_.push_back(std::move(s));
  }

  void grow() {
    const std::size_t which = below(live_.size());
    Sequence& s = live_[which];
    const auto have = static_cast<std::size_t>(s.pages.num_tokens());
    const std::size_t size = std::min(have + 1 + below(150), s.text->size());
    std::vector<PageCopy> copies;
    if (!pool_.reserve(s.pages, static_cast<std::int64_t>(size), copies)) return finish_at(which, true);
    pool_.commit(s.pages, std::span(*s.text).first(size));
  }

  void finish(bool keep) { finish_at(below(live_.size()), keep); }
  void finish_at(std::size_t which, bool keep) {
    pool_.release(live_[which].pages, keep);
    std::swap(live_[which], live_.back());
    live_.pop_back();
  }

  CacheLog log_;
  PagePool pool_;
  std::mt19937_64 random_;
  std::vector<Tokens> texts_;
  std::vector<Sequence> live_;
};

TEST(CacheLog, SaysWhatComesAndWhatGoes) {
  CacheLog log(3);
  PagePool pool(2, true, nullptr, &log);
  const Tokens text(130, 7);
  SequencePages s;
  std::vector<PageCopy> copies;
  pool.admit(s, text);
  ASSERT_TRUE(pool.reserve(s, 128, copies));
  pool.commit(s, std::span(text).first(128));
  EXPECT_TRUE(log.take().empty()) << "nothing is told within a step";
  log.hand_over();
  std::vector<CacheEvent> events = log.take();
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].kind, CacheEvent::Kind::kStored);
  EXPECT_EQ(events[0].rank, 3);
  EXPECT_EQ(events[0].parent, std::nullopt);
  EXPECT_EQ(events[1].parent, events[0].block);
  EXPECT_EQ(events[1].tokens, Tokens(64, 7));
  EXPECT_TRUE(log.take().empty());

  pool.release(s);
  pool.admit(s, Tokens(70, 8));
  ASSERT_TRUE(pool.reserve(s, 70, copies));  // takes both pages, the leaf first
  log.hand_over();
  const std::vector<CacheEvent> gone = log.take();
  ASSERT_EQ(gone.size(), 2u);
  EXPECT_EQ(gone[0].kind, CacheEvent::Kind::kRemoved);
  EXPECT_EQ(gone[0].block, events[1].block);
  EXPECT_EQ(gone[1].block, events[0].block);
  pool.release(s);
}

TEST(CacheLog, EqualTokensAreTheSameBlockInEveryPool) {
  std::vector<std::vector<CacheEvent>> told;
  for (const int pages : {3, 50}) {
    CacheLog log;
    PagePool pool(pages, true, nullptr, &log);
    const Tokens text(192, 5);
    SequencePages s;
    std::vector<PageCopy> copies;
    ASSERT_TRUE(pool.reserve(s, 192, copies));
    pool.commit(s, text);
    log.hand_over();
    told.push_back(log.take());
    pool.release(s);
  }
  ASSERT_EQ(told[0].size(), 3u);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(told[0][i].block, told[1][i].block);
  EXPECT_NE(told[0][0].block, told[0][1].block) << "of all tokens before, too";
}

TEST(CacheLog, PlayedBackTheEventsGiveExactlyTheCachedBlocks) {
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    SCOPED_TRACE(seed);
    Traffic traffic(12 + 3 * static_cast<int>(seed), seed);
    Replay replay;
    for (int step = 0; step < 3000; ++step) {
      traffic.step();
      if (step % 7 != 0) continue;
      replay.play(traffic.log().take());
      if (HasFatalFailure()) return;
      ASSERT_EQ(replay.prefixes(), traffic.cached()) << "after step " << step;
    }
    EXPECT_GT(traffic.pool().counters().pages_evicted, 300);
  }
}

TEST(CacheLog, StaysSmallWhereNobodyTakes) {
  Traffic traffic(24, 99);
  Replay replay;
  for (int step = 0; step < 100; ++step) traffic.step();
  replay.play(traffic.log().take());
  for (int step = 0; step < 60000; ++step) traffic.step();
  EXPECT_GT(traffic.pool().counters().pages_evicted, 20000) << "too little has happened";
  const std::vector<CacheEvent> events = traffic.log().take();
  EXPECT_LT(events.size(), 5000u);
  replay.play(events);
  EXPECT_EQ(replay.prefixes(), traffic.cached());
}

TEST(CacheLog, IsTakenWhileItIsWritten) {
  Traffic traffic(20, 5);
  Replay replay;
  std::atomic<bool> done = false;
  std::thread reader([&] {
    while (!done) replay.play(traffic.log().take());
  });
  for (int step = 0; step < 5000; ++step) traffic.step();
  done = true;
  reader.join();
  replay.play(traffic.log().take());
  EXPECT_EQ(replay.prefixes(), traffic.cached());
}

}  // namespace
}  // namespace flash_mla::kv
