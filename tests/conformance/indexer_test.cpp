// The contracts of the indexer (include/flash_mla/indexer.h), on every backend. Logits are held to
// reference::mqa_logits, in float64; quantised bytes to the definition, written here.

#include "flash_mla/indexer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "base/element.h"
#include "base/fp8.h"
#include "flash_mla/error.h"
#include "guarded.h"

namespace flash_mla::conformance {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr std::uint8_t kNanByte = 0x7F;

std::uint8_t random_e4m3(std::mt19937& rng) {
  std::normal_distribution<float> normal;
  return to_e4m3(normal(rng) * 8).bits;
}

TensorView ints(const std::vector<std::int32_t>& v, std::initializer_list<std::int64_t> shape) {
  return TensorView::contiguous(const_cast<std::int32_t*>(v.data()), DType::kInt32, shape);
}

TensorView floats(const std::vector<float>& v, std::initializer_list<std::int64_t> shape) {
  return TensorView::contiguous(const_cast<float*>(v.data()), DType::kFloat32, shape);
}

TensorView bytes(const std::vector<std::uint8_t>& v, std::initializer_list<std::int64_t> shape) {
  return TensorView::contiguous(const_cast<std::uint8_t*>(v.data()), DType::kUInt8, shape);
}

/// Copies of a call's tensors in a backend's memory.
class Uploads {
 public:
  explicit Uploads(BackendUnderTest& backend) : backend_(backend) {}
  Guarded& operator()(TensorView& v) {
    std::int64_t last = 1;
    for (int d = 0; d < v.rank; ++d) last += (v.size(d) - 1) * v.stride(d);
    const bool empty = v.numel() == 0;
    memory_.push_back(std::make_unique<Guarded>(
        backend_, empty ? 0 : static_cast<std::size_t>(last) * dtype_size(v.dtype)));
    if (!empty) memory_.back()->upload(v.data);
    v.data = memory_.back()->data();
    v.device = backend_.device();
    return *memory_.back();
  }

 private:
  BackendUnderTest& backend_;
  std::vector<std::unique_ptr<Guarded>> memory_;
};

struct Shape {
  int heads = 64, dim = 128;
  unsigned seed = 1;
};

/// Queries with their weights, some of them negative.
struct Queries {
  Queries(int rows, const Shape& s) {
    std::mt19937 rng(s.seed);
    std::normal_distribution<float> normal;
    for (int i = 0; i < rows * s.heads * s.dim; ++i) q.push_back(random_e4m3(rng));
    for (int i = 0; i < rows * s.heads; ++i) weights.push_back(normal(rng) / 64);
  }
  std::vector<std::uint8_t> q;
  std::vector<float> weights;
};

struct Ragged {
  Ragged(std::vector<std::int32_t> begins, std::vector<std::int32_t> ends, int keys, Shape s)
      : shape(s),
        begin(std::move(begins)),
        end(std::move(ends)),
        n(keys),
        queries(static_cast<int>(begin.size()), s) {
    std::mt19937 rng(s.seed + 9);
    std::uniform_real_distribution<float> scale(0.001f, 0.1f);
    std::vector<bool> used(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < begin.size(); ++i) {
      for (std::int32_t j = begin[i]; j < end[i]; ++j) used[static_cast<std::size_t>(j)] = true;
    }
    // A key of no row is NaN.
    for (int j = 0; j < n; ++j) {
      const bool live = used[static_cast<std::size_t>(j)];
      for (int d = 0; d < s.dim; ++d) k.push_back(live ? random_e4m3(rng) : kNanByte);
      scales.push_back(live ? scale(rng) : kNan);
    }
  }

  MqaLogitsArgs args() const {
    const auto m = static_cast<std::int64_t>(begin.size());
    MqaLogitsArgs a;
    a.q = bytes(queries.q, {m, shape.heads, shape.dim});
    a.weights = floats(queries.weights, {m, shape.heads});
    a.k = bytes(k, {n, shape.dim});
    a.k_scales = floats(scales, {n});
    a.key_begin = ints(begin, {m});
    a.key_end = ints(end, {m});
    return a;
  }

