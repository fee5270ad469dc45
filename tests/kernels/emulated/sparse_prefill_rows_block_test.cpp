// Sparse prefill over 656-byte rows: the Hopper kernel's own code, thread by thread, on the CPU, over the problems of the
// conformance suite.

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numbers>
#include <vector>

#include "conformance/prefill_problem.h"
#include "cuda_stand_in.h"
#include "kernels/attention/sparse_prefill/sm90/raw_rows.cuh"

namespace flash_mla::sm90::sparse_prefill {

// The kernel's dynamic shared memory.
alignas(1024) std::byte dynamic_smem[227 << 10];

namespace {

using conformance::Naming;
using conformance::PrefillProblem;
using conformance::PrefillShape;
using conformance::SparseResult;

template <class F, int kHeads, bool kBf16>
void launch(const SparsePrefillParams& p, const QueryView& q, unsigned ctas, unsigned seed) {
  static_assert(sizeof(raw_rows::Smem<F, kHeads>) + 1024 <= sizeof(dynamic_smem));
  for (unsigned x = 0; x < ctas; ++x) {
    std::fill(std::begin(dynamic_smem), std::end(dynamic_smem), std::byte{0xFF});
    emulated::Block block(raw_rows::kThreads, dynamic_smem, sizeof(dynamic_smem), seed + x);
    block.block_index = {x, 0, 0};
    block.grid_size = {ctas, 1, 1};
    block.run([&] { sparse_prefill_rows_kernel<F, kHeads, kBf16>(q, p); });
  }
}

template <class T>
const T* pointer(const TensorView& t) {
  return t.defined() ? t.ptr<const T>() : nullptr;
}

SparsePrefillParams params_of(const SparsePrefillArgs& a, int h_q) {
  SparsePrefillParams p{};
  const kv::Pool pool = kv::make_pool(a.cache);
  p.cache = pool.data;
  p.page_units = static_cast<std::uint32_t>(pool.page_stride / 16);
  p.token_units = static_cast<std::uint32_t>(pool.token_stride / 16);
  p.page_size = static_cast<std::uint32_t>(pool.page_size);
  p.by_page_size = divisor(p.page_size);
  p.is_flat = !a.block_table.defined() && pool.format != KvFormat::kFp8V4 &&
              pool.page_stride == pool.page_size * pool.token_stride;
  p.slots = static_cast<std::uint32_t>(pool.num_slots());
  p.indices = a.indices.ptr<const std::int32_t>();
  p.indices_stride = a.indices.stride(0);
  p.topk_length = pointer<std::int32_t>(a.topk_length);
  p.topk = static_cast<int>(a.indices.size(1));
  if (a.cu_seqlens_q.defined()) p.batch = static_cast<int>(a.cu_seqlens_q.size(0) - 1);
  p.cu_seqlens_q = pointer<std::int32_t>(a.cu_seqlens_q);
  p.cu_seqlens_k = pointer<std::int32_t>(a.cu_seqlens_k);
  p.block_table = pointer<std::int32_t>(a.block_table);
  p.cache_seqlens = pointer<std::int32_t>(a.cache_seqlens);
  if (a.block_table.defined()) p.block_table_stride = a.block_table.stride(0);
  p.cache_scale = a.cache.format == KvFormat::kFp8Tensor ? a.cache.scale : 1.0f;
  p.head_blocks = (h_q + 63) / 64;
  p.by_head_blocks = divisor(static_cast<std::uint32_t>(p.head_blocks));
  p.items = static_cast<int>(a.q.size(0)) * p.head_blocks;
  p.h_q = h_q;
  p.scale_log2 = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(a.q.size(2)));
  p.attn_sink = pointer<float>(a.attn_sink);
  p.out_stride_n = std::int64_t{h_q} * 512;
  p.out_stride_h = 512;
  p.max_logits_stride_n = p.lse_stride_n = h_q;
  p.max_logits_stride_h = p.lse_stride_h = 1;
  return p;
}

template <class F, bool kBf16>
SparseResult prefill(PrefillProblem& problem, unsigned ctas) {
  const int h_q = problem.s.h_q;
  const SparsePrefillArgs a = problem.host_args();
  SparsePrefillParams p = params_of(a, h_q);
  const auto rows = static_cast<std::size_t>(problem.n * h_q);
  std::vector<std::uint16_t> out(rows * 512, 0xFFFF);
  SparseResult result;
  result.lse.assign(rows, std::numeric_limits<float>::quiet_NaN());
  result.max_logits = result.lse;
  p.out = out.data();
  p.max_logits = result.max_logits.data();
  p.lse = result.lse.data();
  const QueryView q{problem.q.data(), a.q.stride(0), a.q.stride(1)};
  if (h_q <= 16) {
    launch<F, 16, kBf16>(p, q, ctas, problem.s.seed);
  } else if (h_q <= 32) {
    launch<F, 32, kBf16>(p, q, ctas, problem.s.seed);
  } else {
    launch<F, 64, kBf16>(p, q, ctas, problem.s.seed);
  }
  for (const std::uint16_t x : out)
    result.out.push_back(kBf16 ? emulated::Block::bf16_to_float(x) : emulated::Block::half_to_float(x));
  return result;
}

template <class F>
void expect_right_over(const PrefillShape& shape, unsigned ctas) {
  PrefillProblem problem(shape);
  if (shape.dtype == DType::kFloat16) {
    EXPECT_EQ(problem.difference(prefill<F, false>(problem, ctas)), "");
  } else {
    EXPECT_EQ(problem.difference(prefill<F, true>(problem, ctas)), "");
  }
}
void expect_right(const PrefillShape& shape, unsigned ctas = 2) {
  using namespace raw_rows;
  if (shape.pool.format == KvFormat::kFp8V32) return expect_right_over<V32Rows>(shape, ctas);
  if (shape.pool.format == KvFormat::kFp8V4) return expect_right_over<V4Rows>(shape, ctas);
  expect_right_over<TensorRows>(shape, ctas);
}

TEST(SparsePrefillRowsBlock, Heads) {
  for (const int h_q : {1, 16, 20, 64, 100}) expect_right({.queries = {3}, .h_q = h_q});
}
TEST(SparsePrefillRowsBlock, Lengths) {
  expect_right({.queries = {11}, .pool = {.tokens = 300, .topk = 200, .lengths = true}, .sink = true});
}
TEST(SparsePrefillRowsBlock, NamesOfTokens) {
  for (const Naming naming : {Naming::kFlat, Naming::kPaged}) {
    expect_right({.queries = {3, 0, 1, 4},
                  .pool = {.tokens = 400, .page_size = 61, .topk = 100, .page_gap = 48},
                  .naming = naming,
                  .sink = true},
                 3);
  }
}
TEST(SparsePrefillRowsBlock, Formats) {
  for (const KvFormat format : {KvFormat::kFp8V4, KvFormat::kFp8Tensor}) {
    const int d_qk = format == KvFormat::kFp8V4 ? 512 : 576;
    for (const Naming naming : {Naming::kSlots, Naming::kPaged}) {
      expect_right({.queries = {3, 1},
                    .h_q = 20,
                    .d_qk = d_qk,
                    .pool = {.format = format, .page_size = 61, .topk = 100, .page_gap = 48},
                    .naming = naming,
                    .sink = true});
    }
  }
}
TEST(SparsePrefillRowsBlock, Float16Queries) { expect_right({.queries = {4}, .dtype = DType::kFloat16}); }

}  // namespace
}  // namespace flash_mla::sm90::sparse_prefill
