#include "api/gqa_checks.h"

#include "api/checks.h"

namespace flash_mla::api {
namespace {

// Bounds every product of shapes well below 2^63, and lengths, positions and masks as kernels count them.
constexpr std::int64_t kMaxHeads = 1 << 16;
constexpr std::int64_t kMaxHeadDim = 1024;
constexpr std::int64_t kMaxLength = (std::int64_t{1} << 31) - 1;

/// A tensor of int32, contiguous, on q's device.
void check_indices(const TensorView& t, const char* name, const TensorView& q) {
  check_tensor(t, name, 1, {DType::kInt32});
  check_last_dim_contiguous(t, name);
  check_same_device(t, name, q, "q");
}

void check_pages(const GqaArgs& a) {
  if (a.block_table.defined() && (a.page_indptr.defined() || a.page_indices.defined())) {
    invalid("page_indices and block_table are both given, expected one of them");
  }
  if (a.page_indptr.defined() != a.page_indices.defined()) {
    invalid("{} is not given, expected page_indptr and page_indices, or neither",
            a.page_indptr.defined() ? "page_indices" : "page_indptr");
  }
  const bool paged = a.block_table.defined() || a.page_indices.defined();
  if (a.k.rank == 3) {
    if (paged)
      invalid("k is {}, expected rank 4 (num_pages, page_size, h_kv, d_qk) with a table of pages",
              a.k.describe());
    if (!a.cu_seqlens_k.defined())
      invalid("cu_seqlens_k is not given, expected it with ragged keys (k of rank 3)");
    return;
  }
  if (a.cu_seqlens_k.defined()) {
    invalid("cu_seqlens_k is {}, expected seqlens_k instead for k of rank 4", a.cu_seqlens_k.describe());
  }
  if (!a.seqlens_k.defined()) invalid("seqlens_k is not given, expected it for k of rank 4");
  const std::int64_t b = a.seqlens_k.size(0);
  if (a.block_table.defined()) {
    check_tensor(a.block_table, "block_table", 2, {DType::kInt32});
    check_last_dim_contiguous(a.block_table, "block_table");
    check_same_device(a.block_table, "block_table", a.q, "q");
    check_size(a.block_table, "block_table", 0, b, "seqlens_k.shape[0] (b)");
  } else if (paged) {
    check_indices(a.page_indptr, "page_indptr", a.q);
    check_indices(a.page_indices, "page_indices", a.q);
    check_size(a.page_indptr, "page_indptr", 0, b + 1, "b + 1");
  } else {
    check_size(a.k, "k", 0, b, "seqlens_k.shape[0] (b), without a table of pages");
  }
  if (paged && a.k.size(1) < 1) invalid("k.shape[1] (page_size) is {}, expected >= 1", a.k.size(1));
}

void check_keys(const GqaArgs& a) {
  if (a.k.rank != 3 && a.k.rank != 4) {
    invalid("k is {}, expected (total_k, h_kv, d_qk) or (num_pages, page_size, h_kv, d_qk)", a.k.describe());
  }
  check_tensor(a.k, "k", a.k.rank, {a.q.dtype});
  check_tensor(a.v, "v", a.k.rank, {a.q.dtype});
  for (int d = 0; d + 1 < a.k.rank; ++d) check_size(a.v, "v", d, a.k.size(d), "the same dimension of k");
  const std::int64_t h_q = a.q.size(1), h_kv = a.k.size(a.k.rank - 2);
  if (h_q < 1 || h_q > kMaxHeads) invalid("q.shape[1] (h_q) is {}, expected 1 to {}", h_q, kMaxHeads);
  if (h_kv < 1 || h_q % h_kv != 0) {
    invalid("k.shape[{}] (h_kv) is {}, expected a divisor of q.shape[1] (h_q) = {}", a.k.rank - 2, h_kv, h_q);
  }
  check_size(a.k, "k", a.k.rank - 1, a.q.size(2), "q.shape[2] (d_qk)");
  check_size(a.v, "v", a.v.rank - 1, a.out.size(2), "out.shape[2] (d_v)");
  for (const auto& [t, name] :
       {std::pair{&a.q, "q.shape[2] (d_qk)"}, std::pair{&a.out, "out.shape[2] (d_v)"}}) {
    if (t->size(2) < 1 || t->size(2) > kMaxHeadDim)
      invalid("{} is {}, expected 1 to {}", name, t->size(2), kMaxHeadDim);
  }
  check_last_dim_contiguous(a.k, "k");
  check_last_dim_contiguous(a.v, "v");
  check_same_device(a.k, "k", a.q, "q");
  check_same_device(a.v, "v", a.q, "q");
}

void check_lengths(const GqaArgs& a) {
  for (const auto& [t, name] :
       {std::pair{&a.cu_seqlens_k, "cu_seqlens_k"}, std::pair{&a.seqlens_k, "seqlens_k"},
        std::pair{&a.cu_seqlens_q, "cu_seqlens_q"}}) {
    if (t->defined()) check_indices(*t, name, a.q);
  }
  if (a.cu_seqlens_k.defined() && a.cu_seqlens_k.size(0) < 1) {
    invalid("cu_seqlens_k.shape[0] is 0, expected b + 1");
  }
  check_pages(a);
  const std::int64_t b = gqa_batch(a);
  if (a.cu_seqlens_k.defined() && a.seqlens_k.defined()) {
    check_size(a.seqlens_k, "seqlens_k", 0, a.cu_seqlens_k.size(0) - 1, "cu_seqlens_k.shape[0] - 1 (b)");
  }
  if (a.q.size(0) > kMaxLength)
    invalid("q.shape[0] (total_q) is {}, expected up to {}", a.q.size(0), kMaxLength);
  if (a.cu_seqlens_q.defined()) {
    check_size(a.cu_seqlens_q, "cu_seqlens_q", 0, b + 1, "b + 1");
  } else if (b == 0 ? a.q.size(0) != 0 : a.q.size(0) % b != 0) {
    invalid("q.shape[0] (total_q) is {}, expected a multiple of b = {} without cu_seqlens_q", a.q.size(0), b);
  }
}

/// One float for each head.
void check_per_head(const TensorView& t, const char* name, const TensorView& q) {
  if (!t.defined()) return;
  check_tensor(t, name, 1, {DType::kFloat32});
  check_size(t, name, 0, q.size(1), "q.shape[1] (h_q)");
  check_last_dim_contiguous(t, name);
  check_same_device(t, name, q, "q");
}

void check_outputs(const GqaArgs& a, bool allow_reference_types) {
  if (allow_reference_types) {
    check_tensor(a.out, "out", 3, {a.q.dtype, DType::kFloat32, DType::kFloat64});
  } else {
    check_tensor(a.out, "out", 3, {a.q.dtype});
  }
  check_size(a.out, "out", 0, a.q.size(0), "q.shape[0] (total_q)");
  check_size(a.out, "out", 1, a.q.size(1), "q.shape[1] (h_q)");
  check_last_dim_contiguous(a.out, "out");
  check_no_overlap(a.out, "out");
  check_same_device(a.out, "out", a.q, "q");
  if (!a.lse.defined()) return;
  if (allow_reference_types) {
    check_tensor(a.lse, "lse", 2, {DType::kFloat32, DType::kFloat64});
  } else {
    check_tensor(a.lse, "lse", 2, {DType::kFloat32});
  }
  check_size(a.lse, "lse", 0, a.q.size(1), "q.shape[1] (h_q)");
  check_size(a.lse, "lse", 1, a.q.size(0), "q.shape[0] (total_q)");
  check_no_overlap(a.lse, "lse");
  check_same_device(a.lse, "lse", a.q, "q");
}

void check_options(const GqaOptions& o) {
  if (o.softmax_scale && !(*o.softmax_scale > 0.0f && *o.softmax_scale < 1e30f)) {
    invalid("softmax_scale is {}, expected a positive finite number", *o.softmax_scale);
  }
  if (!(o.soft_cap >= 0.0f && o.soft_cap < 1e30f)) {
    invalid("soft_cap is {}, expected 0 (none) or a positive finite number", o.soft_cap);
  }
  if (o.window_left < -1) invalid("window_left is {}, expected -1 (none) or more", o.window_left);
  if (o.window_right < -1) invalid("window_right is {}, expected -1 (none) or more", o.window_right);
  if (o.max_seqlen_q < 0) invalid("max_seqlen_q is {}, expected >= 0", o.max_seqlen_q);
  if (o.num_scheduled < -1) invalid("num_scheduled is {}, expected -1 (all) or more", o.num_scheduled);
  if (o.max_scheduled_q < 0) invalid("max_scheduled_q is {}, expected >= 0", o.max_scheduled_q);
  if (o.num_threads < 0) invalid("num_threads is {}, expected >= 0", o.num_threads);
}

/// That offsets begin with 0, do not decrease and end at most with `last`, or exactly there.
void check_offsets(const TensorView& t, const char* name, std::int64_t last, bool exactly,
                   const char* last_name) {
  const auto* at = t.ptr<const std::int32_t>();
  const std::int64_t n = t.size(0);
  if (at[0] != 0) invalid("{}[0] is {}, expected 0", name, at[0]);
  for (std::int64_t i = 1; i < n; ++i) {
    if (at[i] < at[i - 1])
      invalid("{}[{}] is {}, expected at least the {} before it", name, i, at[i], at[i - 1]);
  }
  if (exactly ? at[n - 1] != last : at[n - 1] > last) {
    invalid("{}[{}] is {}, expected {}{} = {}", name, n - 1, at[n - 1], exactly ? "" : "up to ", last_name,
            last);
  }
}

void check_page(const GqaArgs& a, const char* name, std::int64_t i, std::int64_t j, std::int32_t page) {
  if (page < 0 || page >= a.k.size(0)) {
    invalid("{} of sequence {}, page {}, is {}, expected 0 to {}", name, i, j, page, a.k.size(0) - 1);
  }
}

void check_sequence(const GqaArgs& a, std::int64_t i) {
  const std::int64_t length = a.seqlens_k.ptr<const std::int32_t>()[i];
  if (length < 0) invalid("seqlens_k[{}] is {}, expected >= 0", i, length);
  if (a.cu_seqlens_k.defined()) {
    const auto* at = a.cu_seqlens_k.ptr<const std::int32_t>();
    if (at[i + 1] - at[i] != length) {
      invalid("seqlens_k[{}] is {}, expected cu_seqlens_k[{}] - cu_seqlens_k[{}] = {}", i, length, i + 1, i,
              at[i + 1] - at[i]);
    }
    return;
  }
  const std::int64_t page_size = a.k.size(1),
                     pages = (length + page_size - 1) / std::max<std::int64_t>(page_size, 1);
  if (!a.block_table.defined() && !a.page_indices.defined()) {
    if (length > page_size)
      invalid("seqlens_k[{}] is {}, expected up to k.shape[1] = {}", i, length, page_size);
    return;
  }
  const bool csr = a.page_indices.defined();
  const auto* starts = a.page_indptr.ptr<const std::int32_t>();
  const std::int64_t have = csr ? starts[i + 1] - starts[i] : a.block_table.size(1);
  if (pages > have) {
    invalid("seqlens_k[{}] is {}, expected up to page_size times the sequence's pages = {} * {}", i, length,
            page_size, have);
  }
  const auto* row = csr ? a.page_indices.ptr<const std::int32_t>() + starts[i]
                        : a.block_table.ptr<const std::int32_t>() + i * a.block_table.stride(0);
  for (std::int64_t j = 0; j < pages; ++j) check_page(a, csr ? "page_indices" : "block_table", i, j, row[j]);
}

}  // namespace

std::int64_t gqa_batch(const GqaArgs& a) {
  return a.seqlens_k.defined() ? a.seqlens_k.size(0) : a.cu_seqlens_k.size(0) - 1;
}

void check_gqa_shapes(const GqaArgs& a, const GqaOptions& options, bool allow_reference_types) {
  if (allow_reference_types) {
    check_tensor(a.q, "q", 3, {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64});
  } else {
    check_tensor(a.q, "q", 3, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  }
  check_last_dim_contiguous(a.q, "q");
  check_outputs(a, allow_reference_types);
  check_keys(a);
  check_lengths(a);
  check_per_head(a.sinks, "sinks", a.q);
  check_per_head(a.alibi_slopes, "alibi_slopes", a.q);
  if (a.mask.defined() != a.mask_indptr.defined()) {
    invalid("{} is not given, expected mask and mask_indptr, or neither",
            a.mask.defined() ? "mask_indptr" : "mask");
  }
  if (a.mask.defined()) {
    check_tensor(a.mask, "mask", 1, {DType::kUInt8});
    check_last_dim_contiguous(a.mask, "mask");
    check_same_device(a.mask, "mask", a.q, "q");
    check_indices(a.mask_indptr, "mask_indptr", a.q);
    check_size(a.mask_indptr, "mask_indptr", 0, gqa_batch(a) + 1, "b + 1");
  }
  check_options(options);
}

void check_gqa_values(const GqaArgs& a) {
  const std::int64_t b = gqa_batch(a);
  if (a.cu_seqlens_q.defined())
    check_offsets(a.cu_seqlens_q, "cu_seqlens_q", a.q.size(0), true, "q.shape[0]");
  if (a.cu_seqlens_k.defined())
    check_offsets(a.cu_seqlens_k, "cu_seqlens_k", a.k.size(0), false, "k.shape[0]");
  if (a.page_indptr.defined()) {
    check_offsets(a.page_indptr, "page_indptr", a.page_indices.size(0), false, "page_indices.shape[0]");
  }
  for (std::int64_t i = 0; a.seqlens_k.defined() && i < b; ++i) check_sequence(a, i);
  if (!a.mask.defined()) return;
  check_offsets(a.mask_indptr, "mask_indptr", a.mask.size(0), false, "mask.shape[0]");
  const auto* starts = a.mask_indptr.ptr<const std::int32_t>();
  const auto length = [](const TensorView& cu, const TensorView& lengths, std::int64_t uniform,
                         std::int64_t i) {
    if (lengths.defined()) return std::int64_t{lengths.ptr<const std::int32_t>()[i]};
    const auto* at = cu.ptr<const std::int32_t>();
    return cu.defined() ? std::int64_t{at[i + 1]} - at[i] : uniform;
  };
  for (std::int64_t i = 0; i < b; ++i) {
    const std::int64_t n = length(a.cu_seqlens_q, {}, a.q.size(0) / b, i),
                       m = length(a.cu_seqlens_k, a.seqlens_k, 0, i);
    if ((n * m + 7) / 8 > starts[i + 1] - starts[i]) {
      invalid("mask_indptr gives sequence {} {} bytes, expected {} for {} queries and {} keys", i,
              starts[i + 1] - starts[i], (n * m + 7) / 8, n, m);
    }
  }
}

}  // namespace flash_mla::api