  Shape shape;
  std::vector<std::int32_t> begin, end;
  int n;
  Queries queries;
  std::vector<std::uint8_t> k;
  std::vector<float> scales;
};

/// Requests in pages; whatever no request uses is NaN, and table entries past a request are garbage.
struct Paged {
  Paged(std::vector<std::int32_t> lengths, int tokens, int pages_of, int gap, Shape s)
      : shape(s),
        lens(std::move(lengths)),
        next_n(tokens),
        page_size(pages_of),
        queries(static_cast<int>(lens.size()) * tokens, s) {
    std::mt19937 rng(s.seed + 5);
    std::uniform_real_distribution<float> scale(0.001f, 0.1f);
    std::int32_t most = 1;
    for (const std::int32_t length : lens) most = std::max(most, length);
    blocks = (most + page_size - 1) / page_size + 2;
    num_pages = 3;
    for (const std::int32_t length : lens) num_pages += (length + page_size - 1) / page_size;
    std::vector<std::int32_t> pages(static_cast<std::size_t>(num_pages));
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), rng);
    stride = static_cast<std::int64_t>(page_size) * (s.dim + 4) + gap;
    cache.assign(static_cast<std::size_t>(num_pages * stride), 0xFF);  // NaN as e4m3 and as float32
    std::size_t next = 0;
    for (const std::int32_t length : lens) {
      for (int block = 0; block < blocks; ++block) {
        if (block >= (length + page_size - 1) / page_size) {
          table.push_back(block % 2 == 0 ? -1 : 2147480000);
          continue;
        }
        table.push_back(pages[next++]);
        std::uint8_t* page = &cache[static_cast<std::size_t>(table.back() * stride)];
        for (int t = 0; t < std::min(page_size, length - block * page_size); ++t) {
          for (int d = 0; d < s.dim; ++d) page[t * s.dim + d] = random_e4m3(rng);
          const float value = scale(rng);
          std::memcpy(page + page_size * s.dim + t * 4, &value, 4);
        }
      }
    }
  }

  PagedMqaLogitsArgs args() const {
    const auto b = static_cast<std::int64_t>(lens.size());
    PagedMqaLogitsArgs a;
    a.q = bytes(queries.q, {b, next_n, shape.heads, shape.dim});
    a.weights = floats(queries.weights, {b * next_n, shape.heads});
    a.cache = bytes(cache, {num_pages, page_size, 1, shape.dim + 4});
    a.cache.strides[0] = stride;
    a.context_lens = ints(lens, {b});
    a.block_table = ints(table, {b, blocks});
    return a;
  }

  Shape shape;
  std::vector<std::int32_t> lens;
  int next_n, page_size, blocks = 0;
  std::int64_t num_pages = 0, stride = 0;
  Queries queries;
  std::vector<std::uint8_t> cache;
  std::vector<std::int32_t> table;
};

void upload_inputs(MqaLogitsArgs& a, Uploads& upload) {
  for (TensorView* v : {&a.q, &a.weights, &a.k, &a.k_scales, &a.key_begin, &a.key_end}) upload(*v);
}
void upload_inputs(PagedMqaLogitsArgs& a, Uploads& upload) {
  for (TensorView* v : {&a.q, &a.weights, &a.cache, &a.context_lens, &a.block_table}) upload(*v);
}
std::int64_t rows_of(const MqaLogitsArgs& a) { return a.q.size(0); }
std::int64_t rows_of(const PagedMqaLogitsArgs& a) { return a.q.size(0) * a.q.size(1); }
std::size_t workspace_size(const MqaLogitsArgs& a, const IndexerOptions& o) {
  return mqa_logits_workspace_size(a, o);
}
std::size_t workspace_size(const PagedMqaLogitsArgs& a, const IndexerOptions& o) {
  return paged_mqa_logits_workspace_size(a, o);
}
void logits(const MqaLogitsArgs& a, void* w, std::size_t n, const IndexerOptions& o) {
  mqa_logits(a, w, n, o);
}
void logits(const PagedMqaLogitsArgs& a, void* w, std::size_t n, const IndexerOptions& o) {
  paged_mqa_logits(a, w, n, o);
}
std::size_t select_size(const MqaLogitsArgs& a, const TopKOutput& t, const TensorView& i,
                        const MqaTopKOptions& o) {
  return mqa_top_k_workspace_size(a, t, i, o);
}
std::size_t select_size(const PagedMqaLogitsArgs& a, const TopKOutput& t, const TensorView& i,
                        const MqaTopKOptions& o) {
  return paged_mqa_top_k_workspace_size(a, t, i, o);
}
void select(const MqaLogitsArgs& a, const TopKOutput& t, const TensorView& i, void* w, std::size_t n,
            const MqaTopKOptions& o) {
  mqa_top_k(a, t, i, w, n, o);
}
void select(const PagedMqaLogitsArgs& a, const TopKOutput& t, const TensorView& i, void* w, std::size_t n,
            const MqaTopKOptions& o) {
  paged_mqa_top_k(a, t, i, w, n, o);
}

