#pragma once

// What a consumer warpgroup does with a finished item: rows to `out`, through slot 1 and the copy engine or, where slot 1
// was not used, from the registers; their statistics to `max_logits` and `lse`.

#include <cstdint>

#include "kernels/attention/sparse_prefill/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::sparse_prefill {

/// Of consumer warpgroup `wg`, which owns columns kWg * 256 to + 255 of O; `sum` is that of the weights, per row,
/// relative to wg.reference.
template <class Consumer>
struct Epilogue {
  static constexpr bool kBf16 = Consumer::kIsBf16;
  static constexpr int kWg = Consumer::kWarpgroup;
  static constexpr float kLog2e = 1.44269504089f, kLn2 = 0.69314718056f;
  Consumer& wg;
  const Item item;

  // This thread's first row, in a form the compiler knows nothing about: it would compute an item's addresses ahead of
  // all tiles and keep them in registers that the tiles need.
  __device__ int epilogue_row() const {
    int r = wg.row;
    asm volatile("" : "+r"(r));
    return r;
  }
  // Head of row r of this CTA; false if it is padding.
  __device__ bool locate(int r, int& head) const {
    head = item.head_block * kTileRows + r;
    return head < wg.p.h_q;
  }
  // WG1 stores them: WG0 is the one that the next item waits for.
  __device__ void store_statistics(int head, float max_logit, float lse) const {
    if (kWg != 1 || wg.lane % 4 != 0) return;
    const auto& p = wg.p;
    if (p.lse != nullptr) p.lse[item.token * p.lse_stride_n + head * p.lse_stride_h] = lse;
    if (p.max_logits != nullptr)
      p.max_logits[item.token * p.max_logits_stride_n + head * p.max_logits_stride_h] = max_logit;
  }
  // What a row's O has to be multiplied with. Stores its statistics, which know nothing of the sink.
  __device__ float finish_row(int h, float sum) const {
    int head;
    const bool valid = locate(epilogue_row() + 8 * h, head), none = sum == 0.0f;
    if (valid) {
      store_statistics(head, wg.highest_seen[h] * kLn2,
                       none ? INFINITY : (wg.reference[h] + log2_fast(sum)) * kLn2);
    }
    if (none) return 0.0f;
    if (valid && wg.p.attn_sink != nullptr) sum += exp2f(wg.p.attn_sink[head] * kLog2e - wg.reference[h]);
    return 1.0f / sum;
  }
  __device__ std::uint16_t* out_row(int head) const {
    return static_cast<std::uint16_t*>(wg.p.out) + item.token * wg.p.out_stride_n + head * wg.p.out_stride_h;
  }

  // Puts this warpgroup's half of O into slot 1, for a producer to copy out.
  __device__ void stage(const float (&o)[128], const float (&sum)[2]) const {
    const float factor[2] = {finish_row(0, sum[0]), finish_row(1, sum[1])};
    const int r = epilogue_row() / 16 * 16 + wg.lane % 16;  // row whose address this lane gives
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const std::uint32_t chunk = ptx::smem_address(wg.s.values(1, kWg).at(c));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = &o[32 * c + 8 * i];
        stmatrix_x4(ptx::swizzled_word(chunk, r, 2 * i + wg.lane / 16),
                    pack2<kBf16>(x[0] * factor[0], x[1] * factor[0]),
                    pack2<kBf16>(x[2] * factor[1], x[3] * factor[1]),
                    pack2<kBf16>(x[4] * factor[0], x[5] * factor[0]),
                    pack2<kBf16>(x[6] * factor[1], x[7] * factor[1]));
      }
    }
    ptx::fence_async_proxy();
    __syncwarp();
    if (wg.lane == 0) ptx::mbarrier_arrive(&wg.s.out_full[kWg]);
  }

  __device__ void store(const float (&o)[128], const float (&sum)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = finish_row(h, sum[h]);
      int head;
      const bool valid = locate(epilogue_row() + 8 * h, head);
      std::uint16_t* to = out_row(head) + kWg * 256 + wg.lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        std::uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          x[j] = pack2<kBf16>(o[4 * (i + j) + 2 * h] * factor, o[4 * (i + j) + 2 * h + 1] * factor);
        }
        quad_transpose(x);
        if (valid) *reinterpret_cast<uint4*>(to + i * 8) = uint4{x[0], x[1], x[2], x[3]};
      }
    }
  }

  // A list without entries.
  __device__ void store_empty() const {
    for (int h = 0; h < 2; ++h) {
      int head;
      if (!locate(epilogue_row() + 8 * h, head)) continue;
      store_statistics(head, -INFINITY, INFINITY);
      std::uint16_t* to = out_row(head) + kWg * 256 + wg.lane % 4 * 64;
      for (int i = 0; i < 64; i += 8) *reinterpret_cast<uint4*>(to + i) = uint4{0, 0, 0, 0};
    }
  }
};

}  // namespace flash_mla::sm90::sparse_prefill
