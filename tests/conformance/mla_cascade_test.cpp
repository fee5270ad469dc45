// Latent attention behind a shared prefix against float64 over the whole context, on the CPU.

#include "flash_mla/mla_cascade.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/element.h"
#include "flash_mla/error.h"

namespace flash_mla {
namespace {

struct Shape {
  int prefix = 100;
  std::vector<std::int32_t> lengths{70, 1, 130};
  int s_q = 1, h = 3, nope = 128, rope = 64, v = 128, rank = 512, page_size = 16;
  DType dtype = DType::kFloat32;
  bool causal = false, with_lse = true;
  int num_parts = 3, fixed_split_blocks = 0;
};

/// Random numbers as they are stored, or bytes of NaN.
class Data {
 public:
  Data(DType dtype, std::int64_t count)
      : dtype_(dtype), bytes_(static_cast<std::size_t>(count) * dtype_size(dtype), 0xFF) {}
  void fill(std::mt19937& rng, float spread) {
    for (std::int64_t i = 0; i < size(); ++i) set(i, std::normal_distribution<float>(0, spread)(rng));
  }
  void set(std::int64_t i, double x) {
    visit_float_type(dtype_, [&](auto e) {
      reinterpret_cast<decltype(e)*>(bytes_.data())[i] = from_double<decltype(e)>(x);
    });
  }
  double operator[](std::int64_t i) const {
    return visit_float_type(dtype_, [&](auto e) {
      return static_cast<double>(to_float(reinterpret_cast<const decltype(e)*>(bytes_.data())[i]));
    });
  }
  std::int64_t size() const { return static_cast<std::int64_t>(bytes_.size() / dtype_size(dtype_)); }
  TensorView view(std::initializer_list<std::int64_t> shape) {
    return TensorView::contiguous(bytes_.data(), dtype_, shape);
  }
  bool operator==(const Data& other) const { return bytes_ == other.bytes_; }

 private:
  DType dtype_;
  std::vector<std::uint8_t> bytes_;
};

class Problem {
 public:
  explicit Problem(Shape shape, unsigned seed = 1)
      : s(std::move(shape)),
        b(static_cast<std::int64_t>(s.lengths.size())),
        prefix_pages(pages_of(s.prefix)),
        q(s.dtype, b * s.s_q * s.h * (s.nope + s.rope)),
        kv_b(s.dtype, std::int64_t{s.h} * (s.nope + s.v) * s.rank),
        prefix_k(s.dtype, std::int64_t{s.prefix} * s.h * (s.nope + s.rope)),
        prefix_v(s.dtype, std::int64_t{s.prefix} * s.h * s.v),
        out(s.dtype, b * s.s_q * s.h * s.v),
        lse(DType::kFloat32, b * s.s_q * s.h),
        cache(s.dtype, 0) {
    std::mt19937 rng(seed);
    q.fill(rng, 0.3f);
    kv_b.fill(rng, 1.0f / std::sqrt(static_cast<float>(s.rank)));
    std::int64_t pages = prefix_pages;
    for (const std::int32_t n : s.lengths) {
      width = std::max<std::int64_t>(width, pages_of(n));
      pages += pages_of(n);
    }
    num_pages = pages + 2;
    cache = Data(s.dtype, num_pages * s.page_size * (s.rank + s.rope));
    std::vector<std::int32_t> order(static_cast<std::size_t>(num_pages));
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(i);
    std::shuffle(order.begin(), order.end(), rng);
    std::size_t next = 0;
    const auto place = [&](int tokens, std::int32_t* to) {
      for (int t = 0; t < tokens; ++t) {
        if (t % s.page_size == 0) to[t / s.page_size] = order[next++];
        for (int c = 0; c < s.rank + s.rope; ++c) {
          cache.set(
              (std::int64_t{to[t / s.page_size]} * s.page_size + t % s.page_size) * (s.rank + s.rope) + c,
              static_cast<double>(std::normal_distribution<float>(0, 1)(rng)));
        }
      }
    };
    pages_of_prefix.resize(static_cast<std::size_t>(prefix_pages) + 1, -1);
    place(s.prefix, pages_of_prefix.data());
    table.assign(static_cast<std::size_t>(b * width), 2147480000);
    for (std::int64_t r = 0; r < b; ++r)
      place(s.lengths[static_cast<std::size_t>(r)], table.data() + r * width);
    ScheduleOptions options;
    options.num_parts = s.num_parts;
    options.fixed_split_blocks = s.fixed_split_blocks;
    schedule = DecodeSchedule::build(s.lengths, options);
  }