/// Logits by a backend. What is not written stays 77.
template <class Args>
std::vector<float> run(Args a, std::int64_t width, BackendUnderTest& backend, int num_threads = 2) {
  Uploads upload(backend);
  upload_inputs(a, upload);
  std::vector<float> out(static_cast<std::size_t>(rows_of(a) * width), 77.0f);
  a.logits = floats(out, {rows_of(a), width});
  const Guarded& memory = upload(a.logits);
  const IndexerOptions options{.num_threads = num_threads};
  const std::size_t size = workspace_size(a, options);
  Guarded workspace(backend, size);
  logits(a, workspace.data(), size, options);
  workspace.download();
  const auto raw = memory.download();
  if (!raw.empty()) std::memcpy(out.data(), raw.data(), raw.size());
  return out;
}

template <class Args>
std::vector<double> expected(Args a, std::int64_t width) {
  std::vector<double> out(static_cast<std::size_t>(rows_of(a) * width), 77.0);
  a.logits = TensorView::contiguous(out.data(), DType::kFloat64, {rows_of(a), width});
  if constexpr (std::is_same_v<Args, MqaLogitsArgs>) {
    reference::mqa_logits(a);
  } else {
    reference::paged_mqa_logits(a);
  }
  return out;
}

void expect_near(const std::vector<float>& got, const std::vector<double>& want, double tolerance) {
  ASSERT_EQ(got.size(), want.size());
  double squares = 0, products = 0, largest = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::isfinite(want[i])) largest = std::max(largest, std::abs(want[i]));
  }
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(want[i])) {
      ASSERT_EQ(std::isnan(got[i]), std::isnan(want[i])) << i;
      ASSERT_TRUE(std::isnan(want[i]) || static_cast<double>(got[i]) == want[i]) << i;
      continue;
    }
    // Sums of up to 128 x 128 terms whose parts may cancel.
    ASSERT_NEAR(static_cast<double>(got[i]), want[i], tolerance * largest + 1e-30) << i;
    products += 2 * static_cast<double>(got[i]) * want[i];
    squares += static_cast<double>(got[i]) * static_cast<double>(got[i]) + want[i] * want[i];
  }
  EXPECT_LE(squares - products, 5e-6 * squares);
}

class Indexer : public ::testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {
 protected:
  BackendUnderTest& backend() { return *GetParam(); }
  void expect_near(const std::vector<float>& got, const std::vector<double>& want) {
    conformance::expect_near(got, want, backend().index_tolerance());
  }
  void SetUp() override {
    if (!backend().supports_index_logits()) GTEST_SKIP() << "the backend has no logits";
  }
};

INSTANTIATE_TEST_SUITE_P(Backends, Indexer, ::testing::ValuesIn(backends_under_test()),
                         [](const auto& b) { return b.param->name(); });

TEST_P(Indexer, NumericsOfRaggedLogits) {
  for (const int dim : {64, 128}) {
    for (const int heads : {1, 8, 16, 32, 33, 64}) {
      const Ragged p({0, 0, 5, 70, 0, 200, 130, 300, 0, 0, 64},
                     {300, 1, 69, 70, 0, 130, 200, 300, 64, 65, 128}, 301,
                     {heads, dim, static_cast<unsigned>(heads + dim)});
      for (const bool compressed : {false, true}) {
        MqaLogitsArgs a = p.args();
        a.compressed = compressed;
        a.clean = compressed != (heads % 16 == 0);
        expect_near(run(a, 307, backend()), expected(a, 307));
      }
    }
  }
}

