#include "kv/page_pool.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <vector>

#include "flash_mla/error.h"

namespace flash_mla::kv {
namespace {

using Tokens = std::vector<std::int32_t>;

// What a model's cache would hold: the token whose latent is in each slot. Written only as a model would
// write, so a page that is used twice, or handed out while somebody reads it, shows as a wrong token.
class Memory {
 public:
  static constexpr std::int32_t kPoison = -7;

  explicit Memory(int num_pages) : slots_(static_cast<std::size_t>(num_pages) * kPageSize, kPoison) {}

  void copy(const PageCopy& c) {
    for (int i = 0; i < kPageSize; ++i) slot(c.target, i) = slot(c.source, i);
  }
  void poison(std::int32_t page) {
    for (int i = 0; i < kPageSize; ++i) slot(page, i) = kPoison;
  }
  void write(const SequencePages& s, std::int64_t position, std::int32_t token) {
    slot(s.pages()[static_cast<std::size_t>(position / kPageSize)], position % kPageSize) = token;
  }
  Tokens read(const SequencePages& s) const {
    Tokens tokens;
    for (std::int64_t i = 0; i < s.num_tokens(); ++i) {
      const auto page = static_cast<std::size_t>(s.pages()[static_cast<std::size_t>(i / kPageSize)]);
      tokens.push_back(slots_[page * kPageSize + static_cast<std::size_t>(i % kPageSize)]);
    }
    return tokens;
  }

 private:
  std::int32_t& slot(std::int32_t page, std::int64_t i) {
    return slots_[static_cast<std::size_t>(page) * kPageSize + static_cast<std::size_t>(i)];
  }
  std::vector<std::int32_t> slots_;
};

struct Pool {
  Pool(int num_pages, bool prefix_cache = true, PagePool::PageHash hash = nullptr)
      : manager(num_pages, prefix_cache, hash), memory(num_pages) {}

  // Brings the cache of `s` to all of `tokens`, as an engine does in a step.
  bool extend(SequencePages& s, const Tokens& tokens) {
    const std::int64_t begin = s.num_tokens();
    const std::set<std::int32_t> before(s.pages().begin(), s.pages().end());
    std::vector<PageCopy> copies;
    const int needed = manager.pages_needed(s, static_cast<std::int64_t>(tokens.size()));
    const int available = manager.num_available();
    const bool ok = manager.reserve(s, static_cast<std::int64_t>(tokens.size()), copies);
    EXPECT_EQ(ok, needed <= available);
    EXPECT_EQ(manager.num_available(), ok ? available - needed : available);
    if (!ok) return false;
    for (const std::int32_t page : s.pages()) {
      if (!before.contains(page)) memory.poison(page);
    }
    for (const PageCopy& c : copies) memory.copy(c);
    for (std::size_t i = static_cast<std::size_t>(begin); i < tokens.size(); ++i) {
      memory.write(s, static_cast<std::int64_t>(i), tokens[i]);
    }
    manager.commit(s, tokens);
    return true;
  }

