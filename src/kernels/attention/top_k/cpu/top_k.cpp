#include "kernels/attention/top_k/cpu/top_k.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "base/parallel.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/top_k/places.h"

namespace flash_mla::cpu {

void top_k_row(const float* scores, std::int64_t n, std::int64_t k, std::int32_t* out) {
  if (n <= k) {
    std::iota(out, out + n, 0);
    std::fill(out + n, out + k, -1);
    return;
  }
  std::array<std::int32_t, kMaxTopK + kSelectSlack> selected;
  select_row(scores, n, k, selected.data());
  std::copy_n(selected.data(), k, out);
}

void top_k(const TopKArgs& args, int num_threads) {
  const std::int64_t k = args.indices.size(1);
  const selection::Places places(args.output, args.logits.size(0));
  parallel_for(args.logits.size(0), is_forked_child() ? 1 : num_threads, [&](std::int64_t row) {
    const std::int64_t start = args.row_starts.defined() ? args.row_starts.ptr<const std::int32_t>()[row] : 0;
    const std::int64_t n = args.lengths.ptr<const std::int32_t>()[row];
    auto* out = args.indices.ptr<std::int32_t>() + row * args.indices.stride(0);
    top_k_row(args.logits.ptr<const float>() + row * args.logits.stride(0) + start, n, k, out);
    places.translate(row, out, std::min(n, k));
  });
}

void top_k_rows(const ScoreRows& rows, std::int64_t n, const TopKOutput& output, const TensorView& indices,
                int num_threads) {
  const std::int64_t k = indices.size(1);
  const selection::Places places(output, rows.num_rows);
  parallel_for(n, is_forked_child() ? 1 : num_threads, [&](std::int64_t i) {
    const std::int64_t length = rows.lengths[i], row = rows.first + i;
    auto* out = indices.ptr<std::int32_t>() + row * indices.stride(0);
    top_k_row(rows.scores + i * rows.stride, length, k, out);
    places.translate(row, out, std::min(length, k));
  });
}

}  // namespace flash_mla::cpu
