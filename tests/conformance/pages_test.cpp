// Keys and values into pages, and what goes with them: on every backend, against the definition.

#include "flash_mla/pages.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "flash_mla/error.h"
#include "flash_mla/merge.h"
#include "tensor.h"

namespace flash_mla::conformance {
namespace {

/// (num_pages, page_size, h, d) of a pool that lies in HND order.
TensorView tokens_first(TensorView v) {
  std::swap(v.shape[1], v.shape[2]);
  std::swap(v.strides[1], v.strides[2]);
  return v;
}

constexpr std::size_t kTokens = 7;

/// Three sequences over pages of 4 tokens, of which the second has no page.
struct Batch {
  Tensor indptr, pages, last, starts, seqlens, sequences, positions;

  explicit Batch(BackendUnderTest& b)
      : indptr(b, DType::kInt32, {4}, std::vector{0, 3, 3, 5}),
        pages(b, DType::kInt32, {5}, std::vector{6, 1, 4, 0, 3}),
        last(b, DType::kInt32, {3}, std::vector{2, 0, 4}),
        starts(b, DType::kInt64, {4}, std::vector{0, 5, 5, 7}),
        seqlens(b, DType::kInt64, {3}),
        sequences(b, DType::kInt32, {kTokens}),
        positions(b, DType::kInt64, {kTokens}) {
    paged_seqlens(indptr.view, last.view, 4, seqlens.view);
    batch_positions(starts.view, seqlens.view, sequences.view, positions.view);
    for (Tensor* t : {&seqlens, &sequences, &positions}) t->download();
  }
  PageAppendArgs args() const {
    PageAppendArgs a;
    a.batch_indices = sequences.view;
    a.positions = positions.view;
    a.page_indptr = indptr.view;
    a.page_indices = pages.view;
    return a;
  }
  /// Where token i lies, as it is said on the host.
  std::pair<std::int64_t, std::int64_t> place(std::size_t i) const {
    const auto first = static_cast<std::size_t>(indptr[static_cast<std::size_t>(sequences[i])]);
    const auto position = static_cast<std::int64_t>(positions[i]);
    return {static_cast<std::int64_t>(pages[first + static_cast<std::size_t>(position / 4)]), position % 4};
  }
};

class Pages : public testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {};

TEST_P(Pages, LengthsAndPositions) {
  const Batch b(*GetParam());
  EXPECT_EQ(b.seqlens.values(), (std::vector<double>{10, 0, 8}));
  EXPECT_EQ(b.sequences.values(), (std::vector<double>{0, 0, 0, 0, 0, 2, 2}));
  EXPECT_EQ(b.positions.values(), (std::vector<double>{5, 6, 7, 8, 9, 6, 7}));
}

TEST_P(Pages, PositionsOfManySequences) {
  // More tokens than a block has threads; sequences without new tokens at both ends and between.
  std::mt19937 rng(2);
  std::vector<std::int64_t> starts{0}, lengths, sequences, positions;
  for (std::int64_t i = 0; i < 300; ++i) {
    const std::int64_t count = i % 7 == 0 || i == 299 ? 0 : static_cast<std::int64_t>(rng() % 9);
    const std::int64_t before = static_cast<std::int64_t>(rng() % 5000);
    lengths.push_back(before + count);
    starts.push_back(starts.back() + count);
    for (std::int64_t j = 0; j < count; ++j) {
      sequences.push_back(i);
      positions.push_back(before + j);
    }
  }
  const auto n = static_cast<std::int64_t>(sequences.size());
  const Tensor t_starts(*GetParam(), DType::kInt32, {301}, starts),
      t_lengths(*GetParam(), DType::kInt64, {300}, lengths);
  Tensor got_sequences(*GetParam(), DType::kInt64, {n}), got_positions(*GetParam(), DType::kInt32, {n});
  batch_positions(t_starts.view, t_lengths.view, got_sequences.view, got_positions.view);
  got_sequences.download();
  got_positions.download();
  EXPECT_EQ(got_sequences.values(), std::vector<double>(sequences.begin(), sequences.end()));
  EXPECT_EQ(got_positions.values(), std::vector<double>(positions.begin(), positions.end()));
}

/// One call of random bytes: every token at its place, everything else as it was.
void expect_places(BackendUnderTest& backend, const Batch& b, DType dtype, bool hnd, std::int64_t heads,
                   std::int64_t d, std::int64_t d_v, unsigned seed) {
  constexpr std::int64_t kPages = 8, kSize = 4;
  const auto element = static_cast<std::int64_t>(dtype_size(dtype));
  std::mt19937 rng(seed);
  const auto rows = [&](std::int64_t width) {
    Tensor t(backend, dtype, {static_cast<std::int64_t>(kTokens), heads, width});
    for (std::uint8_t& byte : t.bytes) byte = static_cast<std::uint8_t>(rng());
    t.upload();
    return t;
  };
  const Tensor key = rows(d), value = rows(d_v);
  const auto pool = [&](std::int64_t width) {
    const std::vector<std::int64_t> shape =
        hnd ? std::vector{kPages, heads, kSize, width} : std::vector{kPages, kSize, heads, width};
    return Tensor(backend, dtype, shape);
  };
  Tensor k_pool = pool(d), v_pool = pool(d_v);
  PageAppendArgs a = b.args();
  a.key = key.view;
  a.value = value.view;
  a.k_cache = hnd ? tokens_first(k_pool.view) : k_pool.view;
  a.v_cache = hnd ? tokens_first(v_pool.view) : v_pool.view;
  append_pages(a);
  const auto expect = [&](const Tensor& from, Tensor& got, const TensorView& t, std::int64_t width) {
    got.download();
    std::vector<std::uint8_t> expected(got.bytes.size(), 0xFF);
    for (std::size_t i = 0; i < kTokens; ++i) {
      const auto [page, slot] = b.place(i);
      for (std::int64_t h = 0; h < heads; ++h) {
        const std::int64_t at = page * t.stride(0) + slot * t.stride(1) + h * t.stride(2);
        std::memcpy(expected.data() + at * element,
                    from.bytes.data() + (static_cast<std::int64_t>(i) * heads + h) * width * element,
                    static_cast<std::size_t>(width * element));
      }
    }
    EXPECT_EQ(got.bytes, expected) << dtype_name(dtype) << " hnd " << hnd << " h " << heads << " d " << width;
  };
  expect(key, k_pool, a.k_cache, d);
  expect(value, v_pool, a.v_cache, d_v);
}

TEST_P(Pages, TokensGoToTheirPlacesAndNowhereElse) {
  const Batch b(*GetParam());
  unsigned seed = 1;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kUInt8}) {
    for (const bool hnd : {false, true}) {
      expect_places(*GetParam(), b, dtype, hnd, 3, 5, 6, seed++);
      expect_places(*GetParam(), b, dtype, hnd, 8, 128, 128, seed++);
      expect_places(*GetParam(), b, dtype, hnd, 1, 576, 512, seed++);
      expect_places(*GetParam(), b, dtype, hnd, 40, 192, 132, seed++);  // more than a warp holds
    }
  }
}

