// dense_fp8_decode (include/flash_mla/dense_fp8.h), on every backend.

#include "flash_mla/dense_fp8.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "base/element.h"
#include "flash_mla/error.h"
#include "guarded.h"
#include "kv/format.h"
#include "sparse_problem.h"

namespace flash_mla::conformance {
namespace {

struct DenseShape {
  std::vector<std::int32_t> lengths;
  int s_q = 1, h_q = 8, page_size = 64;
  KvFormat format = KvFormat::kFp8V32;
  DType dtype = DType::kBFloat16;
  bool causal = false;
  Fp8Recipe recipe = Fp8Recipe::kFlashMla;
  unsigned seed = 1;
};

/// Requests whose pages lie in any order, with NaN in every slot that belongs to no token.
struct DenseProblem {
  explicit DenseProblem(DenseShape shape) : s(std::move(shape)) {
    d_qk = s.format == KvFormat::kFp8V4 ? 512 : 576;
    std::mt19937 rng(s.seed);
    std::normal_distribution<float> normal;
    b = static_cast<std::int64_t>(s.lengths.size());
    std::int64_t pages = 0;
    for (const std::int32_t n : s.lengths) {
      pages += (n + s.page_size - 1) / s.page_size;
      max_blocks = std::max<std::int64_t>(max_blocks, (n + s.page_size - 1) / s.page_size + 1);
    }
    // Pages of nothing but NaN, filled below.
    pool = TestPool({.format = s.format,
                     .tokens = static_cast<int>(pages) * s.page_size,
                     .page_size = s.page_size,
                     .page_gap = 64},
                    d_qk, s.dtype, s.seed);
    std::fill(pool.bytes.begin(), pool.bytes.end(), 0xFF);
    std::vector<std::int32_t> order;
    for (std::int32_t p = 0; p < pool.num_pages; ++p) order.push_back(p);
    std::shuffle(order.begin(), order.end(), rng);
    table.assign(static_cast<std::size_t>(b * max_blocks), -1);
    std::vector<std::int64_t> slots;
    std::size_t next = 0;
    for (std::int64_t r = 0; r < b; ++r) {
      for (std::int32_t j = 0; j < s.lengths[static_cast<std::size_t>(r)]; ++j) {
        auto& page = table[static_cast<std::size_t>(r * max_blocks + j / s.page_size)];
        if (j % s.page_size == 0) page = order[next++];
        slots.push_back(std::int64_t{page} * s.page_size + j % s.page_size);
      }
    }
    const auto n = static_cast<std::int64_t>(slots.size());
    std::vector<float> latents(static_cast<std::size_t>(n * (d_qk - 64))),
        ropes(static_cast<std::size_t>(n * 64));
    for (float& x : latents) x = std::clamp(normal(rng) / 10, -1.0f, 1.0f);
    for (float& x : ropes) x = to_float(to_bf16(std::clamp(normal(rng) / 10, -1.0f, 1.0f)));
    KvAppendArgs a;
    a.latent = TensorView::contiguous(latents.data(), DType::kFloat32, {n, d_qk - 64});
    a.rope = TensorView::contiguous(ropes.data(), DType::kFloat32, {n, 64});
    a.slot_mapping = TensorView::contiguous(slots.data(), DType::kInt64, {n});
    a.cache = pool.host_view();
    a.recipe = s.recipe;
    append_kv(a);
    for (std::int64_t i = 0; i < b * s.s_q * s.h_q * d_qk; ++i) {
      q.push_back(s.dtype == DType::kBFloat16 ? to_bf16(normal(rng) / 2).bits
                                              : to_fp16(normal(rng) / 2).bits);
    }
  }

  DenseFp8DecodeArgs host_args() {
    DenseFp8DecodeArgs a;
    a.q = TensorView::contiguous(q.data(), s.dtype, {b, s.s_q, s.h_q, d_qk});
    a.cache = pool.host_view();
    a.block_table = TensorView::contiguous(table.data(), DType::kInt32, {b, max_blocks});
    a.cache_seqlens = TensorView::contiguous(s.lengths.data(), DType::kInt32, {b});
    return a;
  }

