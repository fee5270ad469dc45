#include "kernels/attention/gqa/cpu/rows.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <utility>

#include "kernels/attention/dense_decode/cpu/isa.h"

namespace flash_mla::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = std::numbers::log2e_v<float>;

int round_up(int x, int to) { return (x + to - 1) / to * to; }

/// Where a thread's memory has what, in bytes.
struct Layout {
  std::size_t q, kv, scores, p, out, row_max, row_sum, alpha, limit, keys, next_keys, values, next_values,
      q_rows, bytes = 0;

  Layout(const gqa::Problem& problem, const TileKernel& k) {
    const auto rows = static_cast<std::size_t>(round_up(kMaxRows, k.row_lanes));
    const auto tokens = static_cast<std::size_t>(k.tile_tokens),
               element = static_cast<std::size_t>(k.element_bytes);
    const auto width = [&](int d) { return static_cast<std::size_t>(round_up(d, k.panel)); };
    const auto take = [this](std::size_t n) { return std::exchange(bytes, bytes + (n + 63) / 64 * 64); };
    q = take(rows * width(problem.d_qk) * element);
    kv = take(tokens * std::max(width(problem.d_qk), width(problem.d_v)) * element);
    scores = take(tokens * rows * sizeof(float));
    p = take(tokens * rows * element);
    out = take(rows * width(problem.d_v) * sizeof(float));
    row_max = take(rows * sizeof(float));
    row_sum = take(rows * sizeof(float));
    alpha = take(rows * sizeof(float));
    limit = take(rows * sizeof(std::int32_t));
    keys = take(tokens * sizeof(void*));
    next_keys = take(2 * tokens * sizeof(void*));
    values = take(tokens * sizeof(void*));
    next_values = take(tokens * sizeof(void*));
    q_rows = take(rows * sizeof(void*));
  }
};

}  // namespace

std::size_t GqaRows::bytes(const GqaCall& call) {
  return Layout(call.problem, select_tile_kernel(call.dtype, call.problem.d_qk)).bytes;
}

GqaRows::GqaRows(const GqaCall& call, std::byte* memory)
    : p_(call.problem),
      kernel_(select_tile_kernel(call.dtype, call.problem.d_qk)),
      adjusts_(p_.soft_cap > 0 || p_.slopes != nullptr || p_.mask != nullptr ||
               p_.window_left < std::int64_t{1} << 40) {
  const Layout at(p_, kernel_);
  const auto rows_of = [&](std::size_t offset) { return reinterpret_cast<const void**>(memory + offset); };
  scratch_.q = memory + at.q;
  scratch_.kv = memory + at.kv;
  scratch_.scores = reinterpret_cast<float*>(memory + at.scores);
  scratch_.p = memory + at.p;
  scratch_.out = reinterpret_cast<float*>(memory + at.out);
  scratch_.row_max = reinterpret_cast<float*>(memory + at.row_max);
  scratch_.row_sum = reinterpret_cast<float*>(memory + at.row_sum);
  scratch_.alpha = reinterpret_cast<float*>(memory + at.alpha);
  scratch_.limit = reinterpret_cast<std::int32_t*>(memory + at.limit);
  scratch_.keys = rows_of(at.keys);
  scratch_.next_keys = rows_of(at.next_keys);
  scratch_.values = rows_of(at.values);
  next_values_ = rows_of(at.next_values);
  q_rows_ = rows_of(at.q_rows);
  scratch_.adjust = adjusts_ ? &GqaRows::adjust : nullptr;
  scratch_.adjust_context = this;
  tile_.dtype = call.dtype;
  tile_.d_qk = p_.d_qk;
  tile_.d_v = p_.d_v;
  tile_.scale_log2 = adjusts_ ? 1.0f : p_.scale * kLog2e;
}

int GqaRows::locate(std::int64_t key, std::int64_t end, const void** keys, const void** values) const {
  const int count = static_cast<int>(std::clamp<std::int64_t>(end - key, 0, kernel_.tile_tokens));
  const auto element = static_cast<std::int64_t>(dtype_size(tile_.dtype));
  const auto row = [&](const void* data, const gqa::Strides& s, const gqa::Place& at) {
    return static_cast<const std::byte*>(data) +
           (at.page * s.page + at.offset * s.token + block_.head * s.head) * element;
  };
  for (int i = 0; i < count;) {
    const gqa::Place at = p_.place(block_.req, static_cast<std::int32_t>(key + i));
    const std::byte *k = row(p_.k, p_.k_strides, at), *v = row(p_.v, p_.v_strides, at);
    for (std::int64_t left = p_.page_size - at.offset; left > 0 && i < count; --left, ++i) {
      keys[i] = k;
      values[i] = v;
      k += p_.k_strides.token * element;
      v += p_.v_strides.token * element;
    }
  }
  return count;
}

