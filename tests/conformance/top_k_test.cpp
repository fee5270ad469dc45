// The contracts of top_k (include/flash_mla/top_k.h), on every backend. What is expected comes from
// reference::top_k, a sort of the row, which the first test holds to the definition itself.

#include "flash_mla/top_k.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "flash_mla/error.h"
#include "guarded.h"

namespace flash_mla::conformance {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Row = std::vector<float>;

/// Rows of one call. They lie in one matrix, each from its own column on; everything around them is NaN, which
/// would be selected first if it were read.
struct TopKProblem {
  std::vector<Row> rows{};
  int k = 128;
  bool starts = false;
  std::vector<std::int32_t> offsets{};
  std::vector<std::int32_t> table{};  ///< (b, max_blocks)
  std::int64_t requests = 1, page_size = 64;
  std::vector<std::int32_t> row_request{};

  std::vector<std::int32_t> run(BackendUnderTest* backend, int num_threads = 2) const {
    const auto n = static_cast<std::int64_t>(rows.size());
    std::size_t width = 1;
    for (std::size_t i = 0; i < rows.size(); ++i) width = std::max(width, rows[i].size() + start(i) + 3);
    const std::size_t stride = width + 5;
    std::vector<float> logits(stride * rows.size(), kNan);
    std::vector<std::int32_t> lengths, starts_;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      std::copy(rows[i].begin(), rows[i].end(),
                logits.begin() + static_cast<std::int64_t>(stride * i + start(i)));
      lengths.push_back(static_cast<std::int32_t>(rows[i].size()));
      starts_.push_back(static_cast<std::int32_t>(start(i)));
    }
    std::vector<std::int32_t> out(rows.size() * static_cast<std::size_t>(k), 0x7ABCDEF0);
    TopKArgs a;
    a.logits = TensorView::contiguous(logits.data(), DType::kFloat32, {n, static_cast<std::int64_t>(width)});
    a.logits.strides[0] = static_cast<std::int64_t>(stride);
    a.lengths = ints(lengths, {n});
    if (starts) a.row_starts = ints(starts_, {n});
    if (!offsets.empty()) a.output.offsets = ints(offsets, {n});
    if (!table.empty()) {
      a.output.block_table = ints(table, {requests, static_cast<std::int64_t>(table.size()) / requests});
      a.output.page_size = page_size;
    }
    if (!row_request.empty()) a.output.row_request = ints(row_request, {n});
    a.indices = ints(out, {n, k});
    if (backend == nullptr) {
      reference::top_k(a);
      return out;
    }
    std::vector<std::unique_ptr<Guarded>> memory;
    const auto upload = [&](TensorView& v, std::size_t bytes) {
      if (!v.defined()) return;
      memory.push_back(std::make_unique<Guarded>(*backend, bytes));
      memory.back()->upload(v.data);
      v.data = memory.back()->data();
      v.device = backend->device();
    };
    upload(a.logits, logits.size() * 4);
    for (TensorView* v : {&a.lengths, &a.row_starts, &a.output.offsets, &a.output.block_table,
                          &a.output.row_request, &a.indices}) {
      if (v->defined()) upload(*v, static_cast<std::size_t>(v->numel()) * 4);
    }
    const TopKOptions options{.num_threads = num_threads};
    const std::size_t bytes = top_k_workspace_size(a, options);
    Guarded workspace(*backend, bytes);
    top_k(a, bytes > 0 ? workspace.data() : nullptr, bytes, options);
    workspace.download();
    const std::vector<std::uint8_t> raw = memory.back()->download();
    if (!raw.empty()) std::memcpy(out.data(), raw.data(), raw.size());
    return out;
  }

 private:
  std::size_t start(std::size_t i) const { return starts ? i * 7 % 23 : 0; }
  static TensorView ints(const std::vector<std::int32_t>& v, std::initializer_list<std::int64_t> shape) {
    return TensorView::contiguous(const_cast<std::int32_t*>(v.data()), DType::kInt32, shape);
  }
};

Row random_row(std::size_t n, unsigned seed, float scale = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Row row(n);
  for (float& x : row) x = normal(rng) * scale;
  return row;
}