  ExpandArgs expand_args() {
    return {cache.view({num_pages, s.page_size, 1, s.rank + s.rope}),
            TensorView::contiguous(pages_of_prefix.data(), DType::kInt32, {prefix_pages + 1}),
            kv_b.view({s.h, s.nope + s.v, s.rank}), prefix_k.view({s.prefix, s.h, s.nope + s.rope}),
            prefix_v.view({s.prefix, s.h, s.v})};
  }
  MlaCascadeArgs args() {
    MlaCascadeArgs a;
    a.q = q.view({b, s.s_q, s.h, s.nope + s.rope});
    a.prefix_k = prefix_k.view({s.prefix, s.h, s.nope + s.rope});
    a.prefix_v = prefix_v.view({s.prefix, s.h, s.v});
    a.kv_b = kv_b.view({s.h, s.nope + s.v, s.rank});
    a.k_cache = cache.view({num_pages, s.page_size, 1, s.rank + s.rope});
    a.block_table = TensorView::contiguous(table.data(), DType::kInt32, {b, width});
    a.cache_seqlens = TensorView::contiguous(s.lengths.data(), DType::kInt32, {b});
    a.out = out.view({b, s.s_q, s.h, s.v});
    if (s.with_lse) a.lse = lse.view({b, s.h, s.s_q});
    return a;
  }
  MlaCascadeOptions options(int threads = 2) const { return {0.1f, s.causal, threads}; }
  static void run(const MlaCascadeArgs& a, const DecodeScheduleView& plan, const MlaCascadeOptions& o) {
    const std::size_t bytes = mla_cascade_workspace_size(a, plan, o), room = (bytes + 63) / 64 * 64;
    const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(64, room), std::free);
    std::memset(workspace.get(), 0xFF, room);
    mla_cascade(a, plan, workspace.get(), bytes, o);
  }

  double latent(std::int64_t page, std::int64_t t, std::int64_t c) const {
    return cache[(page * s.page_size + t % s.page_size) * (s.rank + s.rope) + c];
  }
  /// Of a head: [keys | values] of a token.
  std::vector<double> expanded(std::int64_t page, std::int64_t t, std::int64_t head) const {
    std::vector<double> x;
    for (int i = 0; i < s.nope + s.v; ++i) {
      double sum = 0;
      for (int c = 0; c < s.rank; ++c)
        sum += latent(page, t, c) * kv_b[(head * (s.nope + s.v) + i) * s.rank + c];
      x.push_back(sum);
      if (i + 1 != s.nope) continue;
      for (int c = 0; c < s.rope; ++c) x.push_back(latent(page, t, s.rank + c));
    }
    return x;
  }
  /// Largest distance of out and of lse from float64 over the whole context.
  std::pair<double, double> errors() const {
    double worst = 0, worst_lse = 0;
    const int d = s.nope + s.rope;
    for (std::int64_t r = 0; r < b; ++r) {
      const int own = s.lengths[static_cast<std::size_t>(r)], m = s.prefix + own;
      for (std::int64_t head = 0; head < s.h; ++head) {
        std::vector<std::vector<double>> keys;
        for (int j = 0; j < m; ++j) {
          const std::int64_t t = j < s.prefix ? j : j - s.prefix;
          const std::int32_t page = j < s.prefix
                                        ? pages_of_prefix[static_cast<std::size_t>(t / s.page_size)]
                                        : table[static_cast<std::size_t>(r * width + t / s.page_size)];
          keys.push_back(expanded(page, t, head));
        }
        for (int i = 0; i < s.s_q; ++i) {
          const int seen = s.causal ? m - s.s_q + i + 1 : m;
          const std::int64_t row = (r * s.s_q + i) * s.h + head;
          std::vector<double> want(static_cast<std::size_t>(s.v), 0.0);
          double sum = 0;
          for (int j = 0; j < seen; ++j) {
            double x = 0;
            for (int c = 0; c < d; ++c)
              x += q[row * d + c] * keys[static_cast<std::size_t>(j)][static_cast<std::size_t>(c)];
            const double weight = std::exp(0.1f * x);
            sum += weight;
            for (int c = 0; c < s.v; ++c)
              want[static_cast<std::size_t>(c)] +=
                  weight * keys[static_cast<std::size_t>(j)]
                               [static_cast<std::size_t>(d) + static_cast<std::size_t>(c)];
          }
          for (int c = 0; c < s.v; ++c) {
            const double x = seen > 0 ? want[static_cast<std::size_t>(c)] / sum : 0.0;
            const double error = std::abs(out[row * s.v + c] - x);
            worst = std::max(worst, std::isnan(error) ? 1e9 : error);
          }
          if (!s.with_lse) continue;
          const double l = lse[(r * s.h + head) * s.s_q + i];
          const double error = seen > 0 ? std::abs(l - std::log(sum))
                                        : (l == std::numeric_limits<double>::infinity() ? 0 : 1e9);
          worst_lse = std::max(worst_lse, std::isnan(error) ? 1e9 : error);
        }
      }
    }
    return {worst, worst_lse};
  }

