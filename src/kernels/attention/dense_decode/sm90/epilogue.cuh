#pragma once

// What a consumer warpgroup does with a finished item: rows to `out` and `lse`, from the registers or, in
// clusters, through slot 1 and the copy engine; a split's share to the workspace, for the combine kernel.

#include <cstdint>

#include "kernels/attention/dense_decode/sm90/smem.cuh"
#include "kernels/attention/dense_decode/sm90/work.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90 {

/// Of consumer warpgroup `wg`, which owns columns kWg * 256 to + 255 of O; `sum` is that of the weights, per
/// row, relative to wg.reference.
template <class Consumer>
struct Epilogue {
  static constexpr bool kBf16 = Consumer::kIsBf16;
  static constexpr int kWg = Consumer::kWarpgroup;
  Consumer& wg;

  __device__ void finish(const Item& item, const float (&o)[128], const float (&sum)[2]) const {
    if (item.is_split) {
      store_partial(item, o, sum);
    } else if (is_staged<Consumer::kCtas>(wg.p, item)) {
      stage(item, o, sum);
    } else {
      store(item, o, sum);
    }
  }

  // This thread's first row, in a form the compiler knows nothing about: it would compute an item's addresses
  // ahead of all tiles and keep them in registers that the tiles need.
  __device__ int epilogue_row() const {
    int r = wg.row;
    asm volatile("" : "+r"(r));
    return r;
  }

  // Where row r of this CTA's block goes; false if it is padding.
  __device__ bool locate(int r, int& token, int& head) const {
    const RowPlace place = place_of(wg.p.blocks, static_cast<int>(blockIdx.x), r);
    token = place.token;
    head = static_cast<int>(blockIdx.y) * wg.p.group + place.head;
    return r < wg.p.blocks.tokens * wg.p.blocks.heads && token < wg.p.s_q && place.head < wg.p.group;
  }
  // This CTA's row block among those of a partial result's slot.
  __device__ std::int64_t partial_block(const Item& item) const {
    const int blocks = wg.p.blocks.count();
    return (static_cast<std::int64_t>(item.slot) * gridDim.y + blockIdx.y) * blocks + blockIdx.x;
  }
  __device__ std::uint16_t* out_row(const Item& item, int token, int head) const {
    return static_cast<std::uint16_t*>(wg.p.out) + item.req * wg.p.out_stride_b + token * wg.p.out_stride_s +
           head * wg.p.out_stride_h;
  }
  __device__ void store_lse(const Item& item, int token, int head, float lse) const {
    // WG1: WG0 is the one that the next item waits for.
    if (kWg != 1 || wg.lane % 4 != 0 || wg.p.lse == nullptr) return;
    wg.p.lse[item.req * wg.p.lse_stride_b + head * wg.p.lse_stride_h + token * wg.p.lse_stride_s] = lse;
  }

  // A split's result as it stands in the registers: 512 contiguous bytes per warp and instruction, and as
  // little code as possible, for a small batch runs it once from a cold instruction cache.
  __device__ void store_partial(const Item& item, const float (&o)[128], const float (&sum)[2]) const {
    const int groups = row_groups(wg.p.blocks);
    if (wg.warp >= groups) return;
    const std::int64_t block = partial_block(item);
    store_stats(block, sum);
    float4* to = reinterpret_cast<float4*>(wg.p.partial_out) +
                 ((block * groups + wg.warp) * 2 + kWg) * kFragment + wg.lane;
#pragma unroll
    for (int i = 0; i < 32; ++i) to[i * 32] = float4{o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]};
  }
  __device__ void store_stats(std::int64_t block, const float (&sum)[2]) const {
    if (kWg != 0 || wg.lane % 4 != 0) return;
    float2* stats =
        reinterpret_cast<float2*>(wg.p.partial_stats) + block * row_groups(wg.p.blocks) * 16 + wg.row;
    stats[0] = float2{wg.reference[0], sum[0]};
    stats[8] = float2{wg.reference[1], sum[1]};
  }

  // What a row's O has to be multiplied with. Stores its lse.
  __device__ float finish_row(const Item& item, int h, float sum) const {
    const int r = epilogue_row() + 8 * h;
    // A row that saw no key gives 0 and lse = +inf. One whose every score is -inf gives NaN, as NaN scores
    // do.
    const bool none = sum == 0.0f, unseen = none && limit_of(wg.p, item, r) <= 0;
    int token, head;
    if (locate(r, token, head)) {
      store_lse(item, token, head,
                unseen ? INFINITY
                : none ? NAN
                       : (wg.reference[h] + log2_fast(sum)) * 0.69314718056f);
    }
    return unseen ? 0.0f : none ? NAN : 1.0f / sum;
  }

  // Writes this warpgroup's half of O and, from WG1, the lse.
  __device__ void store(const Item& item, const float (&o)[128], const float (&sum)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = finish_row(item, h, sum[h]);
      int token, head;
      const bool valid = locate(epilogue_row() + 8 * h, token, head);
      std::uint16_t* to = out_row(item, token, head) + kWg * 256 + wg.lane % 4 * 8;
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

  // Puts this warpgroup's half of O into slot 1, for a producer to copy out; the lse, from WG1, is stored
  // here.
  __device__ void stage(const Item& item, const float (&o)[128], const float (&sum)[2]) const {
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) factor[h] = finish_row(item, h, sum[h]);
    const int first = epilogue_row(),
              r = first / 16 * 16 + wg.lane % 16;  // row whose address this lane gives
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

  // A request without keys.
  __device__ void store_empty(const Item& item) const {
    if (item.is_split) {
      wg.reference[0] = wg.reference[1] = -INFINITY;
      if (wg.warp < row_groups(wg.p.blocks)) store_stats(partial_block(item), {0.0f, 0.0f});
      return;
    }
    for (int h = 0; h < 2; ++h) {
      int token, head;
      if (!locate(epilogue_row() + 8 * h, token, head)) continue;
      store_lse(item, token, head, INFINITY);
      std::uint16_t* to = out_row(item, token, head) + kWg * 256 + wg.lane % 4 * 64;
      for (int i = 0; i < 64; i += 8) *reinterpret_cast<uint4*>(to + i) = uint4{0, 0, 0, 0};
    }
  }
};

}  // namespace flash_mla::sm90