/// The rows of which others are known to fail on one, and then some; n scores each.
std::vector<Row> hard_rows(std::size_t n, std::size_t k, unsigned seed) {
  std::vector<Row> rows;
  const auto add = [&](auto&& score) {
    Row row(n);
    for (std::size_t j = 0; j < n; ++j) row[j] = score(j);
    rows.push_back(std::move(row));
  };
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> uniform;
  const auto real = [&] { return uniform(rng); };
  add([](std::size_t) { return 0.25f; });                                      // all equal
  add([](std::size_t j) { return j % 2 == 0 ? 0.0f : -0.0f; });                // all zeros, of both signs
  add([&](std::size_t) { return 1.0f + real() * 0x1p-12f; });                  // one fp16 and bf16 bin
  add([&](std::size_t) { return 1.0f + std::floor(real() * 4) * 0x1p-23f; });  // four neighbours
  add([](std::size_t j) { return static_cast<float>(j); });                    // ascending
  add([](std::size_t j) { return -static_cast<float>(j); });                   // descending, negative
  add([&](std::size_t) { return real() < 0.02f ? real() : 0.0f; });            // ReLU: few above zero
  add([&](std::size_t) { return real() < 0.9f ? 0.0f : real() - 0.5f; });      // and some below
  add([&](std::size_t) { return -1.0f - real(); });                            // negative only
  add([&](std::size_t) { return (real() - 0.5f) * 0x1p-130f; });               // denormals
  add([&](std::size_t j) { return j == n / 2 ? 1e30f : real() * 1e-20f; });    // one outlier
  add([&](std::size_t) { return std::floor(real() * 32) / 16 - 1; });          // values on edges of bins
  add([&](std::size_t) { return real() < 0.5f ? -kInf : real(); });            // half masked
  add([&](std::size_t) { return real() < 0.001f ? real() : -kInf; });          // fewer than k are not -inf
  add([&](std::size_t j) { return j % 97 == 0 ? kInf : real(); });             // +inf
  add([&](std::size_t j) {
    return j % 101 == 3 ? (j % 2 != 0 ? kNan : -kNan) : j % 103 == 4 ? kInf : real();
  });
  add([](std::size_t) { return kNan; });
  add([](std::size_t) { return -kInf; });
  // Exactly k, and k plus or minus one, above a plateau: the boundary falls on it or beside it.
  for (int delta : {-1, 0, 1}) {
    const std::size_t above = static_cast<std::size_t>(static_cast<std::int64_t>(k) + delta);
    add([&](std::size_t j) { return j * 7919 % n < above ? 2.0f + real() : 1.0f; });
  }
  rows.push_back(random_row(n, seed + 1));
  rows.push_back(random_row(n, seed + 2, 1e30f));
  return rows;
}