  Shape s;
  std::int64_t b, prefix_pages, num_pages = 0, width = 1;
  Data q, kv_b, prefix_k, prefix_v, out, lse, cache;
  std::vector<std::int32_t> pages_of_prefix, table;
  DecodeSchedule schedule;

 private:
  std::int64_t pages_of(int tokens) const { return (tokens + s.page_size - 1) / s.page_size; }
};

void expect_right(const Shape& shape, unsigned seed = 1) {
  Problem p(shape, seed);
  expand_latents(p.expand_args(), 2);
  Problem::run(p.args(), p.schedule.view(), p.options());
  // Values are about N(0, 1), averaged: rounding of keys, weights, latents and results.
  const double unit = shape.dtype == DType::kBFloat16  ? 1.0 / 256
                      : shape.dtype == DType::kFloat16 ? 1.0 / 2048
                                                       : 2e-6;
  const auto [error, lse_error] = p.errors();
  EXPECT_LT(error, 6 * unit) << "seed " << seed;
  EXPECT_LT(lse_error, 3 * unit) << "seed " << seed;
}

TEST(MlaCascade, NumericsOverTheWholeContext) {
  unsigned seed = 1;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    expect_right({.dtype = dtype}, seed++);
    expect_right({.lengths = {9, 3, 66}, .s_q = 3, .dtype = dtype, .causal = true}, seed++);
    expect_right({.lengths = {9, 3, 0}, .s_q = 2, .dtype = dtype}, seed++);
  }
}

TEST(MlaCascade, NumericsOfOtherShapes) {
  // Widths that no vector divides, one request, heads that no tile divides, no prefix, nothing of one's own.
  expect_right(
      {.prefix = 37, .lengths = {40}, .h = 5, .nope = 10, .rope = 6, .v = 7, .rank = 22, .page_size = 5}, 20);
  expect_right({.prefix = 0, .lengths = {40, 0}, .h = 2}, 21);
  expect_right({.prefix = 90, .lengths = {0, 0}, .h = 2}, 22);
  expect_right({.prefix = 90, .lengths = std::vector<std::int32_t>(37, 5), .h = 2, .with_lse = false}, 23);
  expect_right({.prefix = 600, .lengths = {300}, .h = 1, .num_parts = 5, .fixed_split_blocks = 1}, 24);
  expect_right({.prefix = 20, .lengths = {20, 9}, .h = 2, .rope = 0}, 25);
}

TEST(MlaCascade, SameBitsOnAnyNumberOfThreads) {
  Problem p({.dtype = DType::kBFloat16});
  expand_latents(p.expand_args(), 1);
  const Data keys = p.prefix_k, values = p.prefix_v;
  expand_latents(p.expand_args(), 3);
  EXPECT_TRUE(keys == p.prefix_k && values == p.prefix_v);
  Problem::run(p.args(), p.schedule.view(), p.options(1));
  const Data out = p.out, lse = p.lse;
  for (const int threads : {2, 3}) {
    Problem::run(p.args(), p.schedule.view(), p.options(threads));
    EXPECT_TRUE(out == p.out && lse == p.lse) << threads;
  }
}