// Where nobody reads numbers on the host, tokens without a place are written nowhere.
TEST_P(Pages, TokensWithoutAPlaceArePassedOver) {
  if (GetParam()->checks_values()) return;
  Batch b(*GetParam());
  b.sequences.put(0, -1);
  b.sequences.put(1, 3);
  b.positions.put(2, -1);
  b.positions.put(3, 12);
  b.positions.put(6, 8);  // sequence 2 has 8 tokens
  b.pages.put(1, 8);      // of positions 4 to 7 of sequence 0
  for (Tensor* t : {&b.sequences, &b.positions, &b.pages}) t->upload();
  const Tensor key = Tensor::random(*GetParam(), DType::kFloat32, {7, 1, 2}, 1);
  Tensor pool(*GetParam(), DType::kFloat32, {8, 4, 1, 2});
  PageAppendArgs a = b.args();
  a.key = key.view;
  a.k_cache = pool.view;
  append_pages(a);
  std::vector<std::uint8_t> expected = pool.bytes;
  pool.download();
  std::memcpy(&expected[std::size_t{136}], &key.bytes[std::size_t{32}], 8);  // token 4: slot 1 of page 4
  std::memcpy(&expected[std::size_t{112}], &key.bytes[std::size_t{40}], 8);  // token 5: slot 2 of page 3
  EXPECT_EQ(pool.bytes, expected);
  // Tokens behind all sequences.
  Tensor more(*GetParam(), DType::kInt32, {9}), positions(*GetParam(), DType::kInt64, {9});
  batch_positions(b.starts.view, b.seqlens.view, more.view, positions.view);
  more.download();
  positions.download();
  EXPECT_EQ(more.values(), (std::vector<double>{0, 0, 0, 0, 0, 2, 2, -1, -1}));
  EXPECT_EQ(positions[8], -1);
}

