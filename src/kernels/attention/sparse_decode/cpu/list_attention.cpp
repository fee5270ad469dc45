#include "kernels/attention/sparse_decode/cpu/list_attention.h"

#include "base/element.h"
#include "kernels/attention/dense_decode/cpu/isa.h"
#include "kernels/cache/cpu/dequantise.h"

namespace flash_mla::cpu {
namespace {

constexpr std::size_t kAlignment = 64;

std::size_t align_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
int round_up(int x, int to) { return (x + to - 1) / to * to; }

const TileKernel& kernel_of(const ListProblem& problem) {
  return select_tile_kernel(problem.dtype, problem.d_qk);
}

/// Scratch memory as offsets.
struct Layout {
  std::size_t q, kv, scores, p, out, row_max, row_sum, alpha, limit, keys, next_keys, current, next, rows,
      wide_q, wide_rows, bytes = 0;

  explicit Layout(const ListProblem& problem) {
    const TileKernel& k = kernel_of(problem);
    const auto rows_padded = static_cast<std::size_t>(round_up(problem.block_rows, k.row_lanes));
    const auto d_qk = static_cast<std::size_t>(round_up(problem.d_qk, k.panel));
    const auto d_v = static_cast<std::size_t>(round_up(problem.d_v, k.panel));
    const auto tokens = static_cast<std::size_t>(k.tile_tokens);
    const auto element = static_cast<std::size_t>(k.element_bytes);
    const bool wide = works_in_fp32(problem);
    q = take(rows_padded * d_qk * element);
    kv = take(tokens * d_qk * element);
    scores = take(tokens * rows_padded * sizeof(float));
    p = take(tokens * rows_padded * element);
    out = take(rows_padded * d_v * sizeof(float));
    row_max = take(rows_padded * sizeof(float));
    row_sum = take(rows_padded * sizeof(float));
    alpha = take(rows_padded * sizeof(float));
    limit = take(rows_padded * sizeof(std::int32_t));
    keys = take(tokens * sizeof(void*));
    next_keys = take(tokens * sizeof(void*));
    current = take(tokens * sizeof(SelectedKey));
    next = take(tokens * sizeof(SelectedKey));
    // In fp32 the dequantised keys are where the kernel would copy them to.
    rows = problem.any_fp8 && !wide ? take(tokens * d_qk * element) : kv;
    wide_q = wide ? take(rows_padded * d_qk * sizeof(float)) : bytes;
    wide_rows = wide ? take(rows_padded * sizeof(void*)) : bytes;
  }

 private:
  std::size_t take(std::size_t n) {
    const std::size_t at = bytes;
    bytes += align_up(n);
    return at;
  }
};

}  // namespace

bool works_in_fp32(const ListProblem& problem) {
  return problem.any_fp8 && kernel_of(problem).element_bytes == 4;
}

std::size_t ListAttention::scratch_bytes(const ListProblem& problem) { return Layout(problem).bytes; }

ListAttention::ListAttention(const ListProblem& problem, std::byte* scratch)
    : problem_(problem), kernel_(kernel_of(problem)) {
  const Layout at(problem);
  tile_scratch_.q = scratch + at.q;
  tile_scratch_.kv = scratch + at.kv;
  tile_scratch_.scores = reinterpret_cast<float*>(scratch + at.scores);
  tile_scratch_.p = scratch + at.p;
  tile_scratch_.out = reinterpret_cast<float*>(scratch + at.out);
  tile_scratch_.row_max = reinterpret_cast<float*>(scratch + at.row_max);
  tile_scratch_.row_sum = reinterpret_cast<float*>(scratch + at.row_sum);
  tile_scratch_.alpha = reinterpret_cast<float*>(scratch + at.alpha);
  tile_scratch_.limit = reinterpret_cast<std::int32_t*>(scratch + at.limit);
  tile_scratch_.keys = reinterpret_cast<const void**>(scratch + at.keys);
  tile_scratch_.next_keys = reinterpret_cast<const void**>(scratch + at.next_keys);
  current_ = reinterpret_cast<SelectedKey*>(scratch + at.current);
  next_ = reinterpret_cast<SelectedKey*>(scratch + at.next);
  rows_ = scratch + at.rows;
  wide_q_ = reinterpret_cast<float*>(scratch + at.wide_q);
  wide_rows_ = reinterpret_cast<const void**>(scratch + at.wide_rows);
  const int rows_padded = round_up(problem.block_rows, kernel_.row_lanes);
  std::fill_n(tile_scratch_.limit, rows_padded, kernel_.tile_tokens);
  tile_.dtype = works_in_fp32(problem) ? DType::kFloat32 : problem.dtype;
  tile_.d_qk = problem.d_qk;
  tile_.d_v = problem.d_v;
  tile_.scale_log2 = problem.softmax_scale * std::numbers::log2e_v<float>;
}

void ListAttention::begin(const void* const* q_rows, int rows) {
  tile_.rows = rows;
  tile_.rows_padded = round_up(rows, kernel_.row_lanes);
  if (tile_.dtype == problem_.dtype) return kernel_.pack_q(tile_, q_rows, tile_scratch_);
  visit_float_type(problem_.dtype, [&](auto element) {
    for (int r = 0; r < rows; ++r) {
      const auto* from = static_cast<const decltype(element)*>(q_rows[r]);
      float* to = wide_q_ + static_cast<std::ptrdiff_t>(r) * problem_.d_qk;
      for (int d = 0; d < problem_.d_qk; ++d) to[d] = static_cast<float>(to_float(from[d]));
      wide_rows_[r] = to;
    }
  });
  kernel_.pack_q(tile_, wide_rows_, tile_scratch_);
}

void ListAttention::attend_tile(int count, int next_count, bool first) {
  const bool wide = tile_.dtype != problem_.dtype;
  const std::ptrdiff_t row_bytes = static_cast<std::ptrdiff_t>(problem_.d_qk) * (wide ? 4 : 2);
  for (int i = 0; i < count; ++i) {
    const SelectedKey& key = current_[i];
    std::byte* row = rows_ + i * row_bytes;
    if (wide) {
      dequantise(*key.pool, key.token, reinterpret_cast<float*>(row));
    } else if (kv::is_fp8(key.pool->format)) {
      dequantise_avx512_bf16(*key.pool, key.token, reinterpret_cast<Bf16*>(row));
    } else {
      row = key.token.latent;
    }
    tile_scratch_.keys[i] = row;
  }
  int prefetch_bytes = 0;
  for (int i = 0; i < next_count; ++i) {
    tile_scratch_.next_keys[i] = next_[i].token.latent;
    prefetch_bytes = std::max(prefetch_bytes, kv::token_bytes(next_[i].pool->format, problem_.d_qk));
    // A line of its own in this format, and too small a part of the row to be worth a place in the kernel's
    // list.
    if (next_[i].pool->format == KvFormat::kFp8V4) __builtin_prefetch(next_[i].token.scales, 0, 2);
  }
  tile_scratch_.next_count = next_count;
  tile_.key_bytes = prefetch_bytes;
  kernel_.attend(tile_, tile_scratch_, count, first, /*masked=*/false);
}

}  // namespace flash_mla::cpu