TEST_P(Indexer, NumericsOfCausalPrefill) {
  std::vector<std::int32_t> begin(20, 0), end(20);
  std::iota(end.begin(), end.end(), 4900);
  const Ragged p(begin, end, 4919, {.heads = 8, .seed = 5});
  expect_near(run(p.args(), 4919, backend()), expected(p.args(), 4919));
}

TEST_P(Indexer, NumericsOfPagedLogits) {
  for (const int page_size : {1, 61, 64, 256}) {
    for (const int next_n : {1, 3}) {
      for (const int dim : {64, 128}) {
        const Paged p({0, 1, 64, 65, 700, 3}, next_n, page_size, page_size % 8 * 4, {.heads = 8, .dim = dim});
        expect_near(run(p.args(), 720, backend()), expected(p.args(), 720));
      }
    }
  }
}

TEST_P(Indexer, NumericsOfPagedLogitsWithALengthPerToken) {
  const Paged p({300, 200}, 3, 64, 0, {});
  PagedMqaLogitsArgs a = p.args();
  const std::vector<std::int32_t> lens{300, 0, 17, 200, 200, 1};
  a.context_lens = ints(lens, {2, 3});
  expect_near(run(a, 300, backend()), expected(a, 300));
  a.clean = false;
  expect_near(run(a, 300, backend()), expected(a, 300));
}

TEST_P(Indexer, ANanReachesItsOwnLogitAlone) {
  Ragged p({0, 0}, {100, 100}, 100, {.heads = 8});
  p.k[40 * 128 + 3] = kNanByte;
  p.scales[70] = kNan;
  const auto got = run(p.args(), 100, backend());
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(std::isnan(got[i]), i % 100 == 40 || i % 100 == 70) << i;
  }
}

TEST_P(Indexer, BitsOfALogitDependOnItsQueryAndKeyAlone) {
  const Paged p({1000, 300, 777}, 2, 64, 0, {.heads = 64, .seed = 3});
  const auto all = run(p.args(), 1000, backend(), 1);
  for (int round = 0; round < 5; ++round) ASSERT_EQ(run(p.args(), 1000, backend(), 1 + round % 3), all);
  for (std::int64_t r = 0; r < 3; ++r) {
    PagedMqaLogitsArgs one = p.args();
    one.q.shape[0] = one.context_lens.shape[0] = one.block_table.shape[0] = 1;
    one.weights.shape[0] = 2;
    one.q.data = one.q.ptr<std::uint8_t>() + r * one.q.stride(0);
    one.weights.data = one.weights.ptr<float>() + r * 2 * one.weights.stride(0);
    one.context_lens.data = one.context_lens.ptr<std::int32_t>() + r;
    one.block_table.data = one.block_table.ptr<std::int32_t>() + r * one.block_table.stride(0);
    const auto got = run(one, 1000, backend());
    ASSERT_TRUE(std::equal(got.begin(), got.end(), all.begin() + r * 2000));
  }
}