TEST(MlaCascade, StridesAreFree) {
  Problem p({.lengths = {70, 30}, .s_q = 2});
  expand_latents(p.expand_args(), 1);
  Problem::run(p.args(), p.schedule.view(), p.options());
  const Data expected = p.out;
  // Queries and results as (b, h, s_q, d).
  MlaCascadeArgs a = p.args();
  const auto swapped = [&](Data& to, TensorView t) {
    const std::int64_t d = t.size(3), h = t.size(2), s_q = t.size(1);
    t.data = to.view({to.size()}).data;
    t.strides = {h * s_q * d, d, s_q * d, 1};
    return t;
  };
  Data q(DType::kFloat32, p.q.size()), out(DType::kFloat32, p.out.size());
  const TensorView from = a.q;
  a.q = swapped(q, from);
  for (std::int64_t r = 0; r < p.b; ++r)
    for (std::int64_t i = 0; i < 2; ++i)
      for (std::int64_t h = 0; h < p.s.h; ++h)
        for (std::int64_t c = 0; c < from.size(3); ++c)
          q.set(r * a.q.stride(0) + i * a.q.stride(1) + h * a.q.stride(2) + c,
                p.q[r * from.stride(0) + i * from.stride(1) + h * from.stride(2) + c]);
  const TensorView dense = a.out;
  a.out = swapped(out, dense);
  Problem::run(a, p.schedule.view(), p.options());
  for (std::int64_t r = 0; r < p.b; ++r)
    for (std::int64_t i = 0; i < 2; ++i)
      for (std::int64_t h = 0; h < p.s.h; ++h)
        for (std::int64_t c = 0; c < dense.size(3); ++c)
          ASSERT_EQ(out[r * a.out.stride(0) + i * a.out.stride(1) + h * a.out.stride(2) + c],
                    expected[r * dense.stride(0) + i * dense.stride(1) + h * dense.stride(2) + c]);
}

TEST(MlaCascade, BadInputIsNamedAndNothingIsWritten) {
  Problem p({.lengths = {9, 2}, .s_q = 3, .causal = true});
  const Data before = p.out;
  const auto message = [&](const auto& change) -> std::string {
    MlaCascadeArgs a = p.args();
    MlaCascadeOptions o = p.options();
    o.causal = false;
    change(a, o);
    try {
      Problem::run(a, p.schedule.view(), o);
    } catch (const InvalidArgument& e) {
      EXPECT_TRUE(p.out == before);
      return e.what();
    }
    return "accepted";
  };
  using A = MlaCascadeArgs&;
  using O = MlaCascadeOptions&;
  const auto expect = [&](const auto& change, const char* part) {
    EXPECT_NE(message(change).find(part), std::string::npos) << message(change) << "\nwithout " << part;
  };
  expect([](A, O o) { o.causal = true; }, "cache_seqlens[1] is 2, expected at least s_q = 3");
  expect([](A a, O) { a.kv_b.shape[1] = 100; }, "kv_b.shape[1] - d_v (d_nope) is -28");
  expect([](A a, O) { a.kv_b.shape[0] = 2; }, "kv_b.shape[0] is 2");
  expect([](A a, O) { a.prefix_k.shape[2] = 100; }, "prefix_k.shape[2] is 100");
  expect([](A a, O) { a.prefix_v.shape[0] = 5; }, "prefix_v.shape[0] is 5");
  expect([](A a, O) { a.k_cache.shape[3] = 500; }, "k_cache.shape[3] is 500");
  expect([](A a, O) { a.out.shape[3] = 100; }, "out.shape[3] is 100");
  expect([](A a, O) { a.prefix_k.dtype = DType::kFloat16; }, "prefix_k is ");
  expect([](A, O o) { o.softmax_scale = -1.0f; }, "softmax_scale is -1");
  expect([](A, O o) { o.num_threads = -1; }, "num_threads is -1");
  p.table[0] = -5;
  expect([](A, O) {}, "block_table");
  MlaCascadeArgs gpu = p.args();
  gpu.q.device = {DeviceType::kCuda, 0};
  EXPECT_THROW(mla_cascade_workspace_size(gpu, p.schedule.view()), Unsupported);
  ExpandArgs e = p.expand_args();
  e.pages.shape[0] = 2;
  try {
    expand_latents(e);
    ADD_FAILURE() << "accepted";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("pages.shape[0] is 2, expected at least 7"), std::string::npos)
        << error.what();
  }
  p.pages_of_prefix[1] = 1000;
  try {
    expand_latents(p.expand_args());
    ADD_FAILURE() << "accepted";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("pages[1] is 1000"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace flash_mla
