#include "api/sparse_checks.h"

#include <cmath>

#include "kernels/attention/sparse_prefill/selection.h"
#include "kv/format.h"

namespace flash_mla::api {
namespace {

constexpr std::int64_t kLatentWidth = 512;  // d_v
// Bound products of shapes.
constexpr std::int64_t kMaxQueryHeads = 1 << 20;
constexpr std::int64_t kMaxQueryTokens = 1 << 20;

void check_q_and_out(const TensorView& q, const TensorView& out, int rank, bool allow_reference_types,
                     std::initializer_list<DType> q_types = {DType::kBFloat16, DType::kFloat16}) {
  check_tensor(q, "q", rank, q_types);
  if (allow_reference_types) {
    check_tensor(out, "out", rank, {q.dtype, DType::kFloat32, DType::kFloat64});
  } else {
    check_tensor(out, "out", rank, {q.dtype});
  }
  const int heads = rank - 2, width = rank - 1;
  if (q.size(heads) < 1 || q.size(heads) > kMaxQueryHeads) {
    invalid("q.shape[{}] (h_q) is {}, expected 1 to {}", heads, q.size(heads), kMaxQueryHeads);
  }
  if (q.size(width) != 576 && q.size(width) != 512) {
    invalid("q.shape[{}] (d_qk) is {}, expected 576 or 512", width, q.size(width));
  }
  for (int d = 0; d < width; ++d) {
    if (out.size(d) != q.size(d)) {
      invalid("out.shape[{}] is {}, expected q.shape[{}] = {}", d, out.size(d), d, q.size(d));
    }
  }
  check_size(out, "out", width, kLatentWidth, "d_v");
  check_last_dim_contiguous(q, "q");
  check_last_dim_contiguous(out, "out");
  check_no_overlap(out, "out");
  check_same_device(out, "out", q, "q");
}

/// A cache that q is multiplied with.
void check_cache_for(const KvCacheView& cache, const char* name, const TensorView& q) {
  check_cache(cache, name);
  const std::int64_t d_qk = q.size(q.rank - 1);
  if (const int own = kv::format_d_qk(cache.format); own != 0 && own != d_qk) {
    invalid("{}.format is {}, whose keys have {} elements, expected q.shape[{}] (d_qk) = {}", name,
            kv_format_name(cache.format), own, q.rank - 1, d_qk);
  }
  if (!kv::is_fp8(cache.format)) {
    check_size(cache.data, name, 3, d_qk, "d_qk of q");
    if (cache.data.dtype != q.dtype && q.dtype != DType::kFloat32) {
      invalid("{} is {}, expected q's dtype, {}", name, cache.data.describe(), dtype_name(q.dtype));
    }
  }
  check_same_device(cache.data, name, q, "q");
}

/// An optional one-dimensional tensor, contiguous.
void check_vector(const TensorView& t, const char* name, DType dtype, std::int64_t size,
                  const char* size_name, const TensorView& q) {
  if (!t.defined()) return;
  check_tensor(t, name, 1, {dtype});
  check_size(t, name, 0, size, size_name);
  check_last_dim_contiguous(t, name);
  check_same_device(t, name, q, "q");
}

/// An optional output of float32 (or float64 where that is allowed).
void check_statistics(const TensorView& t, const char* name, std::initializer_list<std::int64_t> shape,
                      const char* shape_names, const TensorView& q, bool allow_reference_types) {
  if (!t.defined()) return;
  if (allow_reference_types) {
    check_tensor(t, name, static_cast<int>(shape.size()), {DType::kFloat32, DType::kFloat64});
  } else {
    check_tensor(t, name, static_cast<int>(shape.size()), {DType::kFloat32});
  }
  int d = 0;
  for (const std::int64_t size : shape) {
    if (t.size(d) != size) {
      invalid("{}.shape[{}] is {}, expected {}: {}", name, d, t.size(d), size, shape_names);
    }
    ++d;
  }
  check_no_overlap(t, name);
  check_same_device(t, name, q, "q");
}

void check_scale_and_threads(const std::optional<float>& scale, int num_threads) {
  if (scale && !(*scale > 0.0f && *scale < 1e30f)) {
    invalid("softmax_scale is {}, expected a positive finite number", *scale);
  }
  if (num_threads < 0) invalid("num_threads is {}, expected >= 0", num_threads);
}

struct KeysNames {
  const char *cache, *indices, *topk_length;
};
constexpr KeysNames kKeys{"keys.cache", "keys.indices", "keys.topk_length"};
constexpr KeysNames kExtra{"extra.cache", "extra.indices", "extra.topk_length"};

void check_keys(const SparseKeys& keys, const KeysNames& names, const TensorView& q) {
  check_cache_for(keys.cache, names.cache, q);
  check_tensor(keys.indices, names.indices, 3, {DType::kInt32});
  check_size(keys.indices, names.indices, 0, q.size(0), "q.shape[0] (b)");
  check_size(keys.indices, names.indices, 1, q.size(1), "q.shape[1] (s_q)");
  check_last_dim_contiguous(keys.indices, names.indices);
  check_same_device(keys.indices, names.indices, q, "q");
  check_vector(keys.topk_length, names.topk_length, DType::kInt32, q.size(0), "q.shape[0] (b)", q);
}

void check_keys_values(const SparseKeys& keys, const KeysNames& names) {
  const TensorView& t = keys.indices;
  const std::int64_t topk = t.size(2), slots = keys.cache.data.size(0) * keys.cache.data.size(1);
  for (std::int64_t r = 0; r < t.size(0); ++r) {
    std::int64_t length = topk;
    if (keys.topk_length.defined()) {
      length = keys.topk_length.ptr<const std::int32_t>()[r];
      if (length < 0 || length > topk) {
        invalid("{}[{}] is {}, expected 0 to {}.shape[2] (topk) = {}", names.topk_length, r, length,
                names.indices, topk);
      }
    }
    for (std::int64_t i = 0; i < t.size(1) && length > 0; ++i) {
      const auto* entries = t.ptr<const std::int32_t>() + r * t.stride(0) + i * t.stride(1);
      for (std::int64_t j = 0; j < length; ++j) {
        if (entries[j] < -1 || entries[j] >= slots) {
          invalid("{}[{}][{}][{}] is {}, expected -1 or 0 to {} (the pool has {} pages of {} tokens)",
                  names.indices, r, i, j, entries[j], slots - 1, keys.cache.data.size(0),
                  keys.cache.data.size(1));
        }
      }
    }
  }
}

/// That int32 values rise from `first`, and end at `last` or (last < 0) anywhere.
void check_offsets(const TensorView& t, const char* name, std::int64_t first, std::int64_t last,
                   const char* last_name) {
  const auto* at = t.ptr<const std::int32_t>();
  const std::int64_t n = t.size(0);
  if (first >= 0 ? at[0] != first : at[0] < 0) {
    invalid("{}[0] is {}, expected {}0", name, at[0], first >= 0 ? "" : ">= ");
  }
  for (std::int64_t i = 1; i < n; ++i) {
    if (at[i] < at[i - 1]) {
      invalid("{}[{}] is {}, expected at least the {} before it", name, i, at[i], at[i - 1]);
    }
  }
  if (first >= 0 ? at[n - 1] != last : at[n - 1] > last) {
    invalid("{}[{}] is {}, expected {}{} = {}", name, n - 1, at[n - 1], first >= 0 ? "" : "at most ",
            last_name, last);
  }
}

/// Element i of a contiguous int64 or int32 tensor.
std::int64_t integer(const TensorView& t, std::int64_t i) {
  return t.dtype == DType::kInt64 ? t.ptr<const std::int64_t>()[i] : t.ptr<const std::int32_t>()[i];
}

void check_slots(const TensorView& slots, const char* name, const KvCacheView& cache) {
  const std::int64_t limit = cache.data.size(0) * cache.data.size(1);
  for (std::int64_t i = 0; i < slots.size(0); ++i) {
    const std::int64_t slot = integer(slots, i);
    if (slot < -1 || slot >= limit) {
      invalid("{}[{}] is {}, expected -1 or 0 to {} (the pool has {} pages of {} tokens)", name, i, slot,
              limit - 1, cache.data.size(0), cache.data.size(1));
    }
  }
}

}  // namespace

void check_cache(const KvCacheView& cache, const char* name) {
  const TensorView& t = cache.data;
  switch (cache.format) {
    case KvFormat::kBFloat16:
      check_tensor(t, name, 4, {DType::kBFloat16});
      break;
    case KvFormat::kFloat16:
      check_tensor(t, name, 4, {DType::kFloat16});
      break;
    case KvFormat::kFp8V32:
    case KvFormat::kFp8V4:
    case KvFormat::kFp8Tensor:
      check_tensor(t, name, 4, {DType::kUInt8});
      check_size(t, name, 3, kv::token_bytes(cache.format, 0), "bytes of a token");
      break;
    default:
      invalid("{}.format is {}, expected one of KvFormat", name, static_cast<int>(cache.format));
  }
  if (t.size(1) < 1) invalid("{}.shape[1] (page_size) is {}, expected >= 1", name, t.size(1));
  if (t.size(2) != 1) invalid("{}.shape[2] (h_kv) is {}, expected 1", name, t.size(2));
  if (!kv::is_fp8(cache.format) && t.size(3) != 576 && t.size(3) != 512) {
    invalid("{}.shape[3] (d_qk) is {}, expected 576 or 512", name, t.size(3));
  }
  check_last_dim_contiguous(t, name);
  if (cache.format == KvFormat::kFp8V4 && t.size(1) > 1 && t.stride(1) != kv::Fp8V4::kTokenBytes) {
    invalid("{}.stride[1] is {}, expected {}: pages of this format are contiguous", name, t.stride(1),
            kv::Fp8V4::kTokenBytes);
  }
  if (cache.format == KvFormat::kFp8Tensor && !(cache.scale > 0.0f && std::isfinite(cache.scale))) {
    invalid("{}.scale is {}, expected a positive finite number", name, cache.scale);
  }
}

void check_sparse_decode_shapes(const SparseDecodeArgs& a, const SparseDecodeOptions& options,
                                bool allow_reference_types) {
  check_q_and_out(a.q, a.out, 4, allow_reference_types);
  if (a.q.size(1) < 1 || a.q.size(1) > kMaxQueryTokens) {
    invalid("q.shape[1] (s_q) is {}, expected 1 to {}", a.q.size(1), kMaxQueryTokens);
  }
  check_keys(a.keys, kKeys, a.q);
  if (a.extra.defined()) {
    check_keys(a.extra, kExtra, a.q);
  } else if (a.extra.indices.defined() || a.extra.topk_length.defined()) {
    invalid("extra.cache is not given, expected one beside {}",
            a.extra.indices.defined() ? kExtra.indices : kExtra.topk_length);
  }
  check_vector(a.attn_sink, "attn_sink", DType::kFloat32, a.q.size(2), "q.shape[2] (h_q)", a.q);
  check_statistics(a.lse, "lse", {a.q.size(0), a.q.size(2), a.q.size(1)}, "(b, h_q, s_q) of q", a.q,
                   allow_reference_types);
  check_scale_and_threads(options.softmax_scale, options.num_threads);
  if (options.fixed_split_blocks < 0) {
    invalid("fixed_split_blocks is {}, expected >= 0", options.fixed_split_blocks);
  }
}

void check_sparse_decode_values(const SparseDecodeArgs& a) {
  check_keys_values(a.keys, kKeys);
  if (a.extra.defined()) check_keys_values(a.extra, kExtra);
}

void check_sparse_prefill_shapes(const SparsePrefillArgs& a, const SparsePrefillOptions& options,
                                 bool allow_reference_types) {
  check_q_and_out(a.q, a.out, 3, allow_reference_types);
  const std::int64_t n = a.q.size(0), h_q = a.q.size(1);
  check_cache_for(a.cache, "cache", a.q);
  check_tensor(a.indices, "indices", 2, {DType::kInt32});
  check_size(a.indices, "indices", 0, n, "q.shape[0] (n)");
  check_last_dim_contiguous(a.indices, "indices");
  check_same_device(a.indices, "indices", a.q, "q");
  check_vector(a.topk_length, "topk_length", DType::kInt32, n, "q.shape[0] (n)", a.q);
  check_vector(a.attn_sink, "attn_sink", DType::kFloat32, h_q, "q.shape[1] (h_q)", a.q);
  if (a.cu_seqlens_q.defined()) {
    check_tensor(a.cu_seqlens_q, "cu_seqlens_q", 1, {DType::kInt32});
    const std::int64_t b = a.cu_seqlens_q.size(0) - 1;
    if (b < 1) invalid("cu_seqlens_q.shape[0] is {}, expected b + 1 >= 2", b + 1);
    check_vector(a.cu_seqlens_q, "cu_seqlens_q", DType::kInt32, b + 1, "b + 1", a.q);
    check_vector(a.cu_seqlens_k, "cu_seqlens_k", DType::kInt32, b + 1, "cu_seqlens_q.shape[0] (b + 1)", a.q);
    check_vector(a.cache_seqlens, "cache_seqlens", DType::kInt32, b, "cu_seqlens_q.shape[0] - 1 (b)", a.q);
    if (a.block_table.defined()) {
      check_tensor(a.block_table, "block_table", 2, {DType::kInt32});
      check_size(a.block_table, "block_table", 0, b, "cu_seqlens_q.shape[0] - 1 (b)");
      check_last_dim_contiguous(a.block_table, "block_table");
      check_same_device(a.block_table, "block_table", a.q, "q");
    }
    if (a.block_table.defined() == a.cu_seqlens_k.defined()) {
      invalid("cu_seqlens_k is {} and block_table is {}, expected one of the two beside cu_seqlens_q",
              a.cu_seqlens_k.describe(), a.block_table.describe());
    }
    if (a.block_table.defined() != a.cache_seqlens.defined()) {
      invalid("block_table is {} and cache_seqlens is {}, expected both or neither", a.block_table.describe(),
              a.cache_seqlens.describe());
    }
  } else if (a.cu_seqlens_k.defined() || a.block_table.defined() || a.cache_seqlens.defined()) {
    const char* given = a.cu_seqlens_k.defined()  ? "cu_seqlens_k"
                        : a.block_table.defined() ? "block_table"
                                                  : "cache_seqlens";
    invalid("{} is given without cu_seqlens_q, expected both or neither", given);
  }
  constexpr const char* kShape = "(n, h_q) of q";
  check_statistics(a.max_logits, "max_logits", {n, h_q}, kShape, a.q, allow_reference_types);
  check_statistics(a.lse, "lse", {n, h_q}, kShape, a.q, allow_reference_types);
  check_scale_and_threads(options.softmax_scale, options.num_threads);
}

void check_sparse_prefill_values(const SparsePrefillArgs& a) {
  const std::int64_t n = a.q.size(0), topk = a.indices.size(1);
  const std::int64_t pages = a.cache.data.size(0), page_size = a.cache.data.size(1);
  if (a.topk_length.defined()) {
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int32_t length = a.topk_length.ptr<const std::int32_t>()[i];
      if (length < 0 || length > topk) {
        invalid("topk_length[{}] is {}, expected 0 to indices.shape[1] (topk) = {}", i, length, topk);
      }
    }
  }
  if (a.cu_seqlens_q.defined()) check_offsets(a.cu_seqlens_q, "cu_seqlens_q", 0, n, "q.shape[0]");
  if (a.cu_seqlens_k.defined()) {
    check_offsets(a.cu_seqlens_k, "cu_seqlens_k", -1, pages * page_size, "the cache's slots");
  }
  if (!a.block_table.defined()) return;
  const std::int64_t max_blocks = a.block_table.size(1);
  for (std::int64_t r = 0; r < a.cache_seqlens.size(0); ++r) {
    const std::int32_t length = a.cache_seqlens.ptr<const std::int32_t>()[r];
    if (length < 0 || (length + page_size - 1) / page_size > max_blocks) {
      invalid("cache_seqlens[{}] is {}, expected 0 to block_table.shape[1] * page_size = {} * {}", r, length,
              max_blocks, page_size);
    }
  }
  const PrefillSelection selection(a);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t r = selection.request(i);
    for (std::int64_t j = 0; j < selection.length(i); ++j) {
      const std::int32_t entry = selection.entries(i)[j];
      if (entry < 0 || entry >= a.cache_seqlens.ptr<const std::int32_t>()[r]) continue;
      const std::int64_t block = entry / page_size;
      const std::int32_t page = a.block_table.ptr<const std::int32_t>()[r * a.block_table.stride(0) + block];
      if (page < 0 || page >= pages) {
        invalid("block_table[{}][{}] is {}, expected 0 to {} (indices[{}][{}] = {} uses it)", r, block, page,
                pages - 1, i, j, entry);
      }
    }
  }
}