/// A selection in one call is that of two calls, whatever the bound on logits.
template <class Args>
void expect_selection(const Args& a, std::int64_t width, int k, const TopKOutput& output,
                      BackendUnderTest& backend) {
  const std::vector<float> scores = run(a, width, backend);
  const std::int64_t n = rows_of(a);
  std::vector<std::int32_t> want(static_cast<std::size_t>(n * k)), lengths;
  for (std::int64_t row = 0; row < n; ++row) {
    const auto begin = scores.begin() + row * width;
    lengths.push_back(static_cast<std::int32_t>(std::find(begin, begin + width, -kInf) - begin));
  }
  TopKArgs top;
  top.logits = floats(scores, {n, width});
  top.lengths = ints(lengths, {n});
  top.output = output;
  top.indices = ints(want, {n, k});
  reference::top_k(top);
  for (const std::size_t bound :
       {std::size_t{1}, static_cast<std::size_t>(3 * width) * 4, std::size_t{1} << 26}) {
    Args b = a;
    TopKOutput t = output;
    Uploads upload(backend);
    upload_inputs(b, upload);
    for (TensorView* v : {&t.offsets, &t.block_table, &t.row_request}) {
      if (v->defined()) upload(*v);
    }
    std::vector<std::int32_t> got(want.size(), 0x7ABCDEF0);
    TensorView indices = ints(got, {n, k});
    const Guarded& memory = upload(indices);
    const MqaTopKOptions options{.indexer = {.num_threads = 2}, .logits_bytes = bound};
    const std::size_t size = select_size(b, t, indices, options);
    Guarded workspace(backend, size);
    select(b, t, indices, workspace.data(), size, options);
    workspace.download();
    const auto raw = memory.download();
    std::memcpy(got.data(), raw.data(), raw.size());
    ASSERT_EQ(got, want) << bound;
  }
}

TEST_P(Indexer, SelectionInOneCall) {
  const Paged p({0, 1, 500, 2000, 129, 128}, 2, 64, 64, {.heads = 32, .seed = 7});
  expect_selection(p.args(), 2000, 128, {}, backend());
  TopKOutput slots;
  slots.block_table = p.args().block_table;
  expect_selection(p.args(), 2000, 512, slots, backend());
  const Ragged r({0, 0, 5, 70, 0, 200}, {900, 1, 600, 70, 0, 900}, 900, {.heads = 16});
  MqaLogitsArgs a = r.args();
  a.compressed = true;
  TopKOutput absolute;
  absolute.offsets = a.key_begin;
  expect_selection(a, 900, 128, absolute, backend());
}

/// The rotation by its definition: H[i][j] = (-1)^popcount(i & j).
std::vector<double> rotated(const std::vector<float>& x) {
  std::vector<double> y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    for (std::size_t j = 0; j < x.size(); ++j) {
      y[i] += (__builtin_popcountll(i & j) % 2 == 0 ? 1 : -1) * static_cast<double>(x[j]);
    }
    y[i] /= std::sqrt(static_cast<double>(x.size()));
  }
  return y;
}

