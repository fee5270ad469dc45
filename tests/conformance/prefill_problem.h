#pragma once

// A random sparse prefill on the host.

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/element.h"
#include "flash_mla/reference.h"
#include "guarded.h"
#include "sparse_problem.h"

namespace flash_mla::conformance {

/// How entries name tokens.
enum class Naming { kSlots, kFlat, kPaged };

struct PrefillShape {
  std::vector<int> queries{9};  ///< of each request; one request for kSlots
  int h_q = 16, d_qk = 576;
  PoolShape pool{.tokens = 300, .topk = 100};
  Naming naming = Naming::kSlots;
  bool sink = false;
  DType dtype = DType::kBFloat16;
  unsigned seed = 1;
};

class PrefillProblem {
 public:
  explicit PrefillProblem(PrefillShape shape) : s(std::move(shape)) {
    n = std::accumulate(s.queries.begin(), s.queries.end(), 0);
    std::mt19937 rng(s.seed);
    std::normal_distribution<float> normal;
    const auto below = [&](int limit) { return std::uniform_int_distribution<int>(0, limit - 1)(rng); };
    for (int i = 0; i < n * s.h_q * s.d_qk; ++i) {
      const float x = normal(rng) / 2;
      std::uint16_t bits = s.dtype == DType::kBFloat16 ? to_bf16(x).bits : to_fp16(x).bits;
      q.push_back(bits);
    }
    pool = TestPool(s.pool, s.d_qk, s.dtype, s.seed + 7);
    if (s.sink) {
      for (int h = 0; h < s.h_q; ++h) sink.push_back(normal(rng) + 3);
    }
    starts_q.push_back(0);
    for (const int count : s.queries) starts_q.push_back(starts_q.back() + count);
    const auto slots = static_cast<int>(pool.num_pages) * s.pool.page_size;
    name_tokens(slots);
    for (std::size_t r = 0; r < s.queries.size(); ++r) {
      // Positions whose tokens are there.
      std::vector<std::int32_t> there;
      for (int x = 0; x < limit(r, slots); ++x) {
        const std::int64_t slot = slot_of(r, x);
        if (std::find(pool.live.begin(), pool.live.end(), slot) != pool.live.end()) there.push_back(x);
      }
      for (int i = 0; i < s.queries[r]; ++i) {
        lengths.push_back(s.pool.lengths ? (i % 3 == 0 ? 0 : below(s.pool.topk + 1)) : s.pool.topk);
        for (int j = 0; j < s.pool.topk; ++j) {
          const int kind = below(10);
          std::int32_t entry =
              there.empty() ? -1 : there[static_cast<std::size_t>(below(static_cast<int>(there.size())))];
          if (kind == 0) entry = -1;
          if (kind == 1) entry = limit(r, slots) + below(3) * 100'000'000;  // beyond the tokens: none
          if (j >= lengths.back()) entry = j % 2 == 0 ? 0 : 2147480000;
          indices.push_back(entry);
        }
      }
    }
  }

  SparsePrefillArgs host_args() {
    SparsePrefillArgs a;
    a.q = TensorView::contiguous(q.data(), s.dtype, {n, s.h_q, s.d_qk});
    a.cache = pool.host_view();
    a.indices = TensorView::contiguous(indices.data(), DType::kInt32, {n, s.pool.topk});
    if (s.pool.lengths) a.topk_length = TensorView::contiguous(lengths.data(), DType::kInt32, {n});
    if (s.sink) a.attn_sink = TensorView::contiguous(sink.data(), DType::kFloat32, {s.h_q});
    const auto b = static_cast<std::int64_t>(s.queries.size());
    if (s.naming != Naming::kSlots)
      a.cu_seqlens_q = TensorView::contiguous(starts_q.data(), DType::kInt32, {b + 1});
    if (s.naming == Naming::kFlat)
      a.cu_seqlens_k = TensorView::contiguous(starts_k.data(), DType::kInt32, {b + 1});
    if (s.naming == Naming::kPaged) {
      a.block_table = TensorView::contiguous(table.data(), DType::kInt32, {b, max_blocks});
      a.cache_seqlens = TensorView::contiguous(seqlens.data(), DType::kInt32, {b});
    }
    return a;
  }

