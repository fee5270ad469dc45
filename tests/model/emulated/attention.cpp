// Attention, the indexer and the cache's operations: the library's on the CPU, over tensors that say they are a GPU's.

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/aligned.h"
#include "base/element.h"
#include "base/page_size.h"
#include "base/parallel.h"
#include "flash_mla/indexer.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/merge.h"
#include "flash_mla/sparse.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/attention/dense_decode/sm90/kernel_facts.h"
#include "kernels/attention/dense_fp8_decode/sm90/dense_fp8_decode.h"
#include "kernels/attention/dense_prefill/sm90/dense_prefill.h"
#include "kernels/attention/indexer/cpu/indexer.h"
#include "kernels/attention/indexer/sm90/indexer.h"
#include "kernels/attention/merge/sm90/merge.h"
#include "kernels/attention/plain/sm90/plain_attention.h"
#include "kernels/attention/sparse_decode/sm90/sparse_decode.h"
#include "kernels/attention/sparse_prefill/sm90/sparse_prefill.h"
#include "kernels/attention/top_k/cpu/top_k.h"
#include "kernels/attention/top_k/sm90/top_k.h"
#include "kernels/cache/sm90/append.h"
#include "kernels/cache/sm90/gather.h"
#include "kernels/quant/sm90/quantise.h"
#include "queue.h"

namespace flash_mla::sm90 {

using emulated::queue;

namespace {

TensorView on_host(TensorView t) {
  t.device = {DeviceType::kCpu, 0};
  return t;
}
KvCacheView on_host(KvCacheView c) {
  c.data = on_host(c.data);
  return c;
}

/// softmax(scale * q · k) · v over `n` keys; key(j), value(j): pointers to bfloat16.
template <class Key, class Value>
void attend(const std::vector<float>& q, std::int64_t n, float scale, std::int64_t v, const Key& key,
            const Value& value, Bf16* out) {
  std::vector<float> scores(static_cast<std::size_t>(n)), sums(static_cast<std::size_t>(v));
  float most = -INFINITY, total = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    float& score = scores[static_cast<std::size_t>(j)] = scale * key(q, j);
    most = std::max(most, score);
  }
  for (std::int64_t j = 0; j < n; ++j) {
    const float p = std::exp(scores[static_cast<std::size_t>(j)] - most);
    total += p;
    const Bf16* row = value(j);
    for (std::int64_t i = 0; i < v; ++i) sums[static_cast<std::size_t>(i)] += p * to_float(row[i]);
  }
  for (std::int64_t i = 0; i < v; ++i)
    out[i] = to_bf16(n > 0 ? sums[static_cast<std::size_t>(i)] / total : 0);
}

std::vector<float> wide(const Bf16* x, std::int64_t n) {
  std::vector<float> out(static_cast<std::size_t>(n));
  std::transform(x, x + n, out.begin(), [](Bf16 v) { return to_float(v); });
  return out;
}
float dot(const float* x, const Bf16* w, std::int64_t n) {
  float sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += x[i] * to_float(w[i]);
  return sum;
}

}  // namespace

std::vector<Gpu> gpus() { return {{"emulated", 9, 0, 132, std::size_t{4} << 30}}; }
std::string why_no_gpus() { return ""; }
std::string reject_reason(const Gpu&) { return ""; }
void require_device(int) {}
ScheduleOptions schedule_options(int, int, int, int, int) {
  ScheduleOptions out;
  out.num_parts = 132;
  return out;
}
void build_schedule(const TensorView&, const ScheduleOptions&, const DecodeScheduleView&, void*) {
  queue([] {});
}
KernelFacts decode_kernel_facts(const DecodePlan&, bool) { return {}; }
KernelFacts combine_kernel_facts(const DecodePlan&, bool) { return {}; }

std::size_t dense_decode_workspace_size(const DenseDecodeArgs&, const DecodeScheduleView&) { return 256; }
void check_supported(const DenseDecodeArgs&, const DecodeScheduleView&) {}

// The engine never calls it; the library does.
std::size_t dense_fp8_decode_workspace_size(const DenseFp8DecodeArgs&, const DecodeScheduleView&) {
  return 256;
}
void check_supported(const DenseFp8DecodeArgs&, const DecodeScheduleView&) {}
void dense_fp8_decode(const DenseFp8DecodeArgs&, const DecodeScheduleView&, void*, float, bool, void*) {}