  SparseResult run(BackendUnderTest& backend, int num_parts = 3, int fixed_split_blocks = 0) {
    DenseFp8DecodeArgs a = host_args();
    std::vector<std::unique_ptr<Guarded>> memory;
    const auto upload = [&](TensorView& v, std::size_t bytes, const void* from) {
      memory.push_back(std::make_unique<Guarded>(backend, bytes));
      memory.back()->upload(from);
      v.data = memory.back()->data();
      v.device = backend.device();
      return memory.back().get();
    };
    upload(a.q, q.size() * 2, q.data());
    upload(a.cache.data, pool.bytes.size(), pool.bytes.data());
    upload(a.block_table, table.size() * 4, table.data());
    upload(a.cache_seqlens, s.lengths.size() * 4, s.lengths.data());
    a.out = TensorView::contiguous(nullptr, s.dtype, {b, s.s_q, s.h_q, 512});
    a.lse = TensorView::contiguous(nullptr, DType::kFloat32, {b, s.h_q, s.s_q});
    const std::vector<std::uint8_t> fill(static_cast<std::size_t>(a.out.numel()) * 2 + 4, 0xFF);
    const Guarded* out = upload(a.out, static_cast<std::size_t>(a.out.numel()) * 2, fill.data());
    const Guarded* lse = upload(a.lse, static_cast<std::size_t>(a.lse.numel()) * 4, fill.data());
    const auto plan =
        DecodeSchedule::build(s.lengths, {.num_parts = num_parts, .fixed_split_blocks = fixed_split_blocks});
    DecodeScheduleView view = plan.view();
    upload(view.parts, plan.parts().size_bytes(), plan.parts().data());
    upload(view.num_splits, plan.num_splits().size_bytes(), plan.num_splits().data());
    DenseFp8DecodeOptions options;
    options.causal = s.causal;
    options.num_threads = 2;
    const std::size_t bytes = dense_fp8_decode_workspace_size(a, view, options);
    Guarded workspace(backend, bytes);
    dense_fp8_decode(a, view, workspace.data(), bytes, options);
    workspace.download();
    SparseResult r;
    r.bits = out->download();
    for (std::size_t i = 0; i < r.bits.size(); i += 2) {
      std::uint16_t bits = 0;
      std::memcpy(&bits, &r.bits[i], 2);
      r.out.push_back(s.dtype == DType::kBFloat16 ? to_float(Bf16{bits}) : to_float(Fp16{bits}));
    }
    const std::vector<std::uint8_t> raw = lse->download();
    r.lse.resize(raw.size() / 4);
    std::memcpy(r.lse.data(), raw.data(), raw.size());
    return r;
  }

  std::string difference(const SparseResult& got) {
    DenseFp8DecodeArgs a = host_args();
    std::vector<float> out(got.out.size()), lse(got.lse.size());
    a.out = TensorView::contiguous(out.data(), DType::kFloat32, {b, s.s_q, s.h_q, 512});
    a.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {b, s.h_q, s.s_q});
    DenseFp8DecodeOptions options;
    options.causal = s.causal;
    reference::dense_fp8_decode(a, options);
    std::string text = compare("out", got.out, out, 8e-4, 2.01 / 128, 5e-6);
    return text.empty() ? compare("lse", got.lse, lse, 1e-6, 8.01 / 65536, 0) : text;
  }

  DenseShape s;
  int d_qk = 576;
  std::int64_t b = 0, max_blocks = 1;
  TestPool pool;
  std::vector<std::uint16_t> q;
  std::vector<std::int32_t> table;
};

class DenseFp8 : public ::testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {
 protected:
  BackendUnderTest& backend() { return *GetParam(); }
  void expect_matches(const DenseShape& s, int parts = 3, int fixed_split_blocks = 0) {
    if (!backend().supports(Operation::kDenseFp8Decode, s.format, s.dtype)) return;
    DenseProblem p(s);
    EXPECT_EQ(p.difference(p.run(backend(), parts, fixed_split_blocks)), "")
        << kv_format_name(s.format) << " " << dtype_name(s.dtype) << " s_q " << s.s_q << " h_q " << s.h_q
        << " page " << s.page_size << " causal " << s.causal << " parts " << parts << " fixed "
        << fixed_split_blocks;
  }
};

INSTANTIATE_TEST_SUITE_P(Backends, DenseFp8, ::testing::ValuesIn(backends_under_test()),
                         [](const auto& b) { return b.param->name(); });

TEST_P(DenseFp8, NumericsOverFormats) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const KvFormat rows = dtype == DType::kBFloat16 ? KvFormat::kBFloat16 : KvFormat::kFloat16;
    for (const KvFormat format : {KvFormat::kFp8V32, KvFormat::kFp8V4, KvFormat::kFp8Tensor, rows}) {
      for (const bool causal : {false, true}) {
        expect_matches({.lengths = {300, 0, 70, 1},
                        .s_q = 3,
                        .h_q = 16,
                        .format = format,
                        .dtype = dtype,
                        .causal = causal});
        expect_matches({.lengths = {130}, .h_q = 128, .format = format, .dtype = dtype, .causal = causal});
      }
    }
  }
  expect_matches({.lengths = {200, 33}, .recipe = Fp8Recipe::kVllm});
  expect_matches({.lengths = {200, 33}, .recipe = Fp8Recipe::kSglang});
}

