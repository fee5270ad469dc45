#include "api/checks.h"

#include <algorithm>
#include <array>

#include "schedule/walk.h"

namespace flash_mla::api {
namespace {

constexpr std::int64_t kMaxLatentWidth = 1024;
constexpr std::int64_t kMaxRopeWidth = 128;
constexpr std::int64_t kMaxPageSize = 256;
constexpr std::int64_t kMaxQueryTokens = 64;
// With the limits above, bounds every product of shapes well below 2^63.
constexpr std::int64_t kMaxQueryHeads = 1 << 20;

std::string join_dtypes(std::initializer_list<DType> dtypes) {
  std::string text;
  for (const DType d : dtypes) {
    if (!text.empty()) text += " or ";
    text += dtype_name(d);
  }
  return text;
}

// That the bytes of a non-empty tensor, and its last address, are numbers of 64 bits: whatever is computed
// from shape and strides later cannot overflow. Elements are counted too, which may share addresses.
void check_extent(const TensorView& t, const char* name) {
  const auto element = static_cast<std::int64_t>(dtype_size(t.dtype));
  std::int64_t bytes = element, reach = element;
  std::uintptr_t last = 0;
  for (int i = 0; i < t.rank; ++i) {
    std::int64_t span = 0;
    if (__builtin_mul_overflow(bytes, t.size(i), &bytes) ||
        __builtin_mul_overflow(t.size(i) - 1, t.size(i) > 1 ? t.stride(i) : 0, &span) ||
        __builtin_mul_overflow(span, element, &span) || __builtin_add_overflow(reach, span, &reach) ||
        __builtin_add_overflow(reinterpret_cast<std::uintptr_t>(t.data), static_cast<std::uintptr_t>(reach),
                               &last)) {
      invalid("{}.shape[{}] is {} with stride {}: the tensor does not fit a 64-bit address space", name, i,
              t.size(i), t.stride(i));
    }
  }
}

}  // namespace

void check_tensor(const TensorView& t, const char* name, int rank, std::initializer_list<DType> dtypes) {
  if (t.rank != rank) {
    invalid("{} is {}, expected a tensor of rank {}", name, t.describe(), rank);
  }
  if (std::find(dtypes.begin(), dtypes.end(), t.dtype) == dtypes.end()) {
    invalid("{} is {}, expected {}", name, t.describe(), join_dtypes(dtypes));
  }
  bool empty = false;
  for (int i = 0; i < t.rank; ++i) {
    if (t.size(i) < 0) invalid("{}.shape[{}] is {}, expected >= 0", name, i, t.size(i));
    if (t.size(i) == 0) empty = true;
    if (t.size(i) > 1 && t.stride(i) < 0) {
      invalid("{}.stride[{}] is {}, expected >= 0", name, i, t.stride(i));
    }
  }
  if (empty) return;
  if (t.data == nullptr) invalid("{} is {} with a null data pointer", name, t.describe());
  if (reinterpret_cast<std::uintptr_t>(t.data) % dtype_size(t.dtype) != 0) {
    invalid("{}.data is {}, expected a pointer aligned to {} bytes", name, fmt::ptr(t.data),
            dtype_size(t.dtype));
  }
  check_extent(t, name);
}

void check_size(const TensorView& t, const char* name, int dim, std::int64_t expected,
                const char* expected_name) {
  if (t.size(dim) != expected) {
    invalid("{}.shape[{}] is {}, expected {} = {}", name, dim, t.size(dim), expected_name, expected);
  }
}

void check_last_dim_contiguous(const TensorView& t, const char* name) {
  const int last = t.rank - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) {
    invalid("{}.stride[{}] is {}, expected 1 (contiguous last dimension)", name, last, t.stride(last));
  }
}