void GqaRows::set_limits(std::int64_t key, int count) {
  for (int r = 0; r < tile_.rows_padded; ++r) {
    const std::int64_t end = visible(std::min(r, block_.rows - 1)).end;
    scratch_.limit[r] = static_cast<std::int32_t>(std::clamp<std::int64_t>(end - key, 0, count));
  }
}

void GqaRows::attend(const RowBlock& block, std::int64_t begin, std::int64_t end) {
  block_ = block;
  empty_ = true;
  // Later queries see later keys.
  begin = std::max(begin, visible(0).begin);
  end = std::min(end, visible(block.rows - 1).end);
  if (begin >= end) return;
  tile_.rows = block.rows;
  tile_.rows_padded = round_up(block.rows, kernel_.row_lanes);
  const auto element = static_cast<std::int64_t>(dtype_size(tile_.dtype));
  for (int r = 0; r < block.rows; ++r) {
    const std::int64_t i = (block.first_row + r) / p_.group, g = (block.first_row + r) % p_.group;
    q_rows_[r] = static_cast<const std::byte*>(p_.q) + ((p_.first_query(block.req) + i) * p_.q_strides.token +
                                                        (block.head * p_.group + g) * p_.q_strides.head) *
                                                           element;
  }
  kernel_.pack_q(tile_, q_rows_, scratch_);
  int next = locate(begin, end, scratch_.next_keys, next_values_);
  for (key_ = begin; key_ < end; key_ += kernel_.tile_tokens) {
    const int count = next;
    std::copy_n(scratch_.next_keys, count, scratch_.keys);
    std::swap(scratch_.values, next_values_);
    next = locate(key_ + count, end, scratch_.next_keys, next_values_);
    std::copy_n(next_values_, next, scratch_.next_keys + next);  // to prefetch
    scratch_.next_count = 2 * next;
    const bool masked = visible(0).end < key_ + count;
    if (masked || empty_) set_limits(key_, count);
    kernel_.attend(tile_, scratch_, count, empty_, masked);
    empty_ = false;
  }
}

float GqaRows::log_sum(int row) const {
  const float sum = empty_ ? 0.0f : scratch_.row_sum[row];
  return sum == 0 ? -kInfinity : scratch_.row_max[row] + std::log2(sum);
}

void GqaRows::store_row(int row, float factor, DType dtype, void* to) const {
  if (log_sum(row) == -kInfinity) {
    std::memset(to, 0, static_cast<std::size_t>(p_.d_v) * dtype_size(dtype));  // O may hold anything
    return;
  }
  kernel_.store_row(tile_, scratch_, row, factor / scratch_.row_sum[row], dtype, to);
}

void GqaRows::adjust(const void* context, const TileProblem& tile, const TileScratch& scratch, int count) {
  const auto& self = *static_cast<const GqaRows*>(context);
  for (int r = 0; r < tile.rows; ++r) self.adjust_row(r, scratch.scores + r, tile.rows_padded, count);
}

// Scores of a row lie `stride` apart.
void GqaRows::adjust_row(int row, float* scores, int stride, int count) const {
  const std::int64_t i = (block_.first_row + row) / p_.group, g = (block_.first_row + row) % p_.group;
  const std::int64_t m = p_.keys(block_.req), position = m - p_.queries(block_.req) + i;
  const gqa::Range seen = visible(row);
  const float slope = p_.slopes != nullptr ? p_.slopes[block_.head * p_.group + g] : 0.0f;
  for (int t = 0; t < count; ++t) {
    const std::int64_t key = key_ + t;
    float& x = scores[static_cast<std::ptrdiff_t>(t) * stride];
    if (key < seen.begin || key >= seen.end || !p_.unmasked(block_.req, i, key, m)) {
      x = -kInfinity;
      continue;
    }
    x *= p_.scale;
    if (p_.soft_cap > 0) x = p_.soft_cap * std::tanh(x / p_.soft_cap);
    x = (x - slope * static_cast<float>(std::abs(key - position))) * kLog2e;
  }
}

}  // namespace flash_mla::cpu