TEST_P(Pages, BadNumbersAreNamedAndNothingIsWritten) {
  const Tensor key = Tensor::random(*GetParam(), DType::kFloat32, {7, 1, 2}, 4);
  Tensor pool = Tensor::random(*GetParam(), DType::kFloat32, {8, 4, 1, 2}, 5);
  const auto message = [&](const auto& change) -> std::string {
    Batch b(*GetParam());
    PageAppendArgs a = b.args();
    a.key = key.view;
    a.k_cache = pool.view;
    change(b, a);
    for (Tensor* t : {&b.sequences, &b.positions, &b.pages, &b.indptr}) t->upload();
    const std::vector<std::uint8_t> before = pool.bytes;
    try {
      append_pages(a);
    } catch (const InvalidArgument& e) {
      pool.download();
      EXPECT_EQ(pool.bytes, before);
      return e.what();
    }
    pool.download();
    return "accepted";
  };
  EXPECT_EQ(message([&](Batch&, PageAppendArgs& a) { a.v_cache = a.k_cache; }),
            "value is not given, expected value and v_cache, or neither");
  EXPECT_EQ(message([](Batch&, PageAppendArgs&) {}), "accepted");
  const Tensor starts(*GetParam(), DType::kInt32, {2}, std::vector{0, 2}),
      lengths(*GetParam(), DType::kInt32, {1}, std::vector{1});
  EXPECT_THROW(paged_seqlens(starts.view, lengths.view, 0, lengths.view), InvalidArgument);
  EXPECT_THROW(paged_seqlens(lengths.view, lengths.view, 4, lengths.view), InvalidArgument);
  if (!GetParam()->checks_values()) return;
  EXPECT_EQ(message([](Batch& b, PageAppendArgs&) { b.positions.put(6, 8); }),
            "positions[6] is 8, expected 0 to 7 (sequence 2 has 2 pages of 4 tokens)");
  EXPECT_EQ(message([](Batch& b, PageAppendArgs&) { b.sequences.put(0, 1); }),
            "positions[0] is 5, expected 0 to -1 (sequence 1 has 0 pages of 4 tokens)");
  EXPECT_EQ(message([](Batch& b, PageAppendArgs&) { b.sequences.put(0, -1); }),
            "batch_indices[0] is -1, expected 0 to 2 (page_indptr.shape[0] - 2)");
  EXPECT_EQ(message([](Batch& b, PageAppendArgs&) { b.pages.put(4, 8); }),
            "page_indices[4] is 8, expected 0 to k_cache.shape[0] (num_pages) - 1 = 7");
  EXPECT_EQ(message([](Batch& b, PageAppendArgs&) { b.indptr.put(1, 6); }),
            "page_indptr[1] is 6, expected 0 to 5 (page_indices.shape[0])");
  Tensor out(*GetParam(), DType::kInt32, {2});
  EXPECT_THROW(batch_positions(starts.view, lengths.view, out.view, out.view), InvalidArgument);
}

TEST_P(Pages, MergeInPlaceIsMergeStatesWhereTheMaskLetsThrough) {
  constexpr std::int64_t kQueries = 5, kHeads = 2, kWidth = 3;
  const auto values = [&](unsigned seed) {
    return Tensor::random(*GetParam(), DType::kFloat32, {1, kQueries, kHeads, kWidth}, seed);
  };
  const auto sums = [&](unsigned seed) {
    return Tensor::random(*GetParam(), DType::kFloat32, {1, kHeads, kQueries}, seed);
  };
  Tensor out = values(1), lse = sums(2), merged = values(3), merged_lse = sums(4);
  const Tensor other = values(5), other_lse = sums(6), before = values(1), before_lse = sums(2);
  const Tensor mask(*GetParam(), DType::kUInt8, {1, kQueries}, std::vector{1, 0, 1, 1, 0});
  merge_states(out.view, lse.view, other.view, other_lse.view, merged.view, merged_lse.view);
  merge_states_in_place(out.view, lse.view, other.view, other_lse.view, mask.view);
  for (Tensor* t : {&out, &lse, &merged, &merged_lse}) t->download();
  for (std::size_t t = 0; t < kQueries; ++t) {
    for (std::size_t i = 0; i < kHeads * kWidth; ++i) {
      const std::size_t at = t * kHeads * kWidth + i;
      EXPECT_EQ(out[at], mask[t] != 0 ? merged[at] : before[at]);
    }
    for (std::size_t h = 0; h < kHeads; ++h) {
      const std::size_t at = h * kQueries + t;
      EXPECT_EQ(lse[at], mask[t] != 0 ? merged_lse[at] : before_lse[at]);
    }
  }
  out.bytes = before.bytes, lse.bytes = before_lse.bytes;
  out.upload();
  lse.upload();
  merge_states_in_place(out.view, lse.view, other.view, other_lse.view);
  out.download();
  lse.download();
  EXPECT_EQ(out.bytes, merged.bytes);
  EXPECT_EQ(lse.bytes, merged_lse.bytes);
  const Tensor narrow(*GetParam(), DType::kFloat32, {1, 2, 1, 2});
  try {
    merge_states_in_place(out.view, lse.view, narrow.view, other_lse.view);
    FAIL();
  } catch (const InvalidArgument& e) {
    EXPECT_STREQ(e.what(), "other_out.shape[1] is 2, expected out.shape[1] (s_q) = 5");
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Pages, testing::ValuesIn(backends_under_test()),
                         [](const auto& backend) { return backend.param->name(); });

}  // namespace
}  // namespace flash_mla::conformance
