// Un-absorbed prefill attention on the GPU, against its definition in float64 on the CPU.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <sstream>

#include "device.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_prefill/sm90/dense_prefill.h"

namespace flash_mla::gpu_test {
namespace {

constexpr Device kDevice{DeviceType::kCuda, 0};

struct Lengths {
  int q, k;
};

struct Shape {
  std::vector<Lengths> seqs;
  int heads = 2;
  DType dtype = DType::kBFloat16;
  bool causal = true;
  bool with_lse = true;
  float scale = 0.0721688f;  // 192 ** -0.5
  std::int64_t first_query = 0,
               first_key = 0;  ///< rows before the first sequence's
  unsigned seed = 1;

  std::string text() const {
    std::ostringstream t;
    t << "heads " << heads << ' ' << dtype_name(dtype) << (causal ? " causal" : "") << " (q, k):";
    for (const Lengths& l : seqs) t << " (" << l.q << ", " << l.k << ')';
    return t.str();
  }
};

std::uint16_t to_bits(float x, DType dtype) {
  if (dtype == DType::kFloat16) {
    const _Float16 h = static_cast<_Float16>(x);
    return std::bit_cast<std::uint16_t>(h);
  }
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
float to_float(std::uint16_t bits, DType dtype) {
  if (dtype == DType::kFloat16) return static_cast<float>(std::bit_cast<_Float16>(bits));
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Rows of a tensor on the device, wider than what is used of them; all that is not used is NaN.
struct Rows {
  std::int64_t first, count;  // rows before those of the sequences, and theirs; 3 more follow
  std::int64_t width;         // elements of a row
  std::vector<std::uint16_t> host;
  DeviceMemory device;

  Rows(std::int64_t first_row, std::int64_t rows, std::int64_t elements)
      : first(first_row),
        count(rows),
        width(elements),
        host(static_cast<std::size_t>(rows * elements), 0xFFFF),
        device(static_cast<std::size_t>((first_row + rows + 3) * elements) * 2) {
    device.poison();
  }
  std::int64_t total() const { return first + count + 3; }
  void upload() {
    check(cudaMemcpy(device.as<std::uint16_t>() + first * width, host.data(), host.size() * 2,
                     cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
  void download() {
    check(cudaMemcpy(host.data(), device.as<std::uint16_t>() + first * width, host.size() * 2,
                     cudaMemcpyDeviceToHost),
          "cudaMemcpy");
  }
  TensorView view(std::int64_t at, std::int64_t heads, std::int64_t stride, std::int64_t columns,
                  DType dtype) {
    TensorView t =
        TensorView::contiguous(device.as<std::uint16_t>() + at, dtype, {total(), heads, columns}, kDevice);
    t.strides[0] = width;
    t.strides[1] = stride;
    return t;
  }
};

/// One problem in device memory: q is a view into wider rows, k_nope and v share rows, k_rope is the end of
/// gathered latents, out lies head-major in wider rows.
class Case {
 public:
  explicit Case(Shape given)
      : shape(std::move(given)),
        q(shape.first_query, sum(&Lengths::q), shape.heads * 200),
        kv(shape.first_key, sum(&Lengths::k), shape.heads * 256),
        latent(shape.first_key, sum(&Lengths::k), 576),
        out(shape.first_query, sum(&Lengths::q), shape.heads * 136),
        lse(static_cast<std::size_t>(q.total() * shape.heads) * 4),
        offsets_q((shape.seqs.size() + 1) * 4),
        offsets_k((shape.seqs.size() + 1) * 4),
        workspace(sm90::dense_prefill_workspace_size()) {
    std::mt19937 rng(shape.seed);
    std::normal_distribution<float> normal;
    for (Rows* rows : {&q, &kv, &latent}) {
      const bool per_head = rows != &latent;
      const std::int64_t stride = rows == &q ? 200 : rows == &kv ? 256 : 576;
      for (std::int64_t r = 0; r < rows->count; ++r) {
        for (std::int64_t h = 0; h < (per_head ? shape.heads : 1); ++h) {
          for (std::int64_t d = per_head ? 0 : 512; d < (rows == &q ? 192 : stride); ++d) {
            rows->host[static_cast<std::size_t>(r * rows->width + h * stride + d)] =
                to_bits(normal(rng), shape.dtype);
          }
        }
      }
      rows->upload();
    }
    args.q = q.view(0, shape.heads, 200, 192, shape.dtype);
    args.k_nope = kv.view(0, shape.heads, 256, 128, shape.dtype);
    args.v = kv.view(128, shape.heads, 256, 128, shape.dtype);
    args.k_rope = TensorView::contiguous(latent.device.as<std::uint16_t>() + 512, shape.dtype,
                                         {latent.total(), 64}, kDevice);
    args.k_rope.strides[0] = 576;
    args.out = out.view(0, shape.heads, 136, 128, shape.dtype);
    if (shape.with_lse)
      args.lse = TensorView::contiguous(lse.as<void>(), DType::kFloat32, {shape.heads, q.total()}, kDevice);
    const auto n = static_cast<std::int64_t>(shape.seqs.size()) + 1;
    args.cu_seqlens_q = TensorView::contiguous(offsets_q.as<void>(), DType::kInt32, {n}, kDevice);
    args.cu_seqlens_k = TensorView::contiguous(offsets_k.as<void>(), DType::kInt32, {n}, kDevice);
    set_lengths(shape.seqs);
  }

  /// Other lengths that need no more rows than the first.
  void set_lengths(const std::vector<Lengths>& seqs) {
    shape.seqs = seqs;
    std::vector<std::int32_t> at_q{static_cast<std::int32_t>(shape.first_query)},
        at_k{static_cast<std::int32_t>(shape.first_key)};
    for (const Lengths& l : seqs) {
      at_q.push_back(at_q.back() + l.q);
      at_k.push_back(at_k.back() + l.k);
    }
    offsets_q.upload(at_q.data(), at_q.size() * 4);
    offsets_k.upload(at_k.data(), at_k.size() * 4);
  }

  void poison() {
    out.device.poison();
    lse.poison();
    workspace.poison();
  }
  void run(cudaStream_t stream = nullptr) {
    poison();
    sm90::dense_prefill(args, shape.scale, shape.causal, workspace.as<void>(), stream);
    check(cudaDeviceSynchronize(), "dense_prefill");
  }

  /// "" if the outputs agree with the definition and nothing else was written.
  std::string difference() {
    out.download();
    const std::vector<float> got_lse = lse.download<float>();
    std::ostringstream t;
    int wrong = 0;
    const auto report = [&](const char* what, std::int64_t row, int head, int column, double got,
                            double want) {
      if (++wrong <= 3)
        t << what << " of row " << row << " head " << head << " column " << column << " is " << got
          << ", not " << want << "; ";
    };
    std::int64_t first_q = 0, first_k = 0;
    std::vector<double> p;
    // Rounding P and the result are the errors there are; fp16 also loses what is below 2^-24 of the largest.
    const double unit = shape.dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
    for (const Lengths& l : shape.seqs) {
      for (int i = 0; i < l.q; ++i) {
        for (int h = 0; h < shape.heads; ++h) {
          const int visible = std::clamp(shape.causal ? l.k - l.q + i + 1 : l.k, 0, l.k);
          const std::uint16_t* query = &q.host[static_cast<std::size_t>((first_q + i) * q.width + h * 200)];
          double highest = -std::numeric_limits<double>::infinity(), total = 0;
          p.assign(static_cast<std::size_t>(visible), 0);
          for (int j = 0; j < visible; ++j) {
            const std::uint16_t* nope =
                &kv.host[static_cast<std::size_t>((first_k + j) * kv.width + h * 256)];
            const std::uint16_t* rope = &latent.host[static_cast<std::size_t>((first_k + j) * 576 + 512)];
            double s = 0;
            for (int d = 0; d < 192; ++d)
              s += double{number(query[d])} * double{number(d < 128 ? nope[d] : rope[d - 128])};
            p[static_cast<std::size_t>(j)] = s * double{shape.scale};
            highest = std::max(highest, s * double{shape.scale});
          }
          for (double& x : p) total += x = std::exp(x - highest);
          std::vector<double> y(128), size(128);
          for (int j = 0; j < visible; ++j) {
            const std::uint16_t* v =
                &kv.host[static_cast<std::size_t>((first_k + j) * kv.width + h * 256 + 128)];
            for (std::size_t d = 0; d < 128; ++d) {
              const double x = p[static_cast<std::size_t>(j)] / total * double{number(v[d])};
              y[d] += x;
              size[d] += std::abs(x);
            }
          }
          for (std::size_t d = 0; d < 128; ++d) {
            const double x =
                number(out.host[static_cast<std::size_t>((first_q + i) * out.width + h * 136) + d]);
            const double error = std::abs(x - y[d]);
            if (!(error <= 1.05 * unit * (size[d] + std::abs(y[d])) + 3e-5) &&
                !(std::isnan(x) && std::isnan(y[d])))
              report("out", first_q + i, h, static_cast<int>(d), x, y[d]);
          }
          if (!shape.with_lse) continue;
          const double want =
              visible > 0 ? highest + std::log(total) : std::numeric_limits<double>::infinity();
          const double x = got_lse[static_cast<std::size_t>(h * q.total() + shape.first_query + first_q + i)];
          if (x != want && !(std::abs(x - want) <= 3e-5 + 4e-6 * std::abs(want)) &&
              !(std::isnan(x) && std::isnan(want)))
            report("lse", first_q + i, h, 0, x, want);
        }
      }
      first_q += l.q;
      first_k += l.k;
    }
    // The columns between heads, and the rows of no sequence.
    for (std::int64_t r = 0; r < out.count; ++r) {
      for (std::int64_t c = 0; c < out.width; ++c) {
        const bool written = r < first_q && c % 136 < 128;
        if (!written && out.host[static_cast<std::size_t>(r * out.width + c)] != 0xFFFF)
          report("padding", r, 0, static_cast<int>(c), 0, 0);
      }
    }
    if (wrong > 3) t << wrong << " in all";
    return t.str();
  }

  float number(std::uint16_t bits) const { return to_float(bits, shape.dtype); }

  Shape shape;
  Rows q, kv, latent, out;
  DeviceMemory lse, offsets_q, offsets_k, workspace;
  sm90::DensePrefillArgs args;

 private:
  std::int64_t sum(int Lengths::*which) const {
    std::int64_t n = 0;
    for (const Lengths& l : shape.seqs) n += l.*which;
    return n;
  }
};

void expect_right(const Shape& shape) {
  Case c(shape);
  c.run();
  EXPECT_EQ(c.difference(), "") << shape.text();
}

TEST(Prefill, OneSequence) {
  unsigned seed = 1;
  for (const int n : {1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 513, 640}) {
    for (const bool causal : {true, false})
      expect_right({.seqs = {{n, n}}, .heads = 1, .causal = causal, .seed = seed++});
  }
}

TEST(Prefill, ChunksBehindAPrefix) {
  unsigned seed = 100;
  for (const Lengths l : {Lengths{1, 300}, Lengths{64, 65}, Lengths{100, 500}, Lengths{128, 256},
                          Lengths{129, 700}, Lengths{256, 383}, Lengths{300, 1000}}) {
    for (const bool causal : {true, false})
      expect_right({.seqs = {l}, .heads = 3, .causal = causal, .seed = seed++});
  }
}

TEST(Prefill, RaggedMixes) {
  const std::vector<Lengths> mix{{0, 0},   {5, 5},    {128, 128}, {0, 77},  {130, 130},
                                 {1, 200}, {77, 300}, {3, 0},     {64, 64}, {257, 400}};
  unsigned seed = 200;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const bool causal : {true, false})
      expect_right({.seqs = mix, .heads = 2, .dtype = dtype, .causal = causal, .seed = seed++});
  }
}

// Rows without a key give 0 and +inf.
TEST(Prefill, MoreQueriesThanKeys) {
  std::vector<Lengths> mix;
  for (int i = 0; i < 12; ++i) mix.insert(mix.end(), {{20, 0}, {9, 4}, {3, 0}, {5, 0}, {7, 30}});
  expect_right({.seqs = mix, .heads = 40, .seed = 301});
  expect_right({.seqs = {{200, 60}, {10, 3}, {300, 140}, {130, 0}}, .seed = 300});
}

TEST(Prefill, Heads) {
  unsigned seed = 400;
  for (const int heads : {1, 3, 16, 64, 128})
    expect_right({.seqs = {{40, 150}, {131, 131}, {7, 7}}, .heads = heads, .seed = seed++});
}

// More items than CTAs, more sequences than a warp has lanes.
TEST(Prefill, ManySequences) {
  std::mt19937 rng(5);
  std::vector<Lengths> seqs;
  for (int i = 0; i < 100; ++i) {
    const int n = static_cast<int>(rng() % 40);
    seqs.push_back({n, n + static_cast<int>(rng() % 30)});
  }
  seqs[50] = {500, 500};
  expect_right({.seqs = seqs, .heads = 16, .seed = 500});
  expect_right({.seqs = seqs, .heads = 3, .causal = false, .seed = 501});
}

TEST(Prefill, LargeScores) {
  for (const float scale : {1.0f, 0.1352338f, 1e-3f})
    expect_right({.seqs = {{200, 400}, {300, 300}}, .scale = scale, .seed = 600});
}

TEST(Prefill, WithoutLse) { expect_right({.seqs = {{150, 150}}, .with_lse = false, .seed = 700}); }

// Offsets beyond 2^32 bytes in q, kv and out.
TEST(Prefill, FarIntoLargeTensors) {
  expect_right(
      {.seqs = {{20, 20}, {10, 150}}, .heads = 128, .first_query = 130000, .first_key = 70000, .seed = 800});
}

// What other sequences hold never reaches a result.
TEST(Prefill, NaNStaysInItsSequence) {
  for (const bool causal : {true, false}) {
    Case c({.seqs = {{100, 100}, {60, 60}, {100, 140}}, .causal = causal, .seed = 900});
    for (std::int64_t r = 100; r < 160; ++r) {
      for (Rows* rows : {&c.q, &c.kv, &c.latent})
        std::fill_n(rows->host.begin() + r * rows->width, rows->width, std::uint16_t{0x7FFF});
    }
    for (Rows* rows : {&c.q, &c.kv, &c.latent}) rows->upload();
    c.run();
    // The definition gives NaN for the middle sequence, numbers for the others.
    EXPECT_EQ(c.difference(), "");
    EXPECT_TRUE(std::isnan(c.number(c.out.host[static_cast<std::size_t>(120 * c.out.width)])));
  }
}

// A key that makes every score -inf leaves no average; one of many is just not attended to.
TEST(Prefill, InfiniteScores) {
  Case c({.seqs = {{130, 130}}, .heads = 1, .seed = 950});
  for (std::int64_t r = 0; r < 130; ++r)
    c.q.host[static_cast<std::size_t>(r * c.q.width)] = to_bits(1, c.shape.dtype);
  c.kv.host[0] = 0xFF80;  // -inf
  c.q.upload();
  c.kv.upload();
  c.run();
  c.out.download();
  const auto lse = c.lse.download<float>();
  EXPECT_TRUE(std::isnan(lse[0]));
  EXPECT_TRUE(std::isnan(c.number(c.out.host[0])));
  for (std::size_t r = 1; r < 130; ++r) {
    ASSERT_TRUE(std::isfinite(lse[r])) << r;
    ASSERT_TRUE(std::isfinite(c.number(c.out.host[r * static_cast<std::size_t>(c.out.width)]))) << r;
  }
}

TEST(Prefill, SameBitsEveryTimeAndInAnyBatch) {
  Case c({.seqs = {{300, 300}, {200, 500}, {17, 17}}, .heads = 40, .seed = 1000});
  c.run();
  const auto bits = c.out.device.download<std::uint16_t>();
  const auto lse = c.lse.download<std::uint32_t>();
  for (int i = 0; i < 10; ++i) {
    c.run();
    ASSERT_EQ(c.out.device.download<std::uint16_t>(), bits);
    ASSERT_EQ(c.lse.download<std::uint32_t>(), lse);
  }
  c.set_lengths({{300, 300}});
  c.run();
  const auto alone = c.out.device.download<std::uint16_t>();
  EXPECT_TRUE(std::equal(alone.begin(), alone.begin() + 300 * c.out.width, bits.begin()));
}

TEST(Prefill, CapturedCallTakesNewLengths) {
  Case c({.seqs = {{300, 300}, {200, 500}}, .heads = 16, .seed = 1100});
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  sm90::dense_prefill(c.args, c.shape.scale, true, c.workspace.as<void>(), stream);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  for (const std::vector<Lengths>& seqs :
       {std::vector<Lengths>{{300, 300}, {200, 500}}, {{20, 700}, {0, 0}}, {{129, 129}, {333, 600}}}) {
    c.set_lengths(seqs);
    c.poison();
    check(cudaDeviceSynchronize(), "poison");
    check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
    check(cudaStreamSynchronize(stream), "replay");
    EXPECT_EQ(c.difference(), "") << c.shape.text();
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST(Prefill, NothingToDo) {
  expect_right({.seqs = {}});
  expect_right({.seqs = {{0, 0}, {0, 5}}});
  Case c({.seqs = {{4, 4}}});
  c.args.cu_seqlens_q.shape[0] = c.args.cu_seqlens_k.shape[0] = 1;
  c.poison();
  EXPECT_NO_THROW(sm90::dense_prefill(c.args, 1.0f, true, c.workspace.as<void>(), nullptr));
  c.args.q.shape[0] = c.args.out.shape[0] = c.args.lse.shape[1] = 0;
  EXPECT_NO_THROW(sm90::dense_prefill(c.args, 1.0f, true, c.workspace.as<void>(), nullptr));
  check(cudaDeviceSynchronize(), "dense_prefill");
}

TEST(Prefill, BadArgumentsAreNamed) {
  Case c({.seqs = {{4, 4}}});
  const auto message = [&](const std::function<void(sm90::DensePrefillArgs&)>& spoil) -> std::string {
    sm90::DensePrefillArgs args = c.args;
    spoil(args);
    try {
      sm90::check_supported(args);
    } catch (const std::exception& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message([](auto&) {}), "");
  using Args = sm90::DensePrefillArgs;
  const auto starts = [&](const char* with, const std::function<void(Args&)>& spoil) {
    EXPECT_EQ(message(spoil).rfind(with, 0), 0u) << with << " | " << message(spoil);
  };
  starts("q is", [](Args& a) { a.q.shape[2] = 128; });
  starts("q is", [](Args& a) { a.q.dtype = DType::kFloat32; });
  starts("q is", [](Args& a) { a.q.device = {}; });
  starts("q.stride[0] is 193", [](Args& a) { a.q.strides[0] = 193; });
  starts("k_nope is", [](Args& a) { a.k_nope.shape[1] = 5; });
  starts("k_nope.stride[2] is 2", [](Args& a) { a.k_nope.strides[2] = 2; });
  starts("k_rope is", [](Args& a) { a.k_rope.shape[0] -= 1; });
  starts("k_rope.data is", [](Args& a) { a.k_rope.data = static_cast<std::uint16_t*>(a.k_rope.data) + 1; });
  starts("v is", [](Args& a) { a.v.dtype = DType::kFloat16; });
  starts("out is", [](Args& a) { a.out.shape[2] = 192; });
  starts("lse is", [](Args& a) { a.lse.shape[0] += 1; });
  starts("cu_seqlens_q is", [](Args& a) { a.cu_seqlens_q.shape[0] = 0; });
  starts("cu_seqlens_k is", [](Args& a) { a.cu_seqlens_k.shape[0] += 1; });
  for (const float scale : {0.0f, -1.0f, INFINITY, NAN}) {
    EXPECT_THROW(sm90::dense_prefill(c.args, scale, true, c.workspace.as<void>(), nullptr), InvalidArgument);
  }
  EXPECT_THROW(sm90::dense_prefill(c.args, 1.0f, true, nullptr, nullptr), InvalidArgument);
}

// A comparison that cannot fail proves nothing.
TEST(Prefill, AWrongResultIsSeen) {
  Case c({.seqs = {{100, 200}, {60, 60}}, .seed = 1200});
  c.run();
  EXPECT_EQ(c.difference(), "");
  c.set_lengths({{100, 199}, {60, 61}});
  EXPECT_NE(c.difference(), "");
  c.poison();
  EXPECT_NE(c.difference(), "");
}

}  // namespace
}  // namespace flash_mla::gpu_test