  SparseResult run(BackendUnderTest& backend, int num_threads = 2) {
    SparsePrefillArgs a = host_args();
    std::vector<std::unique_ptr<Guarded>> memory;
    const auto upload = [&](TensorView& v, std::size_t bytes, const void* from) {
      memory.push_back(std::make_unique<Guarded>(backend, bytes));
      memory.back()->upload(from);
      v.data = memory.back()->data();
      v.device = backend.device();
      return memory.back().get();
    };
    for (TensorView* v : {&a.q, &a.indices, &a.topk_length, &a.attn_sink, &a.cu_seqlens_q, &a.cu_seqlens_k,
                          &a.block_table, &a.cache_seqlens}) {
      if (v->defined()) upload(*v, static_cast<std::size_t>(v->numel()) * dtype_size(v->dtype), v->data);
    }
    upload(a.cache.data, pool.bytes.size(), pool.bytes.data());
    std::vector<std::uint8_t> out_fill(static_cast<std::size_t>(n * s.h_q * 512) * 2, 0xFF);
    std::vector<float> fill(static_cast<std::size_t>(n * s.h_q), std::numeric_limits<float>::quiet_NaN());
    a.out = TensorView::contiguous(nullptr, s.dtype, {n, s.h_q, 512});
    a.max_logits = a.lse = TensorView::contiguous(nullptr, DType::kFloat32, {n, s.h_q});
    const Guarded* out = upload(a.out, out_fill.size(), out_fill.data());
    const Guarded* max_logits = upload(a.max_logits, fill.size() * 4, fill.data());
    const Guarded* lse = upload(a.lse, fill.size() * 4, fill.data());
    const SparsePrefillOptions options{.num_threads = num_threads};
    const std::size_t bytes = sparse_prefill_workspace_size(a, options);
    Guarded workspace(backend, bytes);
    const std::vector<std::uint8_t> poison(bytes, 0xFF);
    workspace.upload(poison.data());
    sparse_prefill(a, workspace.data(), bytes, options);
    workspace.download();
    SparseResult r;
    r.bits = out->download();
    for (std::size_t i = 0; i < r.bits.size(); i += 2) {
      std::uint16_t bits = 0;
      std::memcpy(&bits, &r.bits[i], 2);
      r.out.push_back(s.dtype == DType::kBFloat16 ? to_float(Bf16{bits}) : to_float(Fp16{bits}));
    }
    const auto floats = [&](const Guarded* from, std::vector<float>& to) {
      const std::vector<std::uint8_t> raw = from->download();
      to.resize(raw.size() / 4);
      std::memcpy(to.data(), raw.data(), raw.size());
      r.bits.insert(r.bits.end(), raw.begin(), raw.end());
    };
    floats(max_logits, r.max_logits);
    floats(lse, r.lse);
    return r;
  }

  std::string difference(const SparseResult& got) {
    SparsePrefillArgs a = host_args();
    std::vector<float> out(got.out.size()), max_logits(got.lse.size()), lse(got.lse.size());
    a.out = TensorView::contiguous(out.data(), DType::kFloat32, {n, s.h_q, 512});
    a.max_logits = TensorView::contiguous(max_logits.data(), DType::kFloat32, {n, s.h_q});
    a.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {n, s.h_q});
    reference::sparse_prefill(a);
    std::string text = compare("out", got.out, out, 8e-4, 3.01 / 128, 7e-6);
    if (text.empty()) text = compare("max_logits", got.max_logits, max_logits, 1e-6, 2.01 / 65536, 0);
    return text.empty() ? compare("lse", got.lse, lse, 1e-6, 2.01 / 65536, 0) : text;
  }

  PrefillShape s;
  int n = 0;
  std::vector<std::uint16_t> q;
  TestPool pool;
  std::vector<float> sink;
  std::vector<std::int32_t> indices, lengths, starts_q, starts_k, table, seqlens;
  std::int64_t max_blocks = 0;

 private:
  // The tokens of each request: all slots, a run of slots, or some of the pages in any order.
  void name_tokens(int slots) {
    const auto b = static_cast<int>(s.queries.size());
    std::mt19937 rng(s.seed + 1);
    for (int r = 0; r <= b; ++r) starts_k.push_back(3 + (slots - 5) * r / b);
    std::vector<std::int32_t> pages(static_cast<std::size_t>(pool.num_pages));
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), rng);
    max_blocks = pool.num_pages / b + 1;
    table.assign(static_cast<std::size_t>(b * max_blocks), 2147480000);
    std::size_t next = 0;
    for (int r = 0; r < b; ++r) {
      const std::int64_t blocks = pool.num_pages / b;
      for (std::int64_t j = 0; j < blocks; ++j)
        table[static_cast<std::size_t>(r * max_blocks + j)] = pages[next++];
      seqlens.push_back(static_cast<std::int32_t>(std::max<std::int64_t>(blocks * s.pool.page_size - r, 0)));
    }
  }

  std::int32_t limit(std::size_t r, int slots) const {
    return s.naming == Naming::kSlots  ? slots
           : s.naming == Naming::kFlat ? starts_k[r + 1] - starts_k[r]
                                       : seqlens[r];
  }

  std::int64_t slot_of(std::size_t r, int position) const {
    if (s.naming == Naming::kSlots) return position;
    if (s.naming == Naming::kFlat) return starts_k[r] + position;
    const auto block =
        static_cast<std::size_t>(static_cast<std::int64_t>(r) * max_blocks + position / s.pool.page_size);
    return std::int64_t{table[block]} * s.pool.page_size + position % s.pool.page_size;
  }
};

}  // namespace flash_mla::conformance