class TopK : public ::testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {
 protected:
  BackendUnderTest& backend() { return *GetParam(); }
  void SetUp() override {
    if (!backend().supports_top_k()) GTEST_SKIP() << "the backend has no top_k";
  }
  void expect_reference(const TopKProblem& p) {
    const auto want = p.run(nullptr), got = p.run(&backend());
    for (std::size_t i = 0; i < p.rows.size(); ++i) {
      const auto row = [&](const std::vector<std::int32_t>& v) {
        const auto* first = v.data() + i * static_cast<std::size_t>(p.k);
        return std::vector<std::int32_t>(first, first + p.k);
      };
      ASSERT_EQ(row(got), row(want)) << "row " << i << " of " << p.rows[i].size() << " scores, k " << p.k;
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Backends, TopK, ::testing::ValuesIn(backends_under_test()),
                         [](const auto& b) { return b.param->name(); });

TEST_P(TopK, ReferenceIsTheDefinition) {
  for (const Row& row : hard_rows(300, 128, 11)) {
    const auto got = TopKProblem{.rows = {row}, .k = 128}.run(nullptr);
    ASSERT_TRUE(std::is_sorted(got.begin(), got.end()));
    std::vector<bool> taken(row.size());
    for (const std::int32_t j : got) taken[static_cast<std::size_t>(j)] = true;
    ASSERT_EQ(std::count(taken.begin(), taken.end(), true), 128);
    // Nothing left out comes before anything that was taken.
    const auto before = [&](std::size_t a, std::size_t b) {
      if (std::isnan(row[a]) != std::isnan(row[b])) return std::isnan(row[a]);
      if (!std::isnan(row[a]) && row[a] != row[b]) return row[a] > row[b];
      return a < b;
    };
    for (std::size_t a = 0; a < row.size(); ++a) {
      for (std::size_t b = 0; b < row.size(); ++b) {
        ASSERT_TRUE(taken[a] || !taken[b] || before(b, a));
      }
    }
  }
}

TEST_P(TopK, NumericsOfHardRows) {
  for (const int k : {128, 512, 1024, 2048, 4096}) {
    for (const std::size_t n : {std::size_t{5000}, std::size_t{16387}}) {
      expect_reference({.rows = hard_rows(n, static_cast<std::size_t>(k), 3), .k = k, .starts = true});
    }
  }
}

TEST_P(TopK, NumericsOfLongRows) {
  for (const std::size_t n : {std::size_t{131072}, std::size_t{1} << 20}) {
    expect_reference({.rows = hard_rows(n, 2048, 5), .k = 2048});
  }
}

TEST_P(TopK, NumericsOfEveryLength) {
  for (const int k : {1, 37, 128}) {
    TopKProblem p{.k = k, .starts = true};
    for (std::size_t n = 0; n < 300; ++n) p.rows.push_back(random_row(n, static_cast<unsigned>(n)));
    expect_reference(p);
  }
  for (const int k : {512, 1000, 2048, 4096}) {
    TopKProblem p{.k = k};
    const auto size = static_cast<std::size_t>(k);
    for (const std::size_t n :
         {std::size_t{0}, std::size_t{1}, size - 1, size, size + 1, 2 * size, 8 * size + 5}) {
      p.rows.push_back(random_row(n, static_cast<unsigned>(n)));
    }
    expect_reference(p);
  }
}

TEST_P(TopK, NumericsOfRandomRows) {
  std::mt19937 rng(17);
  for (int round = 0; round < 20; ++round) {
    const int k = std::uniform_int_distribution<int>(1, 4096)(rng);
    TopKProblem p{.k = k, .starts = true};
    for (int i = 0; i < 9; ++i) {
      const auto n = static_cast<std::size_t>(std::uniform_int_distribution<int>(0, 40000)(rng));
      Row row = random_row(n, rng());
      // Few different values: many ties.
      if (i % 3 == 0) std::for_each(row.begin(), row.end(), [](float& x) { x = std::round(x * 2) / 2; });
      if (i % 3 == 1) std::for_each(row.begin(), row.end(), [](float& x) { x = std::max(x - 1.5f, 0.0f); });
      p.rows.push_back(std::move(row));
    }
    expect_reference(p);
  }
}

TEST_P(TopK, OffsetsAndPages) {
  TopKProblem p{.rows = hard_rows(3000, 256, 23), .k = 256, .starts = true};
  const std::size_t n = p.rows.size();
  p.rows[4].resize(100);
  p.rows[5].clear();
  for (std::size_t i = 0; i < n; ++i) p.offsets.push_back(static_cast<std::int32_t>(i * 13 % 500));
  expect_reference(p);
  p.offsets.clear();
  for (const std::int64_t page_size : {1, 2, 61, 64, 256}) {
    p.page_size = page_size;
    p.requests = 3;
    const auto blocks = static_cast<std::size_t>((3000 + 500 + page_size - 1) / page_size);
    p.table.resize(3 * blocks);
    std::iota(p.table.begin(), p.table.end(), 5);
    std::shuffle(p.table.begin(), p.table.end(), std::mt19937(3));
    p.row_request.resize(n);
    for (std::size_t i = 0; i < n; ++i) p.row_request[i] = static_cast<std::int32_t>(i % 3);
    expect_reference(p);
    p.row_request.clear();
    p.rows.resize(n - n % 3);
    expect_reference(p);
    p.rows.resize(n, Row(10, 1.0f));
    // Translated by hand: the reference's positions, looked up.
    TopKProblem logical = p;
    logical.table.clear();
    logical.rows.resize(n - n % 3);
    p.rows.resize(n - n % 3);
    const auto positions = logical.run(&backend()), slots = p.run(&backend());
    for (std::size_t i = 0; i < positions.size(); ++i) {
      if (positions[i] < 0) {
        ASSERT_EQ(slots[i], -1);
        continue;
      }
      const std::size_t request = i / 256 / (p.rows.size() / 3);
      const std::int32_t page =
          p.table[request * blocks + static_cast<std::size_t>(positions[i] / page_size)];
      ASSERT_EQ(slots[i], page * page_size + positions[i] % page_size);
    }
    p.rows.resize(n, Row(10, 1.0f));
  }
}

TEST_P(TopK, TableEntriesPastTheRowMayHoldAnything) {
  TopKProblem p{.rows = {random_row(130, 1), random_row(64, 2)}, .k = 128};
  p.requests = 2;
  p.table = {7, 3, 9, -1, 2147480000, 4, -1, 2147480000, -5, 1 << 30};
  const auto slots = p.run(&backend());
  for (std::size_t i = 0; i < 64; ++i) ASSERT_EQ(slots[128 + i], 4 * 64 + static_cast<std::int32_t>(i));
}

TEST_P(TopK, TheSameBitsWhateverIsBesideARow) {
  for (const std::size_t n : {std::size_t{9000}, std::size_t{131072}}) {
    Row row = random_row(n, 31);
    std::for_each(row.begin(), row.end(), [](float& x) { x = std::round(std::max(x, 0.0f) * 4) / 4; });
    const auto alone = TopKProblem{.rows = {row}, .k = 2048}.run(&backend(), 1);
    TopKProblem p{.rows = hard_rows(n, 2048, 37), .k = 2048};
    for (int round = 0; round < 20; ++round) {
      const std::size_t at = static_cast<std::size_t>(round) % p.rows.size();
      TopKProblem batch = p;
      batch.rows.resize(6);
      const std::size_t place = at % 6;
      batch.rows[place] = row;
      const auto got = batch.run(&backend(), 1 + round % 4);
      ASSERT_TRUE(
          std::equal(alone.begin(), alone.end(), got.begin() + static_cast<std::int64_t>(place * 2048)));
    }
  }
}

TEST_P(TopK, NoRowsAreLegal) { EXPECT_TRUE((TopKProblem{.rows = {}, .k = 128}).run(&backend()).empty()); }

/// A legal call of two rows of 300 scores, to be spoilt.
struct SmallCall {
  std::vector<float> scores = random_row(600, 3);
  std::vector<std::int32_t> lengths{300, 200}, starts{0, 100}, offsets{0, 0},
      table{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, request{0, 1}, out = std::vector<std::int32_t>(256, 77);
  TopKArgs args;
  SmallCall() {
    args.logits = TensorView::contiguous(scores.data(), DType::kFloat32, {2, 300});
    args.lengths = TensorView::contiguous(lengths.data(), DType::kInt32, {2});
    args.row_starts = TensorView::contiguous(starts.data(), DType::kInt32, {2});
    args.output.offsets = TensorView::contiguous(offsets.data(), DType::kInt32, {2});
    args.output.block_table = TensorView::contiguous(table.data(), DType::kInt32, {2, 5});
    args.output.row_request = TensorView::contiguous(request.data(), DType::kInt32, {2});
    args.indices = TensorView::contiguous(out.data(), DType::kInt32, {2, 128});
  }
};

template <class Spoil>
void expect_refused(const char* message, const Spoil& spoil) {
  SmallCall call;
  spoil(call);
  const auto before = call.out;
  for (const bool by_reference : {false, true}) {
    try {
      if (by_reference) {
        reference::top_k(call.args);
      } else {
        top_k(call.args, nullptr, 0);
      }
      ADD_FAILURE() << "not refused: " << message;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(message), std::string::npos)
          << e.what() << "\nexpected: " << message;
    }
  }
  EXPECT_EQ(call.out, before);
}

TEST(TopKBadInput, IsRefusedByNameAndWritesNothing) {
  SmallCall good;
  top_k(good.args, nullptr, 0);
  expect_refused("lengths[1] is 201, expected 0 to 200", [](SmallCall& c) { c.lengths[1] = 201; });
  expect_refused("lengths[0] is -1, expected 0 to 300", [](SmallCall& c) { c.lengths[0] = -1; });
  expect_refused("row_starts[1] is -1, expected 0 to logits.shape[1]",
                 [](SmallCall& c) { c.starts[1] = -1; });
  expect_refused("row_starts[1] is 301", [](SmallCall& c) { c.starts[1] = 301; });
  expect_refused("offsets[0] is -1, expected 0 to", [](SmallCall& c) { c.offsets[0] = -1; });
  expect_refused("block_table.shape[1] is 5, expected at least 6", [](SmallCall& c) { c.offsets[0] = 21; });
  expect_refused("block_table[1][3] is -1, expected a page", [](SmallCall& c) { c.table[8] = -1; });
  expect_refused("block_table[0][4] is 33554432", [](SmallCall& c) { c.table[4] = 33554432; });
  expect_refused("row_request[1] is 2, expected 0 to block_table.shape[0] - 1 = 1",
                 [](SmallCall& c) { c.request[1] = 2; });
  expect_refused("page_size is 0, expected 1", [](SmallCall& c) { c.args.output.page_size = 0; });
  expect_refused("indices.shape[1] (k) is 0, expected 1 to 4096",
                 [](SmallCall& c) { c.args.indices.shape[1] = 0; });
  expect_refused("indices.shape[1] (k) is 4097", [](SmallCall& c) { c.args.indices.shape[1] = 4097; });
  expect_refused("indices.shape[0] is 1, expected rows (n) = 2",
                 [](SmallCall& c) { c.args.indices.shape[0] = 1; });
  expect_refused("logits is", [](SmallCall& c) { c.args.logits.dtype = DType::kFloat16; });
  expect_refused("logits", [](SmallCall& c) { c.args.logits.strides[1] = 2; });
  expect_refused("lengths is", [](SmallCall& c) { c.args.lengths.dtype = DType::kInt64; });
  expect_refused("row_request is given without block_table",
                 [](SmallCall& c) { c.args.output.block_table = {}; });
  expect_refused("block_table.shape[0] (b) is 2, expected a divisor", [](SmallCall& c) {
    c.args.output.row_request = {};
    c.args.logits.shape[0] = c.args.indices.shape[0] = c.args.lengths.shape[0] = 1;
    c.args.row_starts.shape[0] = c.args.output.offsets.shape[0] = 1;
  });
}

}  // namespace
}  // namespace flash_mla::conformance
