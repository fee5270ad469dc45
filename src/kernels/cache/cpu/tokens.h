#pragma once

// What append and gather share: their tokens, in pieces for the threads.

#include <algorithm>
#include <cstdint>

#include "flash_mla/tensor.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/sparse_decode/cpu/team.h"

namespace flash_mla::cpu {

/// Element i of a contiguous int64 or int32 tensor.
inline std::int64_t integer(const TensorView& t, std::int64_t i) {
  return t.dtype == DType::kInt64 ? t.ptr<const std::int64_t>()[i] : t.ptr<const std::int32_t>()[i];
}

/// f(i) for every token i.
template <class F>
void for_each_token(std::int64_t n, int num_threads, const F& f) {
  constexpr std::int64_t kPiece = 32;  // about 10 us: fewer are not worth waking a second thread for
  const std::int64_t pieces = (n + kPiece - 1) / kPiece;
  const int wanted = num_threads > 0 ? num_threads : default_num_threads();
  const int threads = is_forked_child() ? 1 : static_cast<int>(std::min<std::int64_t>(wanted, pieces));
  run_team(
      threads, pieces,
      [&](int, std::int64_t piece) {
        for (std::int64_t i = piece * kPiece; i < std::min((piece + 1) * kPiece, n); ++i) f(i);
      },
      0, [](int, std::int64_t) {});
}

}  // namespace flash_mla::cpu