void plain_decode(const PlainDecode& a, cudaStream_t) {
  queue([=] {
    const std::int64_t width = a.rank + a.rope;
    parallel_for(a.q.rows, default_threads(), [&](std::int64_t t) {
      const auto row = [&](std::int64_t j) {
        const std::int64_t page = a.table[t * a.max_blocks + j / kPageSize];
        return reinterpret_cast<const Bf16*>(a.cache) + (page * kPageSize + j % kPageSize) * width;
      };
      for (std::int64_t head = 0; head < a.heads; ++head) {
        const auto q = wide(reinterpret_cast<const Bf16*>(a.q.row(t)) + head * width, width);
        attend(
            q, a.lens[t], a.scale, a.rank,
            [&](const auto& x, std::int64_t j) { return dot(x.data(), row(j), width); }, row,
            reinterpret_cast<Bf16*>(a.out.row(t)) + head * a.rank);
      }
    });
  });
}

void dense_decode(const DenseDecodeArgs& a, const DecodeScheduleView&, void*, float scale, bool causal,
                  void*) {
  queue([=] {
    const std::int64_t queries = a.q.size(1), width = a.q.size(3), rank = a.out.size(3);
    parallel_for(a.q.size(0) * queries, default_threads(), [&](std::int64_t t) {
      const std::int64_t request = t / queries, i = t % queries;
      const auto* table = a.block_table.ptr<const std::int32_t>() + request * a.block_table.stride(0);
      const auto row = [&](std::int64_t j) {
        return a.k_cache.ptr<const Bf16>() + (table[j / kPageSize] * kPageSize + j % kPageSize) * width;
      };
      const std::int64_t length = a.cache_seqlens.ptr<const std::int32_t>()[request];
      for (std::int64_t head = 0; head < a.q.size(2); ++head) {
        const auto q =
            wide(a.q.ptr<const Bf16>() + request * a.q.stride(0) + i * a.q.stride(1) + head * a.q.stride(2),
                 width);
        attend(
            q, std::max<std::int64_t>(causal ? length - queries + i + 1 : length, 0), scale, rank,
            [&](const auto& x, std::int64_t j) { return dot(x.data(), row(j), width); }, row,
            a.out.ptr<Bf16>() + request * a.out.stride(0) + i * a.out.stride(1) + head * a.out.stride(2));
      }
    });
  });
}

void plain_prefill(const PlainPrefill& a, cudaStream_t) {
  queue([=] {
    const std::int64_t head_width = a.nope + a.v, key_width = a.heads * head_width, q_width = a.nope + a.rope;
    for (int s = 0; s < a.num_seqs; ++s) {
      const std::int64_t first = a.query_starts[s], queries = a.query_starts[s + 1] - first;
      const std::int64_t key0 = a.key_starts[s], keys = a.key_starts[s + 1] - key0;
      parallel_for(queries, default_threads(), [&](std::int64_t i) {
        for (std::int64_t head = 0; head < a.heads; ++head) {
          const auto expanded = [&](std::int64_t j) {
            return reinterpret_cast<const Bf16*>(a.expanded) + (key0 + j) * key_width + head * head_width;
          };
          const auto score = [&](const auto& q, std::int64_t j) {
            return dot(q.data(), expanded(j), a.nope) +
                   dot(q.data() + a.nope, reinterpret_cast<const Bf16*>(a.k_rope) + (key0 + j) * a.rope,
                       a.rope);
          };
          attend(
              wide(reinterpret_cast<const Bf16*>(a.q.row(first + i)) + head * q_width, q_width),
              keys - queries + i + 1, a.scale, a.v, score,
              [&](std::int64_t j) { return expanded(j) + a.nope; },
              reinterpret_cast<Bf16*>(a.out.row(first + i)) + head * a.v);
        }
      });
    }
  });
}

std::size_t dense_prefill_workspace_size() { return 256; }
void check_supported(const DensePrefillArgs&) {}
void dense_prefill(const DensePrefillArgs& a, float scale, bool, void*, void*) {
  PlainPrefill args;
  args.heads = static_cast<int>(a.q.size(1));
  args.nope = static_cast<int>(a.k_nope.size(2));
  args.rope = static_cast<int>(a.k_rope.size(1));
  args.v = static_cast<int>(a.v.size(2));
  args.q = {a.q.ptr<std::byte>(), DType::kBFloat16, a.q.size(0), a.q.size(1) * a.q.size(2), a.q.stride(0)};
  args.out = {a.out.ptr<std::byte>(), DType::kBFloat16, a.out.size(0), a.out.stride(0), a.out.stride(0)};
  args.expanded = a.k_nope.ptr<const std::byte>();
  args.k_rope = a.k_rope.ptr<const std::byte>();
  args.query_starts = a.cu_seqlens_q.ptr<const std::int32_t>();
  args.key_starts = a.cu_seqlens_k.ptr<const std::int32_t>();
  args.num_seqs = static_cast<int>(a.cu_seqlens_q.size(0)) - 1;
  args.scale = scale;
  plain_prefill(args, nullptr);
}