void check_no_overlap(const TensorView& t, const char* name) {
  if (t.numel() == 0) return;
  // Dimensions by ascending stride; an insertion sort, since there are at most kMaxRank.
  std::array<int, TensorView::kMaxRank> order{};
  int n = 0;
  for (int i = 0; i < t.rank; ++i) {
    if (t.size(i) <= 1) continue;
    int at = n++;
    for (; at > 0 && t.stride(order[static_cast<std::size_t>(at) - 1]) > t.stride(i); --at) {
      order[static_cast<std::size_t>(at)] = order[static_cast<std::size_t>(at) - 1];
    }
    order[static_cast<std::size_t>(at)] = i;
  }
  std::int64_t reach = 0;  // highest offset of the dimensions so far
  for (int i = 0; i < n; ++i) {
    const int dim = order[static_cast<std::size_t>(i)];
    if (t.stride(dim) <= reach) {
      invalid("{}.stride[{}] is {}, so that elements share addresses; expected > {}", name, dim,
              t.stride(dim), reach);
    }
    reach += t.stride(dim) * (t.size(dim) - 1);
  }
}

void check_same_device(const TensorView& t, const char* name, const TensorView& reference,
                       const char* reference_name) {
  if (t.device != reference.device) {
    invalid("{} is {}, expected the device of {}, which is {}", name, t.describe(), reference_name,
            reference.describe());
  }
}

/// Of queries in two parts: the second fits the first, which is as wide as V.
static void check_query_rope(const DenseDecodeArgs& a) {
  check_tensor(a.q_rope, "q_rope", 4, {a.q.dtype});
  check_size(a.q, "q", 3, a.out.size(3), "out.shape[3] (d_v), since q_rope is given,");
  check_size(a.q_rope, "q_rope", 0, a.q.size(0), "q.shape[0] (b)");
  check_size(a.q_rope, "q_rope", 1, a.q.size(1), "q.shape[1] (s_q)");
  check_size(a.q_rope, "q_rope", 2, a.q.size(2), "q.shape[2] (h_q)");
  check_last_dim_contiguous(a.q_rope, "q_rope");
  check_same_device(a.q_rope, "q_rope", a.q, "q");
}