void check_dense_fp8_decode_shapes(const DenseFp8DecodeArgs& a, const DenseFp8DecodeOptions& options,
                                   bool allow_reference_types) {
  check_q_and_out(a.q, a.out, 4, allow_reference_types, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  const std::int64_t b = a.q.size(0), s_q = a.q.size(1), h_q = a.q.size(2);
  if (s_q < 1 || s_q > 64) invalid("q.shape[1] (s_q) is {}, expected 1 to 64", s_q);
  check_cache_for(a.cache, "cache", a.q);
  check_tensor(a.block_table, "block_table", 2, {DType::kInt32});
  check_size(a.block_table, "block_table", 0, b, "q.shape[0] (b)");
  check_last_dim_contiguous(a.block_table, "block_table");
  check_same_device(a.block_table, "block_table", a.q, "q");
  check_tensor(a.cache_seqlens, "cache_seqlens", 1, {DType::kInt32});
  check_vector(a.cache_seqlens, "cache_seqlens", DType::kInt32, b, "q.shape[0] (b)", a.q);
  check_statistics(a.lse, "lse", {b, h_q, s_q}, "(b, h_q, s_q) of q", a.q, allow_reference_types);
  check_scale_and_threads(options.softmax_scale, options.num_threads);
}

void check_dense_fp8_decode_values(const DenseFp8DecodeArgs& a) {
  // The tables know pages and lengths, whatever a token's bytes are.
  DenseDecodeArgs tables;
  tables.q = a.q;
  tables.k_cache = a.cache.data;
  tables.block_table = a.block_table;
  tables.cache_seqlens = a.cache_seqlens;
  check_dense_decode_values(tables);
}

void check_append_shapes(const KvAppendArgs& a, const KvCacheOptions& options) {
  check_cache(a.cache, "cache");
  check_no_overlap(a.cache.data, "cache");
  const int own = kv::format_d_qk(a.cache.format);
  const std::int64_t latent = (own != 0 ? own : a.cache.data.size(3)) - kv::kRopeWidth;
  check_tensor(a.latent, "latent", 2, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  const std::int64_t n = a.latent.size(0);
  check_size(a.latent, "latent", 1, latent, "the cache's latent width");
  check_tensor(a.rope, "rope", 2, {a.latent.dtype});
  check_size(a.rope, "rope", 0, n, "latent.shape[0] (n)");
  check_size(a.rope, "rope", 1, kv::kRopeWidth, "the rope width");
  check_last_dim_contiguous(a.latent, "latent");
  check_last_dim_contiguous(a.rope, "rope");
  check_tensor(a.slot_mapping, "slot_mapping", 1, {DType::kInt64, DType::kInt32});
  check_size(a.slot_mapping, "slot_mapping", 0, n, "latent.shape[0] (n)");
  check_last_dim_contiguous(a.slot_mapping, "slot_mapping");
  check_same_device(a.rope, "rope", a.latent, "latent");
  check_same_device(a.slot_mapping, "slot_mapping", a.latent, "latent");
  check_same_device(a.cache.data, "cache", a.latent, "latent");
  if (a.cache.format == KvFormat::kFp8V32 && a.recipe != Fp8Recipe::kFlashMla &&
      a.recipe != Fp8Recipe::kVllm && a.recipe != Fp8Recipe::kSglang) {
    invalid("recipe is {}, expected flash_mla, vllm or sglang", fp8_recipe_name(a.recipe));
  }
  if (a.norm_weight.defined()) {
    check_tensor(a.norm_weight, "norm_weight", 1, {DType::kFloat32});
    if (a.norm_weight.size(0) != latent && a.norm_weight.size(0) != latent + kv::kRopeWidth) {
      invalid("norm_weight.shape[0] is {}, expected the latent width {}, or {} with the rope part",
              a.norm_weight.size(0), latent, latent + kv::kRopeWidth);
    }
    check_last_dim_contiguous(a.norm_weight, "norm_weight");
    check_same_device(a.norm_weight, "norm_weight", a.latent, "latent");
    if (!(a.norm_eps >= 0.0f && std::isfinite(a.norm_eps))) {
      invalid("norm_eps is {}, expected a finite number >= 0", a.norm_eps);
    }
  }
  if (a.positions.defined() != a.cos_sin.defined()) {
    invalid("positions is {} and cos_sin is {}, expected both or neither", a.positions.describe(),
            a.cos_sin.describe());
  }
  if (a.positions.defined()) {
    check_tensor(a.positions, "positions", 1, {DType::kInt64, DType::kInt32});
    check_size(a.positions, "positions", 0, n, "latent.shape[0] (n)");
    check_last_dim_contiguous(a.positions, "positions");
    check_same_device(a.positions, "positions", a.latent, "latent");
    check_tensor(a.cos_sin, "cos_sin", 2, {DType::kFloat32});
    check_size(a.cos_sin, "cos_sin", 1, kv::kRopeWidth, "the rope width");
    check_last_dim_contiguous(a.cos_sin, "cos_sin");
    check_same_device(a.cos_sin, "cos_sin", a.latent, "latent");
  }
  if (options.num_threads < 0) invalid("num_threads is {}, expected >= 0", options.num_threads);
}

void check_append_values(const KvAppendArgs& a) {
  check_slots(a.slot_mapping, "slot_mapping", a.cache);
  if (!a.positions.defined()) return;
  for (std::int64_t i = 0; i < a.positions.size(0); ++i) {
    if (integer(a.slot_mapping, i) < 0) continue;  // skipped
    const std::int64_t position = integer(a.positions, i);
    if (position < 0 || position >= a.cos_sin.size(0)) {
      invalid("positions[{}] is {}, expected 0 to cos_sin.shape[0] - 1 = {}", i, position,
              a.cos_sin.size(0) - 1);
    }
  }
}

void check_gather_shapes(const KvGatherArgs& a, const KvCacheOptions& options) {
  check_cache(a.cache, "cache");
  check_tensor(a.slots, "slots", 1, {DType::kInt64, DType::kInt32});
  check_tensor(a.out, "out", 2, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  check_size(a.out, "out", 0, a.slots.size(0), "slots.shape[0] (n)");
  const int own = kv::format_d_qk(a.cache.format);
  check_size(a.out, "out", 1, own != 0 ? own : a.cache.data.size(3), "the cache's d_qk");
  check_last_dim_contiguous(a.slots, "slots");
  check_last_dim_contiguous(a.out, "out");
  check_no_overlap(a.out, "out");
  check_same_device(a.slots, "slots", a.cache.data, "cache");
  check_same_device(a.out, "out", a.cache.data, "cache");
  if (options.num_threads < 0) invalid("num_threads is {}, expected >= 0", options.num_threads);
}

void check_gather_values(const KvGatherArgs& a) { check_slots(a.slots, "slots", a.cache); }

}  // namespace flash_mla::api