TEST_P(DenseFp8, NumericsOverSplitsAndPages) {
  for (const int page_size : {1, 16, 61, 64, 128}) {
    for (const int parts : {1, 7}) {
      for (const int fixed : {0, 2}) {
        expect_matches(
            {.lengths = {900, 64, 0, 5}, .s_q = 2, .h_q = 20, .page_size = page_size, .causal = true}, parts,
            fixed);
      }
    }
  }
}

TEST_P(DenseFp8, NumericsOverHeads) {
  for (const KvFormat format : {KvFormat::kFp8V32, KvFormat::kFp8Tensor}) {
    for (const int h_q : {1, 16, 17, 32, 33, 64, 100, 128}) {
      for (const int s_q : {1, 2}) {
        expect_matches({.lengths = {257, 31}, .s_q = s_q, .h_q = h_q, .format = format, .causal = s_q > 1});
      }
    }
  }
}

TEST_P(DenseFp8, BatchInvariant) {
  if (!backend().batch_invariant()) return;
  for (const KvFormat format : {KvFormat::kFp8V32, KvFormat::kFp8Tensor}) {
    DenseProblem p({.lengths = {333, 900, 64}, .h_q = 16, .format = format});
    if (!backend().supports(Operation::kDenseFp8Decode, p.s.format, p.s.dtype)) return;
    const SparseResult all = p.run(backend(), 5, 3);
    // The second request alone.
    DenseProblem one = p;
    const auto rows = static_cast<std::ptrdiff_t>(p.s.h_q);
    one.b = 1;
    one.s.lengths = {900};
    one.q.assign(p.q.begin() + rows * p.d_qk, p.q.begin() + 2 * rows * p.d_qk);
    one.table.assign(p.table.begin() + p.max_blocks, p.table.begin() + 2 * p.max_blocks);
    const std::ptrdiff_t bytes = rows * 512 * 2;
    const std::vector<std::uint8_t> second(all.bits.begin() + bytes, all.bits.begin() + 2 * bytes);
    for (const int parts : {1, 2, 7}) EXPECT_EQ(one.run(backend(), parts, 3).bits, second) << parts;
  }
}

TEST_P(DenseFp8, ANanKeyReachesItsRequestAlone) {
  for (const KvFormat format : {KvFormat::kFp8V32, KvFormat::kFp8Tensor}) {
    DenseProblem p({.lengths = {150, 150}, .h_q = 16, .format = format});
    if (!backend().supports(Operation::kDenseFp8Decode, p.s.format, p.s.dtype)) return;
    const kv::Pool pool = kv::make_pool(p.pool.host_view());
    kv::locate(pool, p.table[1], 5).latent[100] = std::byte{0x7F};
    EXPECT_EQ(p.difference(p.run(backend())), "");
  }
}

TEST_P(DenseFp8, ARowWithoutKeysIsZeroAndInfinite) {
  DenseProblem p({.lengths = {0, 1}, .s_q = 2, .h_q = 3, .causal = true});
  if (!backend().supports(Operation::kDenseFp8Decode, p.s.format, p.s.dtype)) return;
  const SparseResult r = p.run(backend());
  for (std::size_t i = 0; i < 6; ++i) EXPECT_EQ(r.lse[i], std::numeric_limits<float>::infinity());
  for (std::size_t i = 0; i < 9 * 512; ++i) ASSERT_EQ(r.out[i], 0.0f);
  EXPECT_EQ(p.difference(r), "");
}