void check_dense_decode_shapes(const DenseDecodeArgs& a, const DenseDecodeOptions& options,
                               bool allow_reference_types) {
  if (allow_reference_types) {
    check_tensor(a.q, "q", 4, {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64});
    check_tensor(a.out, "out", 4, {a.q.dtype, DType::kFloat32, DType::kFloat64});
  } else {
    check_tensor(a.q, "q", 4, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
    check_tensor(a.out, "out", 4, {a.q.dtype});
  }
  check_tensor(a.k_cache, "k_cache", 4, {a.q.dtype});
  check_tensor(a.block_table, "block_table", 2, {DType::kInt32});
  check_tensor(a.cache_seqlens, "cache_seqlens", 1, {DType::kInt32});

  const std::int64_t b = a.q.size(0), s_q = a.q.size(1), h_q = a.q.size(2), d_qk = a.d_qk();
  if (s_q < 1 || s_q > kMaxQueryTokens) {
    invalid("q.shape[1] (s_q) is {}, expected 1 to {}", s_q, kMaxQueryTokens);
  }
  if (h_q < 1 || h_q > kMaxQueryHeads) {
    invalid("q.shape[2] (h_q) is {}, expected 1 to {}", h_q, kMaxQueryHeads);
  }
  const std::int64_t page_size = a.k_cache.size(1), h_kv = a.k_cache.size(2);
  if (page_size < 1 || page_size > kMaxPageSize) {
    invalid("k_cache.shape[1] (page_size) is {}, expected 1 to {}", page_size, kMaxPageSize);
  }
  if (h_kv < 1) invalid("k_cache.shape[2] (h_kv) is {}, expected >= 1", h_kv);
  if (h_q % h_kv != 0) {
    invalid("q.shape[2] (h_q) is {}, expected a multiple of k_cache.shape[2] (h_kv) = {}", h_q, h_kv);
  }
  check_size(a.k_cache, "k_cache", 3, d_qk, "q.shape[3] (d_qk)");
  const std::int64_t d_v = a.out.size(3);
  if (d_v < 1 || d_v > kMaxLatentWidth) {
    invalid("out.shape[3] (d_v, the latent width) is {}, expected 1 to {}", d_v, kMaxLatentWidth);
  }
  if (d_qk < d_v || d_qk - d_v > kMaxRopeWidth) {
    invalid("q.shape[3] (d_qk) is {}, expected {} to {}: d_v plus a rope width of 0 to {}", d_qk, d_v,
            d_v + kMaxRopeWidth, kMaxRopeWidth);
  }
  if (a.q_rope.defined()) check_query_rope(a);
  check_size(a.out, "out", 0, b, "q.shape[0] (b)");
  check_size(a.out, "out", 1, s_q, "q.shape[1] (s_q)");
  check_size(a.out, "out", 2, h_q, "q.shape[2] (h_q)");
  check_size(a.block_table, "block_table", 0, b, "q.shape[0] (b)");
  check_size(a.cache_seqlens, "cache_seqlens", 0, b, "q.shape[0] (b)");
  check_last_dim_contiguous(a.q, "q");
  check_last_dim_contiguous(a.k_cache, "k_cache");
  check_last_dim_contiguous(a.out, "out");
  check_last_dim_contiguous(a.block_table, "block_table");
  check_last_dim_contiguous(a.cache_seqlens, "cache_seqlens");
  check_no_overlap(a.out, "out");
  check_same_device(a.k_cache, "k_cache", a.q, "q");
  check_same_device(a.block_table, "block_table", a.q, "q");
  check_same_device(a.cache_seqlens, "cache_seqlens", a.q, "q");
  check_same_device(a.out, "out", a.q, "q");
  if (a.lse.defined()) {
    if (allow_reference_types) {
      check_tensor(a.lse, "lse", 3, {DType::kFloat32, DType::kFloat64});
    } else {
      check_tensor(a.lse, "lse", 3, {DType::kFloat32});
    }
    check_size(a.lse, "lse", 0, b, "q.shape[0] (b)");
    check_size(a.lse, "lse", 1, h_q, "q.shape[2] (h_q)");
    check_size(a.lse, "lse", 2, s_q, "q.shape[1] (s_q)");
    check_no_overlap(a.lse, "lse");
    check_same_device(a.lse, "lse", a.q, "q");
  }
  if (options.softmax_scale && !(*options.softmax_scale > 0.0f && *options.softmax_scale < 1e30f)) {
    invalid("softmax_scale is {}, expected a positive finite number", *options.softmax_scale);
  }
  if (options.num_threads < 0) invalid("num_threads is {}, expected >= 0", options.num_threads);
}

void check_dense_decode_values(const DenseDecodeArgs& a) {
  const std::int64_t b = a.q.size(0), page_size = a.k_cache.size(1), num_blocks = a.k_cache.size(0);
  const std::int64_t max_blocks = a.block_table.size(1);
  const auto* lengths = a.cache_seqlens.ptr<const std::int32_t>();
  for (std::int64_t i = 0; i < b; ++i) {
    const std::int64_t length = lengths[i];
    const std::int64_t pages = schedule_blocks(length, static_cast<int>(page_size));
    if (length < 0 || pages > max_blocks) {
      invalid("cache_seqlens[{}] is {}, expected 0 to block_table.shape[1] * page_size = {} * {}", i, length,
              max_blocks, page_size);
    }
    if (length == 0) continue;  // the table may have no columns then
    const auto* row = a.block_table.ptr<const std::int32_t>() + i * a.block_table.stride(0);
    for (std::int64_t j = 0; j < pages; ++j) {
      if (row[j] < 0 || row[j] >= num_blocks) {
        invalid("block_table[{}][{}] is {}, expected 0 to {} (cache_seqlens[{}] = {} uses {} pages)", i, j,
                row[j], num_blocks - 1, i, length, pages);
      }
    }
  }
}

void check_schedule_shapes(const DecodeScheduleView& s, std::int64_t batch, const TensorView& q) {
  check_tensor(s.parts, "schedule.parts", 2, {DType::kInt32});
  check_tensor(s.num_splits, "schedule.num_splits", 1, {DType::kInt32});
  if (s.parts.size(0) < 1 || s.parts.size(0) > kMaxParts) {
    invalid("schedule.parts.shape[0] is {}, expected 1 to {}", s.parts.size(0), kMaxParts);
  }
  check_size(s.parts, "schedule.parts", 1, 8, "the row width");
  check_size(s.num_splits, "schedule.num_splits", 0, batch + 1, "b + 1");
  check_last_dim_contiguous(s.parts, "schedule.parts");
  check_last_dim_contiguous(s.num_splits, "schedule.num_splits");
  check_same_device(s.parts, "schedule.parts", q, "q");
  check_same_device(s.num_splits, "schedule.num_splits", q, "q");
  if (s.block_size < 1) invalid("schedule.block_size is {}, expected >= 1", s.block_size);
  if (s.fixed_split_blocks < 0) {
    invalid("schedule.fixed_split_blocks is {}, expected >= 0", s.fixed_split_blocks);
  }
}

void check_num_splits(const DecodeScheduleView& s) {
  const auto* num_splits = s.num_splits.ptr<const std::int32_t>();
  if (num_splits[0] != 0) invalid("schedule.num_splits[0] is {}, expected 0", num_splits[0]);
  for (std::int64_t i = 1; i < s.num_splits.size(0); ++i) {
    if (num_splits[i] <= num_splits[i - 1]) {
      invalid("schedule.num_splits[{}] is {}, expected more than the {} before it", i, num_splits[i],
              num_splits[i - 1]);
    }
  }
}

void check_schedule_values(const DecodeScheduleView& s, const TensorView& cache_seqlens) {
  const std::int64_t batch = cache_seqlens.size(0);
  const auto* lengths = cache_seqlens.ptr<const std::int32_t>();
  const auto* num_splits = s.num_splits.ptr<const std::int32_t>();
  constexpr const char* kHint = "(is the schedule from other lengths?)";
  check_num_splits(s);

  std::int64_t req = 0, block = 0, split = 0;  // the next part has to start here
  for (std::int64_t p = 0; p < s.parts.size(0); ++p) {
    const DecodePart part = schedule_part(s, p);
    if (part.begin_req >= batch || part.begin_req > part.end_req) {
      continue;  // no work
    }
    if (part.begin_req != req || part.begin_block != block || part.begin_split != split) {
      invalid("schedule.parts[{}] starts at request {} block {} split {}, expected {} {} {} {}", p,
              part.begin_req, part.begin_block, part.begin_split, req, block, split, kHint);
    }
    if (part.end_req >= batch) {
      invalid("schedule.parts[{}] ends with request {}, expected below b = {} {}", p, part.end_req, batch,
              kHint);
    }
    const auto check_blocks = [&](bool ok, std::int64_t r, std::int64_t begin, std::int64_t end) {
      if (ok) return;
      invalid("schedule.parts[{}] covers blocks {} to {} of request {}, which has {} {}", p, begin, end, r,
              schedule_blocks(lengths[r], s.block_size), kHint);
    };
    // The walk stops at a request's end whatever the row says.
    check_blocks(
        part.end_block <= std::max<std::int64_t>(schedule_blocks(lengths[part.end_req], s.block_size), 1),
        part.end_req, part.end_req == part.begin_req ? part.begin_block : 0, part.end_block);
    const auto walk = walk_part(part, lengths, num_splits, s.block_size, s.fixed_split_blocks);
    for (auto item = walk.first(); walk.holds(item); item = walk.next(item)) {
      const bool complete = item.end_block >= schedule_blocks(item.length, s.block_size);
      check_blocks(item.end_block > item.begin_block || (item.end_block == item.begin_block && complete),
                   item.req, item.begin_block, item.end_block);
      if (!complete && s.fixed_split_blocks > 0 && item.end_block % s.fixed_split_blocks != 0) {
        invalid("schedule.parts[{}] cuts request {} at block {}, expected a multiple of {}", p, item.req,
                item.end_block, s.fixed_split_blocks);
      }
      ++split;
      if (complete && num_splits[item.req + 1] - num_splits[item.req] != split) {
        invalid("schedule.num_splits gives request {} {} splits, expected {} {}", item.req,
                num_splits[item.req + 1] - num_splits[item.req], split, kHint);
      }
      req = complete ? item.req + 1 : item.req;
      block = complete ? 0 : item.end_block;
      if (complete) split = 0;
    }
  }
  if (req != batch || block != 0) {
    invalid("schedule.parts ends at request {} block {}, expected all {} requests covered {}", req, block,
            batch, kHint);
  }
}

}  // namespace flash_mla::api