  PagePool manager;
  Memory memory;
};

Tokens counting(std::size_t count, std::int32_t first = 0) {
  Tokens tokens(count);
  for (std::size_t i = 0; i < count; ++i) tokens[i] = first + static_cast<std::int32_t>(i);
  return tokens;
}

TEST(PagePool, RefusesNoPages) {
  EXPECT_THROW(PagePool(0), InvalidArgument);
  EXPECT_THROW(PagePool(-3), InvalidArgument);
}

TEST(PagePool, PagesAreTakenAsTokensCome) {
  Pool pool(4);
  SequencePages s;
  EXPECT_EQ(pool.manager.admit(s, counting(10)), 0);
  EXPECT_TRUE(pool.extend(s, counting(64)));
  EXPECT_EQ(s.pages().size(), 1u);
  EXPECT_TRUE(pool.extend(s, counting(65)));
  EXPECT_EQ(s.pages().size(), 2u);
  EXPECT_TRUE(pool.extend(s, counting(256)));
  EXPECT_FALSE(pool.extend(s, counting(257)));
  EXPECT_EQ(s.pages().size(), 4u) << "a refused reservation changes nothing";
  EXPECT_EQ(pool.memory.read(s), counting(256));
  pool.manager.release(s);
  EXPECT_EQ(pool.manager.num_used(), 0);
  EXPECT_EQ(pool.manager.num_cached(), 4);
  EXPECT_EQ(pool.manager.num_available(), 4);
}

TEST(PagePool, PrefixIsFoundAgain) {
  Pool pool(16);
  SequencePages a, b, c, d;
  pool.manager.admit(a, counting(200));
  ASSERT_TRUE(pool.extend(a, counting(200)));
  // While it is in use, and after it was let go.
  EXPECT_EQ(pool.manager.admit(b, counting(200)), 192);
  pool.manager.release(a);
  EXPECT_EQ(pool.manager.admit(c, counting(192)), 128) << "one token must be left to compute";
  EXPECT_EQ(pool.manager.admit(d, counting(193, 1)), 0);
  EXPECT_EQ(pool.memory.read(b), counting(192));
  EXPECT_EQ(pool.manager.num_references(b.pages()[0]), 2);
  pool.manager.check();
  for (SequencePages* s : {&b, &c, &d}) pool.manager.release(*s);
}

TEST(PagePool, TwinsEndUpOnTheSamePages) {
  Pool pool(16);
  SequencePages a, b;
  pool.manager.admit(a, counting(100));
  pool.manager.admit(b, counting(100));
  ASSERT_TRUE(pool.extend(a, counting(100)));
  ASSERT_TRUE(pool.extend(b, counting(100)));
  EXPECT_EQ(a.pages()[0], b.pages()[0]);
  EXPECT_NE(a.pages()[1], b.pages()[1]) << "pages that are not full are not shared";
  EXPECT_EQ(pool.manager.num_used(), 3);
  pool.manager.check();
  pool.manager.release(a);
  pool.manager.release(b);
}

TEST(PagePool, ForkCopiesTheSharedPartialPageOnWrite) {
  Pool pool(16);
  SequencePages a;
  pool.manager.admit(a, counting(100));
  ASSERT_TRUE(pool.extend(a, counting(100)));
  SequencePages b = pool.manager.fork(a);
  EXPECT_EQ(pool.manager.num_used(), 2);
  Tokens of_a = counting(101), of_b = counting(101);
  of_b[100] = 4711;
  ASSERT_TRUE(pool.extend(a, of_a));
  ASSERT_TRUE(pool.extend(b, of_b));
  EXPECT_EQ(pool.manager.num_used(), 3);
  EXPECT_EQ(pool.manager.counters().pages_copied, 1) << "the last owner writes in place";
  EXPECT_EQ(pool.memory.read(a), of_a);
  EXPECT_EQ(pool.memory.read(b), of_b);
  pool.manager.check();
  pool.manager.release(a);
  pool.manager.release(b);
}

TEST(PagePool, EvictsTheLeastRecentlyUsedLeafFirst) {
  Pool pool(4);
  SequencePages a, b, c;
  pool.manager.admit(a, counting(128));
  ASSERT_TRUE(pool.extend(a, counting(128)));
  pool.manager.release(a);
  pool.manager.admit(b, counting(128, 1000));
  ASSERT_TRUE(pool.extend(b, counting(128, 1000)));
  pool.manager.release(b);
  EXPECT_EQ(pool.manager.num_cached(), 4);
  pool.manager.admit(c, counting(64, 5000));
  ASSERT_TRUE(pool.extend(c, counting(64, 5000)));
  EXPECT_EQ(pool.manager.counters().pages_evicted, 1);
  EXPECT_EQ(pool.manager.cached_prefix(counting(200)), 64) << "the older chain lost its second page";
  EXPECT_EQ(pool.manager.cached_prefix(counting(200, 1000)), 128);
  pool.manager.check();
  pool.manager.release(c);
}

TEST(PagePool, UntrustedContentsAreForgotten) {
  Pool pool(8);
  SequencePages a, b;
  pool.manager.admit(a, counting(100));
  ASSERT_TRUE(pool.extend(a, counting(64)));
  pool.manager.admit(b, counting(200));
  ASSERT_TRUE(pool.extend(b, counting(200)));
  pool.manager.release(b, /*keep=*/false);
  EXPECT_EQ(pool.manager.cached_prefix(counting(300)), 64) << "what a neighbour uses stays";
  pool.manager.release(a, /*keep=*/false);
  EXPECT_EQ(pool.manager.num_free(), 8);
  pool.manager.check();
}

TEST(PagePool, WithoutPrefixCacheNothingIsKept) {
  Pool pool(8, /*prefix_cache=*/false);
  SequencePages a, b;
  pool.manager.admit(a, counting(200));
  ASSERT_TRUE(pool.extend(a, counting(200)));
  EXPECT_EQ(pool.manager.admit(b, counting(200)), 0);
  pool.manager.release(a);
  EXPECT_EQ(pool.manager.num_free(), 8);
  pool.manager.check();
}

TEST(PagePool, ACollidingPageOfAnotherPrefixIsNoHit) {
  Pool pool(16, true, [](std::uint64_t, std::span<const std::int32_t>) { return std::uint64_t{1}; });
  Tokens of_a = counting(200), of_b = counting(200);
  of_b[0] = 4711;  // the second and third pages have the same tokens
  SequencePages a, b, c;
  pool.manager.admit(a, of_a);
  ASSERT_TRUE(pool.extend(a, of_a));
  pool.manager.admit(b, of_b);
  ASSERT_TRUE(pool.extend(b, of_b));
  EXPECT_EQ(pool.manager.num_used(), 8);
  for (SequencePages* s : {&a, &b}) pool.manager.release(*s);
  pool.manager.admit(c, of_b);
  EXPECT_EQ(pool.memory.read(c), Tokens(of_b.begin(), of_b.begin() + 192));
  pool.manager.check();
  pool.manager.release(c);
}

// Random interleavings of everything, against an oracle that knows each sequence's tokens and nothing of
// pages.
class Interleaving {
 public:
  Interleaving(int num_pages, bool prefix_cache, PagePool::PageHash hash, std::uint64_t seed)
      : pool_(num_pages, prefix_cache, hash), random_(seed) {
    // Texts that agree for a while and then part, at page boundaries and elsewhere.
    for (int i = 0; i < 24; ++i) {
      Tokens text = texts_.empty() ? Tokens() : texts_[below(texts_.size())];
      text.resize(std::min<std::size_t>(text.size(), below(6) * 64 + (below(2) == 0 ? 0 : below(64))));
      while (text.size() < 600) text.push_back(static_cast<std::int32_t>(below(3)));
      texts_.push_back(text);
    }
  }

