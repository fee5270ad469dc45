#pragma once

// What the combine kernel (attention/dense_decode/sm90/combine.cuh) does to the partial results of split requests, in
// float64.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda_stand_in.h"
#include "kernels/attention/dense_decode/sm90/params.h"

namespace emulated {

/// Of row `row` of a block, split by split: where its partial results are.
struct PartialRow {
  const flash_mla::sm90::DecodeParams& p;
  int req, block, row;

  std::int64_t slot(int split) const {
    const std::int64_t before = p.num_splits[req];
    if (p.split_tiles > 0) return before + split;
    return before - req + (split == 0 ? p.num_parts : split - 1);
  }
  std::int64_t of(int split) const {
    return (slot(split) * p.blocks.count() + block) * flash_mla::sm90::row_groups(p.blocks);
  }
  const float* stats(int split) const { return p.partial_stats + 2 * (of(split) * 16 + row); }
  float out(int split, int column) const {
    const int wg = column / 256, group = column % 256 / 8, lane = row % 8 * 4 + column % 8 / 2;
    const std::int64_t at =
        ((of(split) + row / 16) * 2 + wg) * flash_mla::sm90::kFragment + group * 32 + lane;
    return p.partial_out[4 * at + row % 16 / 8 * 2 + column % 2];
  }
};

/// `sink`: of each head, or null.
inline void combine(const flash_mla::sm90::DecodeParams& p, int batch, bool bf16,
                    const float* sink = nullptr) {
  using namespace flash_mla::sm90;
  for (int req = 0; req < batch; ++req) {
    const int splits = p.num_splits[req + 1] - p.num_splits[req];
    if (splits <= 1) continue;
    for (int block = 0; block < p.blocks.count(); ++block) {
      for (int row = 0; row < p.blocks.tokens * p.blocks.heads; ++row) {
        const RowPlace place = place_of(p.blocks, block, row);
        if (place.token >= p.s_q || place.head >= p.group) continue;
        const PartialRow partial{p, req, block, row};
        double most = -INFINITY, whole = 0;
        std::vector<double> sum(512);
        for (int i = 0; i < splits; ++i) most = std::max(most, double{partial.stats(i)[0]});
        for (int i = 0; i < splits; ++i) {
          const float reference = partial.stats(i)[0], weights = partial.stats(i)[1];
          if (weights == 0.0f) continue;
          const double w = most == -INFINITY ? 0 : std::exp2(reference - most);
          whole += w * weights;
          for (int c = 0; c < 512; ++c) sum[static_cast<std::size_t>(c)] += w * partial.out(i, c);
        }
        const double below =
            sink == nullptr ? whole : whole + std::exp2(double{sink[place.head]} * 1.4426950408889634 - most);
        auto* const to = static_cast<std::uint16_t*>(p.out) + req * p.out_stride_b +
                         place.token * p.out_stride_s + place.head * p.out_stride_h;
        for (int c = 0; c < 512; ++c) {
          const auto x = static_cast<float>(whole == 0 ? 0 : sum[static_cast<std::size_t>(c)] / below);
          to[c] = bf16 ? to_bf16(x).bits : to_half(x).bits;
        }
        p.lse[req * p.lse_stride_b + place.head * p.lse_stride_h + place.token * p.lse_stride_s] =
            whole == 0 ? INFINITY : static_cast<float>((most + std::log2(whole)) * 0.6931471805599453);
      }
    }
  }
}

}  // namespace emulated
