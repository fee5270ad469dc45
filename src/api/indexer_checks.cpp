#include "api/indexer_checks.h"

#include <cmath>
#include <limits>

#include "kernels/attention/indexer/rows.h"

namespace flash_mla::api {
namespace {

constexpr std::int64_t kMaxHeads = 128;
constexpr std::int64_t kMaxKeys = std::numeric_limits<std::int32_t>::max();

std::int64_t int_at(const TensorView& t, std::int64_t i) { return t.ptr<const std::int32_t>()[i]; }

/// (..., H, D) with its last two dimensions contiguous.
void check_heads(const TensorView& t, const char* name) {
  const int heads = t.rank - 2, dim = t.rank - 1;
  if (t.size(heads) < 1 || t.size(heads) > kMaxHeads) {
    invalid("{}.shape[{}] (H) is {}, expected 1 to {}", name, heads, t.size(heads), kMaxHeads);
  }
  if (t.size(dim) != 64 && t.size(dim) != 128) {
    invalid("{}.shape[{}] (D) is {}, expected 64 or 128", name, dim, t.size(dim));
  }
  check_last_dim_contiguous(t, name);
  if (t.numel() > 0 && t.size(heads) > 1 && t.stride(heads) != t.size(dim)) {
    invalid("{}.stride[{}] is {}, expected {}: heads are contiguous", name, heads, t.stride(heads),
            t.size(dim));
  }
}

void check_weights(const TensorView& weights, const char* name, std::int64_t rows, std::int64_t heads,
                   const TensorView& q) {
  check_tensor(weights, name, 2, {DType::kFloat32});
  check_size(weights, name, 0, rows, "query tokens");
  check_size(weights, name, 1, heads, "H");
  check_last_dim_contiguous(weights, name);
  check_same_device(weights, name, q, "q");
}

void check_int32_vector(const TensorView& t, const char* name, std::int64_t n, const char* n_name,
                        const TensorView& q) {
  check_tensor(t, name, 1, {DType::kInt32});
  check_size(t, name, 0, n, n_name);
  check_last_dim_contiguous(t, name);
  check_same_device(t, name, q, "q");
}

void check_logits(const TensorView& logits, std::int64_t rows, const TensorView& q,
                  bool allow_reference_types) {
  if (allow_reference_types) {
    check_tensor(logits, "logits", 2, {DType::kFloat32, DType::kFloat64});
  } else {
    check_tensor(logits, "logits", 2, {DType::kFloat32});
  }
  check_size(logits, "logits", 0, rows, "query tokens");
  check_last_dim_contiguous(logits, "logits");
  check_no_overlap(logits, "logits");
  check_same_device(logits, "logits", q, "q");
}

void check_index_cache(const TensorView& t, std::int64_t dim) {
  check_tensor(t, "cache", 4, {DType::kUInt8});
  if (t.size(1) < 1) invalid("cache.shape[1] (page_size) is {}, expected >= 1", t.size(1));
  if (t.size(2) != 1) invalid("cache.shape[2] is {}, expected 1", t.size(2));
  if (t.size(3) != dim + indexer::kScaleBytes) {
    invalid("cache.shape[3] is {}, expected D + 4 = {}", t.size(3), dim + indexer::kScaleBytes);
  }
  check_last_dim_contiguous(t, "cache");
  if (t.size(1) > 1 && t.stride(1) != t.size(3)) {
    invalid("cache.stride[1] is {}, expected {}: pages are contiguous", t.stride(1), t.size(3));
  }
  // Scales are read as numbers of 4 bytes.
  if (t.size(0) > 1 && t.stride(0) % indexer::kScaleBytes != 0) {
    invalid("cache.stride[0] is {}, expected a multiple of 4 bytes", t.stride(0));
  }
  if (reinterpret_cast<std::uintptr_t>(t.data) % indexer::kScaleBytes != 0) {
    invalid("cache is at {}, expected an address aligned to 4 bytes", t.data);
  }
}

void check_threads(const IndexerOptions& options) {
  if (options.num_threads < 0) invalid("num_threads is {}, expected >= 0", options.num_threads);
}

}  // namespace

void check_mqa_logits_shapes(const MqaLogitsArgs& a, const IndexerOptions& options, bool with_logits,
                             bool allow_reference_types) {
  check_tensor(a.q, "q", 3, {DType::kUInt8});
  check_heads(a.q, "q");
  const std::int64_t m = a.q.size(0);
  check_weights(a.weights, "weights", m, a.q.size(1), a.q);
  check_tensor(a.k, "k", 2, {DType::kUInt8});
  check_size(a.k, "k", 1, a.q.size(2), "q.shape[2] (D)");
  check_last_dim_contiguous(a.k, "k");
  check_same_device(a.k, "k", a.q, "q");
  if (a.k.size(0) > kMaxKeys) invalid("k.shape[0] (n) is {}, expected at most {}", a.k.size(0), kMaxKeys);
  check_tensor(a.k_scales, "k_scales", 1, {DType::kFloat32});
  check_size(a.k_scales, "k_scales", 0, a.k.size(0), "k.shape[0] (n)");
  check_last_dim_contiguous(a.k_scales, "k_scales");
  check_same_device(a.k_scales, "k_scales", a.q, "q");
  check_int32_vector(a.key_begin, "key_begin", m, "q.shape[0] (m)", a.q);
  check_int32_vector(a.key_end, "key_end", m, "q.shape[0] (m)", a.q);
  check_threads(options);
  if (!with_logits) return;
  check_logits(a.logits, m, a.q, allow_reference_types);
  if (!a.compressed && a.logits.size(1) < a.k.size(0)) {
    invalid("logits.shape[1] (width) is {}, expected at least k.shape[0] (n) = {}, or compressed",
            a.logits.size(1), a.k.size(0));
  }
}

void check_mqa_logits_values(const MqaLogitsArgs& a) {
  const std::int64_t n = a.k.size(0);
  for (std::int64_t i = 0; i < a.q.size(0); ++i) {
    const std::int64_t begin = int_at(a.key_begin, i), end = int_at(a.key_end, i);
    if (begin < 0 || begin > n)
      invalid("key_begin[{}] is {}, expected 0 to k.shape[0] (n) = {}", i, begin, n);
    if (end > n) invalid("key_end[{}] is {}, expected at most k.shape[0] (n) = {}", i, end, n);
    if (a.compressed && a.logits.defined() && end - begin > a.logits.size(1)) {
      invalid("logits.shape[1] (width) is {}, expected at least key_end[{}] - key_begin[{}] = {}",
              a.logits.size(1), i, i, end - begin);
    }
  }
}

void check_paged_mqa_logits_shapes(const PagedMqaLogitsArgs& a, const IndexerOptions& options,
                                   bool with_logits, bool allow_reference_types) {
  check_tensor(a.q, "q", 4, {DType::kUInt8});
  check_heads(a.q, "q");
  const std::int64_t b = a.q.size(0), next_n = a.q.size(1);
  if (next_n < 1) invalid("q.shape[1] (next_n) is {}, expected >= 1", next_n);
  check_weights(a.weights, "weights", b * next_n, a.q.size(2), a.q);
  check_index_cache(a.cache, a.q.size(3));
  check_same_device(a.cache, "cache", a.q, "q");
  if (a.context_lens.rank == 2) {
    check_tensor(a.context_lens, "context_lens", 2, {DType::kInt32});
    check_size(a.context_lens, "context_lens", 0, b, "q.shape[0] (b)");
    check_size(a.context_lens, "context_lens", 1, next_n, "q.shape[1] (next_n)");
    check_last_dim_contiguous(a.context_lens, "context_lens");
    if (b > 1 && a.context_lens.stride(0) != next_n) {
      invalid("context_lens.stride[0] is {}, expected {}: it is contiguous", a.context_lens.stride(0),
              next_n);
    }
    check_same_device(a.context_lens, "context_lens", a.q, "q");
  } else {
    check_int32_vector(a.context_lens, "context_lens", b, "q.shape[0] (b)", a.q);
  }
  check_tensor(a.block_table, "block_table", 2, {DType::kInt32});
  check_size(a.block_table, "block_table", 0, b, "q.shape[0] (b)");
  check_last_dim_contiguous(a.block_table, "block_table");
  check_same_device(a.block_table, "block_table", a.q, "q");
  check_threads(options);
  if (with_logits) check_logits(a.logits, b * next_n, a.q, allow_reference_types);
}

void check_paged_mqa_logits_values(const PagedMqaLogitsArgs& a) {
  const std::int64_t page_size = a.cache.size(1), pages = a.cache.size(0), blocks = a.block_table.size(1);
  const std::int64_t per_request = a.context_lens.rank == 2 ? a.q.size(1) : 1;
  for (std::int64_t i = 0; i < a.context_lens.numel(); ++i) {
    const std::int64_t length = int_at(a.context_lens, i), request = i / per_request;
    if (length < 0 || (length + page_size - 1) / page_size > blocks) {
      invalid("context_lens: entry {} is {}, expected 0 to block_table.shape[1] * page_size = {} * {}", i,
              length, blocks, page_size);
    }
    if (a.logits.defined() && length > a.logits.size(1)) {
      invalid("logits.shape[1] (width) is {}, expected at least context_lens' entry {}, which is {}",
              a.logits.size(1), i, length);
    }
    for (std::int64_t block = 0; block < (length + page_size - 1) / page_size; ++block) {
      const std::int64_t page = int_at(a.block_table, request * a.block_table.stride(0) + block);
      if (page < 0 || page >= pages) {
        invalid("block_table[{}][{}] is {}, expected 0 to {} (the request has {} keys)", request, block, page,
                pages - 1, length);
      }
    }
  }
}

void check_index_append_shapes(const IndexKeyAppendArgs& a, const IndexerOptions& options) {
  check_tensor(a.k, "k", 2, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  if (a.k.size(1) != 64 && a.k.size(1) != 128)
    invalid("k.shape[1] (D) is {}, expected 64 or 128", a.k.size(1));
  check_last_dim_contiguous(a.k, "k");
  check_tensor(a.slot_mapping, "slot_mapping", 1, {DType::kInt64, DType::kInt32});
  check_size(a.slot_mapping, "slot_mapping", 0, a.k.size(0), "k.shape[0] (n)");
  check_last_dim_contiguous(a.slot_mapping, "slot_mapping");
  check_same_device(a.slot_mapping, "slot_mapping", a.k, "k");
  check_index_cache(a.cache, a.k.size(1));
  check_no_overlap(a.cache, "cache");
  check_same_device(a.cache, "cache", a.k, "k");
  if (a.recipe != Fp8Recipe::kIndexerPow2 && a.recipe != Fp8Recipe::kIndexer) {
    invalid("recipe is {}, expected indexer_pow2 or indexer", fp8_recipe_name(a.recipe));
  }
  check_threads(options);
}

void check_index_append_values(const IndexKeyAppendArgs& a) {
  const std::int64_t limit = a.cache.size(0) * a.cache.size(1);
  for (std::int64_t i = 0; i < a.slot_mapping.size(0); ++i) {
    const std::int64_t slot = a.slot_mapping.dtype == DType::kInt64
                                  ? a.slot_mapping.ptr<const std::int64_t>()[i]
                                  : a.slot_mapping.ptr<const std::int32_t>()[i];
    if (slot < -1 || slot >= limit) {
      invalid("slot_mapping[{}] is {}, expected -1 or 0 to {} (the pool has {} pages of {} tokens)", i, slot,
              limit - 1, a.cache.size(0), a.cache.size(1));
    }
  }
}

void check_index_query_shapes(const IndexQueryArgs& a, const IndexerOptions& options) {
  check_tensor(a.q, "q", 3, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  check_heads(a.q, "q");
  check_weights(a.weights, "weights", a.q.size(0), a.q.size(1), a.q);
  check_tensor(a.values, "values", 3, {DType::kUInt8});
  for (int d = 0; d < 3; ++d) check_size(a.values, "values", d, a.q.size(d), "q's");
  check_heads(a.values, "values");
  check_no_overlap(a.values, "values");
  check_same_device(a.values, "values", a.q, "q");
  check_weights(a.scaled_weights, "scaled_weights", a.q.size(0), a.q.size(1), a.q);
  check_no_overlap(a.scaled_weights, "scaled_weights");
  if (!std::isfinite(a.factor)) invalid("factor is {}, expected a finite number", a.factor);
  if (a.recipe != Fp8Recipe::kIndexerPow2 && a.recipe != Fp8Recipe::kIndexer &&
      a.recipe != Fp8Recipe::kVllmIndexer) {
    invalid("recipe is {}, expected indexer_pow2, indexer or vllm_indexer", fp8_recipe_name(a.recipe));
  }
  check_threads(options);
}

}  // namespace flash_mla::api