  void run(int operations) {
    for (int i = 0; i < operations; ++i) {
      const std::size_t choice = below(100);
      if (live_.empty() || (choice < 15 && live_.size() < kMaxLive)) {
        admit();
      } else if (choice < 75) {
        append();
      } else if (choice < 80 && live_.size() < kMaxLive) {
        fork();
      } else if (choice < 85) {
        finish(/*keep=*/true);
      } else if (choice < 87) {
        finish(/*keep=*/false);
      } else {
        preempt();
      }
      if (::testing::Test::HasFailure()) FAIL() << "after operation " << i;
      if (i % 64 == 0) check_everything();
    }
    check_everything();
    while (!live_.empty()) finish(true);
    pool_.manager.check();
    EXPECT_EQ(pool_.manager.num_used(), 0) << "leaked pages";
    EXPECT_EQ(pool_.manager.num_available(), pool_.manager.num_pages());
    EXPECT_GT(refused_, 0) << "the pool was never full: the test is too easy";
  }

  const PagePool::Counters& counters() const { return pool_.manager.counters(); }
  std::int64_t tokens_hit() const { return hit_; }

 private:
  struct Sequence {
    SequencePages pages;
    Tokens tokens;  // of the request; the pages hold the first pages.num_tokens() of them
  };

  static constexpr std::size_t kMaxLive = 12;

  std::size_t below(std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random_); }

  void expect_contents(const Sequence& s) {
    const Tokens expected(s.tokens.begin(), s.tokens.begin() + s.pages.num_tokens());
    EXPECT_EQ(pool_.memory.read(s.pages), expected);
  }