TEST_P(Indexer, NumericsOfAppendedKeys) {
  if (!backend().supports_index_quantisers()) GTEST_SKIP() << "the backend has no quantisers of the indexer";
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const int dim : {64, 128}) {
      for (const Fp8Recipe recipe : {Fp8Recipe::kIndexerPow2, Fp8Recipe::kIndexer}) {
        for (const bool rotate : {false, true}) {
          constexpr int kPage = 13, kPages = 7, kTokens = 40;
          const std::int64_t stride = kPage * (dim + 4) + 16;
          std::mt19937 rng(dim);
          std::normal_distribution<float> normal;
          std::vector<std::uint8_t> k, cache(static_cast<std::size_t>(kPages * stride), 0xAB);
          std::vector<std::vector<float>> rows;
          std::vector<std::int32_t> slots;
          for (int i = 0; i < kTokens; ++i) {
            rows.emplace_back();
            for (int d = 0; d < dim; ++d) {
              visit_float_type(dtype, [&](auto element) {
                const auto x = from_double<decltype(element)>(
                    static_cast<double>(i == 4 ? 0 : normal(rng) * (i % 3 == 0 ? 1e-6f : 3.0f)));
                const auto* raw = reinterpret_cast<const std::uint8_t*>(&x);
                k.insert(k.end(), raw, raw + sizeof(x));
                rows.back().push_back(static_cast<float>(to_float(x)));
              });
            }
            slots.push_back(i % 7 == 2 ? -1 : (i * 31) % (kPage * kPages));
          }
          IndexKeyAppendArgs a;
          a.k = TensorView::contiguous(k.data(), dtype, {kTokens, dim});
          a.slot_mapping = ints(slots, {kTokens});
          a.cache = bytes(cache, {kPages, kPage, 1, dim + 4});
          a.cache.strides[0] = stride;
          a.recipe = recipe;
          a.rotate = rotate;
          Uploads upload(backend());
          upload(a.k);
          upload(a.slot_mapping);
          TensorView whole = bytes(cache, {kPages * stride});
          const Guarded& memory = upload(whole);
          a.cache.data = whole.data;
          a.cache.device = whole.device;
          append_index_keys(a);
          const auto got = memory.download();
          std::vector<bool> touched(got.size());
          for (std::size_t i = 0; i < kTokens; ++i) {
            if (slots[i] < 0) continue;
            const auto page = static_cast<std::size_t>(slots[i] / kPage * stride);
            const auto at = static_cast<std::size_t>(slots[i] % kPage);
            const auto width = static_cast<std::size_t>(dim);
            float scale = 0;
            const std::size_t place = page + kPage * width + at * 4;
            std::memcpy(&scale, &got[place], 4);
            for (std::size_t b = 0; b < 4; ++b) touched[place + b] = true;
            std::vector<double> want(rows[i].begin(), rows[i].end());
            if (rotate) want = rotated(rows[i]);
            double amax = 1e-4;
            for (const double x : want) amax = std::max(amax, std::abs(x));
            double exact = amax / 448;
            if (recipe == Fp8Recipe::kIndexerPow2) exact = std::exp2(std::ceil(std::log2(exact) - 1e-4));
            // A bf16 rounding after the rotation moves the largest by up to 2^-9.
            ASSERT_NEAR(static_cast<double>(scale), exact, exact * 4e-3) << i;
            for (std::size_t d = 0; d < width; ++d) {
              touched[page + at * width + d] = true;
              const double value = static_cast<double>(to_float(E4m3{got[page + at * width + d]}));
              ASSERT_NEAR(value * static_cast<double>(scale), want[d],
                          std::abs(want[d]) * (0.0625 + 0.01) + static_cast<double>(scale) * 0x1p-9 +
                              (dtype == DType::kFloat16 ? 0x1p-24 : 0))
                  << i << " " << d;
              if (!rotate) {
                ASSERT_EQ(got[page + at * width + d], to_e4m3(rows[i][d] / scale).bits);
              }
            }
          }
          for (std::size_t i = 0; i < got.size(); ++i) ASSERT_TRUE(touched[i] || got[i] == 0xAB) << i;
        }
      }
    }
  }
}

TEST_P(Indexer, NumericsOfQuantisedQueries) {
  if (!backend().supports_index_quantisers()) GTEST_SKIP() << "the backend has no quantisers of the indexer";
  constexpr int kTokens = 5, kHeads = 12, kDim = 128;
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  std::vector<float> q(kTokens * kHeads * kDim), weights(kTokens * kHeads);
  for (float& x : q) x = normal(rng);
  for (float& x : weights) x = normal(rng);
  std::vector<std::uint8_t> values(q.size());
  std::vector<float> scaled(weights.size());
  IndexQueryArgs a;
  a.q = floats(q, {kTokens, kHeads, kDim});
  a.weights = floats(weights, {kTokens, kHeads});
  a.factor = 0.125f;
  a.values = bytes(values, {kTokens, kHeads, kDim});
  a.scaled_weights = floats(scaled, {kTokens, kHeads});
  Uploads upload(backend());
  upload(a.q);
  upload(a.weights);
  const Guarded& memory = upload(a.values);
  const Guarded& weight_memory = upload(a.scaled_weights);
  quantise_index_queries(a);
  const auto got = memory.download();
  const auto raw = weight_memory.download();
  std::memcpy(scaled.data(), raw.data(), raw.size());
  for (std::size_t row = 0; row < kTokens * kHeads; ++row) {
    const auto first = q.begin() + static_cast<std::ptrdiff_t>(row * kDim);
    const std::vector<double> want = rotated({first, first + kDim});
    const double scale = static_cast<double>(scaled[row]) / static_cast<double>(weights[row]) / 0.125;
    ASSERT_NEAR(std::log2(scale), std::round(std::log2(scale)), 1e-5);
    for (std::size_t d = 0; d < kDim; ++d) {
      ASSERT_NEAR(static_cast<double>(to_float(E4m3{got[row * kDim + d]})) * scale, want[d],
                  std::abs(want[d]) * 0.0626 + scale * 0x1p-9);
    }
  }
}

