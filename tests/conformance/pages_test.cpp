// Keys and values into pages, and what goes with them: against the definition, on the CPU.

#include "flash_mla/pages.h"

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "flash_mla/error.h"
#include "flash_mla/merge.h"

namespace flash_mla {
namespace {

template <class T>
TensorView view(std::vector<T>& v, DType dtype, std::initializer_list<std::int64_t> shape) {
  return TensorView::contiguous(v.data(), dtype, shape);
}

/// (num_pages, page_size, h, d) of a pool that lies in HND order.
TensorView tokens_first(TensorView v) {
  std::swap(v.shape[1], v.shape[2]);
  std::swap(v.strides[1], v.strides[2]);
  return v;
}

/// Three sequences over pages of 4 tokens, of which the second has no page.
struct Batch {
  std::vector<std::int32_t> indptr{0, 3, 3, 5}, pages{6, 1, 4, 0, 3}, last{2, 0, 4};
  std::vector<std::int64_t> starts{0, 5, 5, 7}, seqlens{0, 0, 0};
  std::vector<std::int32_t> sequences = std::vector<std::int32_t>(7);
  std::vector<std::int64_t> positions = std::vector<std::int64_t>(7);

  Batch() {
    paged_seqlens(view(indptr, DType::kInt32, {4}), view(last, DType::kInt32, {3}), 4,
                  view(seqlens, DType::kInt64, {3}));
    batch_positions(view(starts, DType::kInt64, {4}), view(seqlens, DType::kInt64, {3}),
                    view(sequences, DType::kInt32, {7}), view(positions, DType::kInt64, {7}));
  }
  PageAppendArgs args() {
    PageAppendArgs a;
    a.batch_indices = view(sequences, DType::kInt32, {7});
    a.positions = view(positions, DType::kInt64, {7});
    a.page_indptr = view(indptr, DType::kInt32, {4});
    a.page_indices = view(pages, DType::kInt32, {5});
    return a;
  }
};

TEST(Pages, LengthsAndPositions) {
  const Batch b;
  EXPECT_EQ(b.seqlens, (std::vector<std::int64_t>{10, 0, 8}));
  EXPECT_EQ(b.sequences, (std::vector<std::int32_t>{0, 0, 0, 0, 0, 2, 2}));
  EXPECT_EQ(b.positions, (std::vector<std::int64_t>{5, 6, 7, 8, 9, 6, 7}));
}

TEST(Pages, TokensGoToTheirPlacesAndNowhereElse) {
  constexpr std::int64_t kTokens = 7, kHeads = 3, kPages = 8, kSize = 4;
  Batch b;
  std::mt19937 rng(1);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kUInt8}) {
    for (const bool hnd : {false, true}) {
      const auto element = static_cast<std::int64_t>(dtype_size(dtype));
      const std::int64_t d = 5, d_v = 6;
      std::vector<std::uint8_t> key, value;
      for (std::int64_t i = 0; i < kTokens * kHeads * d * element; ++i)
        key.push_back(static_cast<std::uint8_t>(rng()));
      for (std::int64_t i = 0; i < kTokens * kHeads * d_v * element; ++i) {
        value.push_back(static_cast<std::uint8_t>(rng()));
      }
      const auto pool_bytes = [&](std::int64_t width) {
        return static_cast<std::size_t>(kPages * kSize * kHeads * width * element);
      };
      std::vector<std::uint8_t> k_pool(pool_bytes(d), 0xA5), v_pool(pool_bytes(d_v), 0xA5);
      const auto pool = [&](std::vector<std::uint8_t>& bytes, std::int64_t width) {
        return hnd ? tokens_first(view(bytes, dtype, {kPages, kHeads, kSize, width}))
                   : view(bytes, dtype, {kPages, kSize, kHeads, width});
      };
      PageAppendArgs a = b.args();
      a.key = view(key, dtype, {kTokens, kHeads, d});
      a.value = view(value, dtype, {kTokens, kHeads, d_v});
      a.k_cache = pool(k_pool, d);
      a.v_cache = pool(v_pool, d_v);
      append_pages(a);
      const auto expect = [&](const std::vector<std::uint8_t>& rows, const std::vector<std::uint8_t>& bytes,
                              const TensorView& t, std::int64_t width) {
        std::vector<std::uint8_t> expected(bytes.size(), 0xA5);
        const auto size = static_cast<std::size_t>(width * element);
        for (std::int64_t i = 0; i < kTokens; ++i) {
          const auto sequence = static_cast<std::size_t>(b.sequences[static_cast<std::size_t>(i)]);
          const std::int64_t position = b.positions[static_cast<std::size_t>(i)];
          const std::int64_t page = b.pages[static_cast<std::size_t>(b.indptr[sequence] + position / kSize)];
          for (std::int64_t h = 0; h < kHeads; ++h) {
            const std::int64_t at = page * t.stride(0) + position % kSize * t.stride(1) + h * t.stride(2);
            std::memcpy(expected.data() + at * element, rows.data() + (i * kHeads + h) * width * element,
                        size);
          }
        }
        EXPECT_EQ(bytes, expected) << dtype_name(dtype) << " hnd " << hnd;
      };
      expect(key, k_pool, a.k_cache, d);
      expect(value, v_pool, a.v_cache, d_v);
    }
  }
}