  void admit() {
    Sequence s;
    const Tokens& text = texts_[below(texts_.size())];
    s.tokens.assign(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(1 + below(400)));
    const std::int64_t expected = pool_.manager.cached_prefix(s.tokens);
    const int before = pool_.manager.num_available(), cost = pool_.manager.admission_cost(s.tokens);
    const std::int64_t hit = pool_.manager.admit(s.pages, s.tokens);
    EXPECT_EQ(hit, expected);
    const auto length = static_cast<std::int64_t>(s.tokens.size());
    EXPECT_EQ(cost, before - pool_.manager.num_available() + pool_.manager.pages_needed(s.pages, length));
    hit_ += hit;
    EXPECT_LT(hit, static_cast<std::int64_t>(s.tokens.size()));
    expect_contents(s);
    live_.push_back(std::move(s));
  }

  void append() {
    Sequence& s = live_[below(live_.size())];
    const auto have = static_cast<std::size_t>(s.pages.num_tokens());
    if (have == s.tokens.size()) {
      // Generated tokens; often the same ones, so that generated pages are found again too.
      const std::size_t count = below(8) == 0 ? 1 + below(100) : 1;
      for (std::size_t i = 0; i < count; ++i) s.tokens.push_back(static_cast<std::int32_t>(below(8) == 0));
    }
    const std::size_t chunk = 1 + below(s.tokens.size() - have);
    const Tokens upto(s.tokens.begin(), s.tokens.begin() + static_cast<std::ptrdiff_t>(have + chunk));
    const bool extended = pool_.extend(s.pages, upto);
    expect_contents(s);
    if (!extended) {
      ++refused_;
      finish(/*keep=*/true);
      return;
    }
    if (s.tokens.size() > 900) finish_at(static_cast<std::size_t>(&s - live_.data()), true);
  }

  void fork() {
    const std::size_t which = below(live_.size());
    Sequence copy;
    copy.pages = pool_.manager.fork(live_[which].pages);
    copy.tokens = live_[which].tokens;
    copy.tokens.resize(static_cast<std::size_t>(copy.pages.num_tokens()));
    if (copy.tokens.empty()) copy.tokens.push_back(1);
    expect_contents(copy);
    live_.push_back(std::move(copy));
  }

  void finish(bool keep) { finish_at(below(live_.size()), keep); }

  void finish_at(std::size_t which, bool keep) {
    pool_.manager.release(live_[which].pages, keep);
    if (which + 1 != live_.size()) live_[which] = std::move(live_.back());
    live_.pop_back();
  }

  void preempt() {
    Sequence& s = live_[below(live_.size())];
    pool_.manager.release(s.pages);
    EXPECT_EQ(s.pages.num_tokens(), 0);
    pool_.manager.admit(s.pages, s.tokens);
    expect_contents(s);
  }

  void check_everything() {
    pool_.manager.check();
    std::map<std::int32_t, int> owners;
    for (const Sequence& s : live_) {
      expect_contents(s);
      for (const std::int32_t page : s.pages.pages()) ++owners[page];
    }
    EXPECT_EQ(pool_.manager.num_used(), static_cast<int>(owners.size())) << "leaked or lost pages";
    for (const auto& [page, count] : owners) EXPECT_EQ(pool_.manager.num_references(page), count);
  }

  Pool pool_;
  std::mt19937_64 random_;
  std::vector<Tokens> texts_;
  std::vector<Sequence> live_;
  int refused_ = 0;
  std::int64_t hit_ = 0;
};

TEST(PagePool, RandomInterleavings) {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    SCOPED_TRACE(seed);
    Interleaving test(/*num_pages=*/16 + static_cast<int>(seed), true, nullptr, seed);
    test.run(10000);
    EXPECT_GT(test.tokens_hit(), 0);
    EXPECT_GT(test.counters().pages_evicted, 300);
    EXPECT_GT(test.counters().pages_copied, 100);
    if (HasFailure()) return;
  }
}

TEST(PagePool, RandomInterleavingsWhereEveryHashCollides) {
  Interleaving test(
      40, true, [](std::uint64_t, std::span<const std::int32_t>) { return std::uint64_t{1}; }, 42);
  test.run(10000);
  EXPECT_GT(test.tokens_hit(), 0);
}

TEST(PagePool, RandomInterleavingsWithoutPrefixCache) {
  Interleaving test(20, false, nullptr, 43);
  test.run(10000);
  EXPECT_EQ(test.tokens_hit(), 0);
}

}  // namespace
}  // namespace flash_mla::kv