void check_supported(const SparseDecodeArgs&, int) {}
std::size_t sparse_decode_workspace_size(const SparseDecodeArgs&, int) { return 256; }
void sparse_decode(const SparseDecodeArgs& given, void*, float scale, int, void*) {
  SparseDecodeArgs a = given;
  for (TensorView* t : {&a.q, &a.out, &a.keys.indices, &a.keys.topk_length}) *t = on_host(*t);
  a.keys.cache = on_host(a.keys.cache);
  queue([=] {
    SparseDecodeOptions options;
    options.softmax_scale = scale;
    const std::size_t bytes = flash_mla::sparse_decode_workspace_size(a, options);
    const Buffer workspace = allocate_aligned(bytes);
    flash_mla::sparse_decode(a, workspace.data(), bytes, options);
  });
}

void check_supported(const SparsePrefillArgs&) {}
void sparse_prefill(const SparsePrefillArgs& given, float scale, void*) {
  SparsePrefillArgs a = given;
  for (TensorView* t : {&a.q, &a.out, &a.indices, &a.topk_length}) *t = on_host(*t);
  a.cache = on_host(a.cache);
  queue([=] {
    SparsePrefillOptions options;
    options.softmax_scale = scale;
    const std::size_t bytes = flash_mla::sparse_prefill_workspace_size(a, options);
    const Buffer workspace = allocate_aligned(bytes);
    flash_mla::sparse_prefill(a, workspace.data(), bytes, options);
  });
}

void index_logits(const indexer::Rows& rows, std::int64_t first, std::int64_t last,
                  const indexer::Logits& logits, void*) {
  queue([=] {
    const Buffer workspace =
        allocate_aligned(cpu::index_logits_workspace_size(rows, cpu::IndexElement::kE4m3, default_threads()));
    cpu::index_logits(rows, cpu::IndexElement::kE4m3, first, last, logits, workspace.data(),
                      default_threads());
  });
}

void index_lengths(const indexer::Rows& rows, std::int64_t first, std::int64_t last, std::int32_t* lengths,
                   void*) {
  queue([=] {
    for (std::int64_t row = first; row < last; ++row) {
      lengths[row - first] =
          static_cast<std::int32_t>(std::max<std::int64_t>(rows.end(row) - rows.begin(row), 0));
    }
  });
}

void top_k(const TopKArgs& a, std::int64_t first_row, std::int64_t rows_per_request, void*) {
  queue([=] {
    const std::int64_t k = a.indices.size(1);
    for (std::int64_t i = 0; i < a.logits.size(0); ++i) {
      auto* out = a.indices.ptr<std::int32_t>() + i * a.indices.stride(0);
      cpu::top_k_row(a.logits.ptr<const float>() + i * a.logits.stride(0),
                     a.lengths.ptr<const std::int32_t>()[i], k, out);
      const auto* pages = a.output.block_table.ptr<const std::int32_t>() +
                          (first_row + i) / rows_per_request * a.output.block_table.stride(0);
      for (std::int64_t j = 0; j < k; ++j) {
        const std::int64_t position = out[j], size = a.output.page_size;
        if (position >= 0)
          out[j] = static_cast<std::int32_t>(pages[position / size] * size + position % size);
      }
    }
  });
}

void append_index_keys(const IndexKeyAppendArgs& given, void*) {
  IndexKeyAppendArgs a = given;
  for (TensorView* t : {&a.k, &a.slot_mapping, &a.cache}) *t = on_host(*t);
  queue([=] { flash_mla::append_index_keys(a); });
}
void quantise_index_queries(const IndexQueryArgs& given, void*) {
  IndexQueryArgs a = given;
  for (TensorView* t : {&a.q, &a.weights, &a.values, &a.scaled_weights}) *t = on_host(*t);
  queue([=] { flash_mla::quantise_index_queries(a); });
}

void append_kv(const KvAppendArgs& given, void*) {
  KvAppendArgs a = given;
  for (TensorView* t : {&a.latent, &a.rope, &a.slot_mapping}) *t = on_host(*t);
  a.cache = on_host(a.cache);
  queue([=] { flash_mla::append_kv(a); });
}
void gather_kv(const KvGatherArgs&, void*) {}
void quantise_fp8(const TensorView&, int, Fp8Recipe, const TensorView&, const TensorView&, void*) {}
void merge_states(const TensorView&, const TensorView&, const TensorView&, const TensorView&,
                  const TensorView&, const TensorView&, LseBase, void*) {}

}  // namespace flash_mla::sm90