TEST_P(DenseFp8, RepeatsAreBitEqual) {
  DenseProblem p({.lengths = {900, 64, 0, 700}, .h_q = 16});
  if (!backend().supports(Operation::kDenseFp8Decode, p.s.format, p.s.dtype)) return;
  const SparseResult first = p.run(backend());
  for (int i = 0; i < 20; ++i) ASSERT_EQ(p.run(backend()).bits, first.bits);
}

// On the CPU queries may be float32, over a cache in any format.
TEST(DenseFp8Float32, MatchesTheReferenceOverFormats) {
  for (const KvFormat format :
       {KvFormat::kFp8V32, KvFormat::kFp8V4, KvFormat::kFp8Tensor, KvFormat::kBFloat16, KvFormat::kFloat16}) {
    const DType half = format == KvFormat::kFloat16 ? DType::kFloat16 : DType::kBFloat16;
    DenseProblem p(
        {.lengths = {300, 0, 70, 1}, .s_q = 2, .h_q = 5, .format = format, .dtype = half, .causal = true});
    std::vector<float> q;
    for (const std::uint16_t bits : p.q) {
      q.push_back((half == DType::kBFloat16 ? to_float(Bf16{bits}) : to_float(Fp16{bits})) * 1.001f);
    }
    const std::int64_t b = 4, s_q = 2, h_q = 5;
    std::vector<float> out(static_cast<std::size_t>(b * s_q * h_q * 512)),
        lse(static_cast<std::size_t>(b * h_q * s_q));
    std::vector<float> expected_out(out.size()), expected_lse(lse.size());
    DenseFp8DecodeArgs a = p.host_args();
    a.q = TensorView::contiguous(q.data(), DType::kFloat32, {b, s_q, h_q, p.d_qk});
    a.out = TensorView::contiguous(out.data(), DType::kFloat32, {b, s_q, h_q, 512});
    a.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {b, h_q, s_q});
    const auto plan = DecodeSchedule::build(p.s.lengths, {.num_parts = 3});
    DenseFp8DecodeOptions options;
    options.causal = true;
    const std::size_t bytes = dense_fp8_decode_workspace_size(a, plan.view(), options);
    std::vector<std::uint8_t> memory(bytes + 64);
    dense_fp8_decode(a, plan.view(),
                     memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64), bytes,
                     options);
    a.out.data = expected_out.data();
    a.lse.data = expected_lse.data();
    reference::dense_fp8_decode(a, options);
    EXPECT_EQ(compare("out", out, expected_out, 1e-5, 1e-5, 1e-9), "") << kv_format_name(format);
    EXPECT_EQ(compare("lse", lse, expected_lse, 1e-5, 1e-5, 0), "") << kv_format_name(format);
  }
}

TEST(DenseFp8Checks, ErrorsNameArgumentAndValue) {
  DenseProblem p({.lengths = {100, 20}});
  std::vector<Bf16> out(2 * 8 * 512);
  DenseFp8DecodeArgs a = p.host_args();
  a.out = TensorView::contiguous(out.data(), DType::kBFloat16, {2, 1, 8, 512});
  const auto plan = DecodeSchedule::build(p.s.lengths, {.num_parts = 2});
  const auto expect_refused = [&](const DenseFp8DecodeArgs& args, const std::string& part) {
    try {
      std::vector<std::uint8_t> memory(1 << 23);
      dense_fp8_decode(args, plan.view(),
                       memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64),
                       memory.size() - 64);
      ADD_FAILURE() << "accepted, expected a message with \"" << part << "\"";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  DenseFp8DecodeArgs bad = a;
  bad.cache.format = KvFormat::kFp8Tensor;
  expect_refused(bad, "cache.shape[3] is 656, expected bytes of a token = 576");
  bad = a;
  bad.cache_seqlens.shape[0] = 1;
  expect_refused(bad, "cache_seqlens.shape[0] is 1");
  p.table[1] = 1000;
  expect_refused(a, "block_table[0][1] is 1000");
}

}  // namespace
}  // namespace flash_mla::conformance
