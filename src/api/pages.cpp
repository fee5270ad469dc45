#include "flash_mla/pages.h"

#include <limits>

#include "api/call.h"
#include "kernels/cache/pages.h"

namespace flash_mla {
namespace {

using api::check_last_dim_contiguous;
using api::check_no_overlap;
using api::check_same_device;
using api::check_size;
using api::check_tensor;
using api::invalid;

constexpr std::initializer_list<DType> kIntegers = {DType::kInt32, DType::kInt64};

/// Whether the call runs on a GPU, whose numbers nobody reads on the host.
bool on_gpu(const TensorView& t, const char* name, const RowOptions& options) {
  if (options.num_threads < 0) invalid("num_threads is {}, expected >= 0", options.num_threads);
  return api::backend_of(options.backend, t, name) == Backend::kSm90;
}

/// Starts of so many runs: they begin at `first` or later and do not fall. Returns the last.
std::int64_t check_starts(const TensorView& t, const char* name, std::int64_t most, const char* most_name) {
  if (t.size(0) < 1) invalid("{}.shape[0] is 0, expected one more than sequences", name);
  std::int64_t last = 0;
  for (std::int64_t i = 0; i < t.size(0); ++i) {
    const std::int64_t start = integer_at(t, i);
    if (start < last || start > most) {
      invalid("{}[{}] is {}, expected {} to {} ({})", name, i, start, last, most, most_name);
    }
    last = start;
  }
  return last;
}

void check_rows(const TensorView& rows, const char* name, const TensorView& pool, const char* pool_name,
                const PageAppendArgs& a) {
  check_tensor(rows, name, 3, {a.key.dtype});
  check_tensor(pool, pool_name, 4, {a.key.dtype});
  check_size(rows, name, 0, a.key.size(0), "key.shape[0] (n)");
  check_size(rows, name, 1, a.key.size(1), "key.shape[1] (h)");
  check_size(pool, pool_name, 0, a.k_cache.size(0), "k_cache.shape[0] (num_pages)");
  check_size(pool, pool_name, 1, a.k_cache.size(1), "k_cache.shape[1] (page_size)");
  check_size(pool, pool_name, 2, a.key.size(1), "key.shape[1] (h)");
  check_size(pool, pool_name, 3, rows.size(2), "the last dimension of its rows");
  check_last_dim_contiguous(rows, name);
  check_last_dim_contiguous(pool, pool_name);
  check_no_overlap(pool, pool_name);
  check_same_device(rows, name, a.key, "key");
  check_same_device(pool, pool_name, a.key, "key");
}

void check_shapes(const PageAppendArgs& a) {
  check_tensor(a.key, "key", 3, {a.key.dtype});
  check_tensor(a.k_cache, "k_cache", 4, {a.key.dtype});
  check_rows(a.key, "key", a.k_cache, "k_cache", a);
  if (a.value.defined() != a.v_cache.defined()) {
    invalid("{} is not given, expected value and v_cache, or neither",
            a.value.defined() ? "v_cache" : "value");
  }
  if (a.value.defined()) check_rows(a.value, "value", a.v_cache, "v_cache", a);
  const auto integers = [&](const TensorView& t, const char* name) {
    check_tensor(t, name, 1, kIntegers);
    check_same_device(t, name, a.key, "key");
  };
  integers(a.batch_indices, "batch_indices");
  check_size(a.batch_indices, "batch_indices", 0, a.key.size(0), "key.shape[0] (n)");
  integers(a.positions, "positions");
  check_size(a.positions, "positions", 0, a.key.size(0), "key.shape[0] (n)");
  integers(a.page_indptr, "page_indptr");
  integers(a.page_indices, "page_indices");
  if (a.k_cache.size(1) < 1) invalid("k_cache.shape[1] (page_size) is 0, expected >= 1");
}

void check_values(const PageAppendArgs& a) {
  check_starts(a.page_indptr, "page_indptr", a.page_indices.size(0), "page_indices.shape[0]");
  const std::int64_t b = a.page_indptr.size(0) - 1, page_size = a.k_cache.size(1);
  for (std::int64_t i = 0; i < a.key.size(0); ++i) {
    const std::int64_t sequence = integer_at(a.batch_indices, i), position = integer_at(a.positions, i);
    if (sequence < 0 || sequence >= b) {
      invalid("batch_indices[{}] is {}, expected 0 to {} (page_indptr.shape[0] - 2)", i, sequence, b - 1);
    }
    const std::int64_t pages = integer_at(a.page_indptr, sequence + 1) - integer_at(a.page_indptr, sequence);
    if (position < 0 || position / page_size >= pages) {
      invalid("positions[{}] is {}, expected 0 to {} (sequence {} has {} pages of {} tokens)", i, position,
              pages * page_size - 1, sequence, pages, page_size);
    }
    const std::int64_t page = place_of(a, i).page;
    if (page < 0 || page >= a.k_cache.size(0)) {
      invalid("page_indices[{}] is {}, expected 0 to k_cache.shape[0] (num_pages) - 1 = {}",
              integer_at(a.page_indptr, sequence) + position / page_size, page, a.k_cache.size(0) - 1);
    }
  }
}

void check_output(const TensorView& t, const char* name, std::int64_t n, const char* n_name,
                  const TensorView& beside, const char* beside_name) {
  check_tensor(t, name, 1, kIntegers);
  check_size(t, name, 0, n, n_name);
  check_no_overlap(t, name);
  check_same_device(t, name, beside, beside_name);
}

}  // namespace

void append_pages(const PageAppendArgs& args, const RowOptions& options) {
  check_shapes(args);
  if (on_gpu(args.key, "key", options)) return sm90::append_pages(args, options.stream);
  check_values(args);
  cpu::append_pages(args, options.num_threads);
}

void batch_positions(const TensorView& indptr, const TensorView& seqlens, const TensorView& batch_indices,
                     const TensorView& positions, const RowOptions& options) {
  check_tensor(indptr, "indptr", 1, kIntegers);
  check_tensor(seqlens, "seqlens", 1, kIntegers);
  check_size(indptr, "indptr", 0, seqlens.size(0) + 1, "seqlens.shape[0] (b) + 1");
  check_same_device(seqlens, "seqlens", indptr, "indptr");
  check_tensor(batch_indices, "batch_indices", 1, kIntegers);
  const std::int64_t n = batch_indices.size(0);
  check_output(batch_indices, "batch_indices", n, "tokens (n)", indptr, "indptr");
  check_output(positions, "positions", n, "batch_indices.shape[0] (n)", indptr, "indptr");
  if (on_gpu(indptr, "indptr", options)) {
    return sm90::batch_positions(indptr, seqlens, batch_indices, positions, options.stream);
  }
  if (integer_at(indptr, 0) != 0) invalid("indptr[0] is {}, expected 0", integer_at(indptr, 0));
  const std::int64_t last = check_starts(indptr, "indptr", n, "batch_indices.shape[0] (n)");
  if (last != n) {
    invalid("indptr[{}] is {}, expected batch_indices.shape[0] (n) = {}", seqlens.size(0), last, n);
  }
  for (std::int64_t i = 0; i < seqlens.size(0); ++i) {
    const std::int64_t count = integer_at(indptr, i + 1) - integer_at(indptr, i);
    if (integer_at(seqlens, i) < count) {
      invalid("seqlens[{}] is {}, expected at least its {} new tokens", i, integer_at(seqlens, i), count);
    }
  }
  for (std::int64_t i = 0; i < seqlens.size(0); ++i) {
    const std::int64_t begin = integer_at(indptr, i), end = integer_at(indptr, i + 1);
    const std::int64_t length = integer_at(seqlens, i);
    for (std::int64_t token = begin; token < end; ++token) {
      put_integer(batch_indices, token * batch_indices.stride(0), i);
      put_integer(positions, token * positions.stride(0), length - (end - token));
    }
  }
}

void paged_seqlens(const TensorView& page_indptr, const TensorView& last_page_len, std::int64_t page_size,
                   const TensorView& seqlens, const RowOptions& options) {
  check_tensor(page_indptr, "page_indptr", 1, kIntegers);
  check_tensor(last_page_len, "last_page_len", 1, kIntegers);
  const std::int64_t b = last_page_len.size(0);
  check_size(page_indptr, "page_indptr", 0, b + 1, "last_page_len.shape[0] (b) + 1");
  check_same_device(last_page_len, "last_page_len", page_indptr, "page_indptr");
  check_output(seqlens, "seqlens", b, "last_page_len.shape[0] (b)", page_indptr, "page_indptr");
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  if (page_size < 1 || page_size > kMax) invalid("page_size is {}, expected 1 to {}", page_size, kMax);
  if (on_gpu(page_indptr, "page_indptr", options)) {
    return sm90::paged_seqlens(page_indptr, last_page_len, page_size, seqlens, options.stream);
  }
  check_starts(page_indptr, "page_indptr", kMax, "the largest int32");
  for (std::int64_t i = 0; i < b; ++i) {
    const std::int64_t pages = integer_at(page_indptr, i + 1) - integer_at(page_indptr, i);
    const std::int64_t last = integer_at(last_page_len, i);
    if (pages == 0) continue;
    if (last < 1 || last > page_size) {
      invalid("last_page_len[{}] is {}, expected 1 to page_size = {}", i, last, page_size);
    }
    if ((pages - 1) * page_size + last > kMax) {
      invalid("page_indptr[{}] is {}, expected a sequence of at most {} tokens", i + 1,
              integer_at(page_indptr, i + 1), kMax);
    }
  }
  for (std::int64_t i = 0; i < b; ++i) {
    const std::int64_t pages = integer_at(page_indptr, i + 1) - integer_at(page_indptr, i);
    const std::int64_t length = pages == 0 ? 0 : (pages - 1) * page_size + integer_at(last_page_len, i);
    put_integer(seqlens, i * seqlens.stride(0), length);
  }
}

}  // namespace flash_mla