TEST_P(Indexer, EmptyCallsAreLegal) {
  const Ragged none({}, {}, 10, {});
  EXPECT_TRUE(run(none.args(), 10, backend()).empty());
  const Ragged no_keys({0, 0}, {0, 0}, 0, {});
  for (const float x : run(no_keys.args(), 3, backend())) EXPECT_EQ(x, -kInf);
  const Paged no_requests({}, 1, 64, 0, {});
  EXPECT_TRUE(run(no_requests.args(), 10, backend()).empty());
}

template <class Args, class Spoil>
void expect_refused(const char* message, Args a, std::int64_t width, const Spoil& spoil) {
  std::vector<float> out(static_cast<std::size_t>(rows_of(a) * width), 77.0f);
  a.logits = floats(out, {rows_of(a), width});
  std::vector<std::byte> workspace(1 << 24);
  void* aligned = workspace.data();
  std::size_t space = workspace.size();
  std::align(64, 1 << 20, aligned, space);
  spoil(a);
  try {
    logits(a, aligned, space, IndexerOptions{.num_threads = 1});
    ADD_FAILURE() << "not refused: " << message;
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(message), std::string::npos)
        << e.what() << "\nexpected: " << message;
  }
  EXPECT_EQ(std::count(out.begin(), out.end(), 77.0f), static_cast<std::ptrdiff_t>(out.size()));
}

TEST(IndexerBadInput, IsRefusedByNameAndWritesNothing) {
  Ragged r({0, 3}, {10, 9}, 10, {.heads = 8});
  expect_refused("key_end[1] is 11, expected at most k.shape[0] (n) = 10", r.args(), 10,
                 [](MqaLogitsArgs& a) { a.key_end.ptr<std::int32_t>()[1] = 11; });
  r.end[1] = 9;
  expect_refused("key_begin[0] is -1, expected 0 to", r.args(), 10,
                 [](MqaLogitsArgs& a) { a.key_begin.ptr<std::int32_t>()[0] = -1; });
  r.begin[0] = 0;
  expect_refused("logits.shape[1] (width) is 9, expected at least k.shape[0] (n) = 10", r.args(), 9,
                 [](MqaLogitsArgs&) {});
  expect_refused("logits.shape[1] (width) is 9, expected at least key_end[0] - key_begin[0] = 10", r.args(),
                 9, [](MqaLogitsArgs& a) { a.compressed = true; });
  expect_refused("q.shape[2] (D) is 96, expected 64 or 128", r.args(), 10,
                 [](MqaLogitsArgs& a) { a.q.shape[2] = 96; });
  expect_refused("q.shape[1] (H) is 129", r.args(), 10, [](MqaLogitsArgs& a) { a.q.shape[1] = 129; });
  expect_refused("weights.shape[1] is 7, expected H = 8", r.args(), 10,
                 [](MqaLogitsArgs& a) { a.weights.shape[1] = 7; });
  const Paged p({100, 70}, 1, 64, 0, {.heads = 8});
  expect_refused("context_lens: entry 0 is 257, expected 0 to", p.args(), 300,
                 [](PagedMqaLogitsArgs& a) { a.context_lens.ptr<std::int32_t>()[0] = 257; });
  const Paged p2({100, 70}, 1, 64, 0, {.heads = 8});
  expect_refused("logits.shape[1] (width) is 99, expected at least context_lens' entry 0", p2.args(), 99,
                 [](PagedMqaLogitsArgs&) {});
  expect_refused("block_table[1][1] is 99, expected 0 to", p2.args(), 100, [](PagedMqaLogitsArgs& a) {
    a.block_table.ptr<std::int32_t>()[a.block_table.stride(0) + 1] = 99;
  });
  expect_refused("cache.shape[3] is 131, expected D + 4 = 132", p2.args(), 100,
                 [](PagedMqaLogitsArgs& a) { a.cache.shape[3] = 131; });
  expect_refused("cache.stride[0] is 8449, expected a multiple of 4", p2.args(), 100,
                 [](PagedMqaLogitsArgs& a) { a.cache.strides[0] = 8449; });
}

}  // namespace
}  // namespace flash_mla::conformance