TEST(Pages, BadNumbersAreNamedAndNothingIsWritten) {
  std::vector<float> key(14), pool(64, -1.0f);
  const auto message = [&](const auto& change) -> std::string {
    Batch b;
    PageAppendArgs a = b.args();
    a.key = view(key, DType::kFloat32, {7, 1, 2});
    a.k_cache = view(pool, DType::kFloat32, {8, 4, 1, 2});
    change(b, a);
    std::vector<float> before = pool;
    try {
      append_pages(a);
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(pool, before);
      return e.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message([](Batch& b, PageAppendArgs&) { b.positions[6] = 8; }),
            "positions[6] is 8, expected 0 to 7 (sequence 2 has 2 pages of 4 tokens)");
  EXPECT_EQ(message([](Batch& b, PageAppendArgs&) { b.sequences[0] = 1; }),
            "positions[0] is 5, expected 0 to -1 (sequence 1 has 0 pages of 4 tokens)");
  EXPECT_EQ(message([](Batch& b, PageAppendArgs&) { b.sequences[0] = -1; }),
            "batch_indices[0] is -1, expected 0 to 2 (page_indptr.shape[0] - 2)");
  EXPECT_EQ(message([](Batch& b, PageAppendArgs&) { b.pages[4] = 8; }),
            "page_indices[4] is 8, expected 0 to k_cache.shape[0] (num_pages) - 1 = 7");
  EXPECT_EQ(message([](Batch& b, PageAppendArgs&) { b.indptr[1] = 6; }),
            "page_indptr[1] is 6, expected 0 to 5 (page_indices.shape[0])");
  EXPECT_EQ(message([&](Batch&, PageAppendArgs& a) { a.v_cache = a.k_cache; }),
            "value is not given, expected value and v_cache, or neither");
  EXPECT_EQ(message([](Batch&, PageAppendArgs&) {}), "accepted");
  std::vector<std::int32_t> lengths{1}, starts{0, 2}, out(2);
  EXPECT_THROW(batch_positions(view(starts, DType::kInt32, {2}), view(lengths, DType::kInt32, {1}),
                               view(out, DType::kInt32, {2}), view(out, DType::kInt32, {2})),
               InvalidArgument);
  EXPECT_THROW(paged_seqlens(view(starts, DType::kInt32, {2}), view(lengths, DType::kInt32, {1}), 0,
                             view(lengths, DType::kInt32, {1})),
               InvalidArgument);
}

TEST(MergeInPlace, IsMergeStatesWhereTheMaskLetsThrough) {
  constexpr std::int64_t kTokens = 5, kHeads = 2, kWidth = 3;
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  const auto random = [&](std::int64_t n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& v : x) v = normal(rng);
    return x;
  };
  std::vector<float> out = random(kTokens * kHeads * kWidth), other = random(kTokens * kHeads * kWidth);
  std::vector<float> lse = random(kTokens * kHeads), other_lse = random(kTokens * kHeads);
  std::vector<std::uint8_t> mask{1, 0, 1, 1, 0};
  std::vector<float> merged(out.size()), merged_lse(lse.size());
  const auto values = [&](std::vector<float>& v) {
    return view(v, DType::kFloat32, {1, kTokens, kHeads, kWidth});
  };
  const auto sums = [&](std::vector<float>& v) { return view(v, DType::kFloat32, {1, kHeads, kTokens}); };
  merge_states(values(out), sums(lse), values(other), sums(other_lse), values(merged), sums(merged_lse));
  const std::vector<float> before = out, before_lse = lse;
  merge_states_in_place(values(out), sums(lse), values(other), sums(other_lse),
                        view(mask, DType::kUInt8, {1, kTokens}));
  for (std::size_t t = 0; t < kTokens; ++t) {
    for (std::size_t i = 0; i < kHeads * kWidth; ++i) {
      const std::size_t at = t * kHeads * kWidth + i;
      EXPECT_EQ(out[at], mask[t] != 0 ? merged[at] : before[at]);
    }
    for (std::size_t h = 0; h < kHeads; ++h) {
      const std::size_t at = h * kTokens + t;
      EXPECT_EQ(lse[at], mask[t] != 0 ? merged_lse[at] : before_lse[at]);
    }
  }
  out = before, lse = before_lse;
  merge_states_in_place(values(out), sums(lse), values(other), sums(other_lse));
  EXPECT_EQ(out, merged);
  EXPECT_EQ(lse, merged_lse);
  std::vector<float> narrow(4);
  try {
    merge_states_in_place(values(out), sums(lse), view(narrow, DType::kFloat32, {1, 2, 1, 2}),
                          sums(other_lse));
    FAIL();
  } catch (const InvalidArgument& e) {
    EXPECT_STREQ(e.what(), "other_out.shape[1] is 2, expected out.shape[1] (s_q) = 5");
  }
}

}  // namespace
}  // namespace flash_mla
