#pragma once

// Combines the partial results of split requests: out = sum_i O_i 2^(m_i - m) / sum_i l_i 2^(m_i - m), with
// m_i the reference and l_i the sum of a row's split i, m the largest m_i.
//
// Grid (row blocks x groups of 16 rows x 2 halves of the columns x column chunks, requests or parts,
// whichever is fewer; with fixed split points, requests). By request, a block looks for the part in which its
// request begins, unless split points are fixed and the slots follow from num_splits; by part, for the split
// request that begins in its part (at most one does). A warp takes kSteps of the 32 groups of 8 columns, in
// the layout in which the consumers left them in their registers (kFragment): one load of 16 bytes per lane,
// split and step. kSteps is 1 where few requests are cut into many splits, 4 where many requests are cut in
// two.
//
// Registers and shared memory are few: a block fits beside a decode CTA's last moments.

#include <cstdint>

#include "sm90/decode/kernel.cuh"

namespace flash_mla::sm90 {

inline constexpr int kCombineWarps = 8;

/// Blocks along x.
template <int kSteps>
constexpr int combine_blocks(const RowBlocks& blocks, int h_kv) {
  return blocks.count() * h_kv * row_groups(blocks) * 2 * (32 / (kCombineWarps * kSteps));
}

/// Which slots hold a request's partial results.
struct SplitSlots {
  int splits = 0;  // 0: nothing to combine
  int first = 0, base = 0, step = 0;
  __device__ int at(int i) const { return i == 0 ? first : base + i * step; }
};

__device__ __forceinline__ SplitSlots split_slots(const DecodeParams& p, int& req) {
  SplitSlots slots;
  int owner = static_cast<int>(blockIdx.y);  // the part in which the request begins
  if (p.split_tiles == 0 && p.batch > p.num_parts) {
    const int4 part = part_of(p, owner);
    req = part.y;
    if (part.x >= p.batch || part.x > req || (part.x == req && part.z > 0)) return slots;
  } else {
    req = static_cast<int>(blockIdx.y);
  }
  const int before = p.num_splits[req], splits = p.num_splits[req + 1] - before;
  if (splits <= 1) return slots;
  slots.splits = splits;
  if (p.split_tiles > 0) {
    slots.first = slots.base = before;
    slots.step = 1;
    return slots;
  }
  if (p.batch <= p.num_parts) {
    // The last part that begins at or before the request's first block.
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int found = -1;
    for (int i = lane; i < p.num_parts; i += 32) {
      const int4 part = part_of(p, i);
      if (part.x <= req && req <= part.y && (part.x < req || part.z == 0)) found = i;
    }
    owner = __reduce_max_sync(0xFFFFFFFFu, found);
  }
  slots.first = 2 * owner + (part_of(p, owner).x != req ? 1 : 0);
  slots.base = 2 * owner;
  slots.step = 2;
  return slots;
}

template <bool kBf16, int kSteps>
__global__ void __launch_bounds__(kCombineWarps * 32) combine_kernel(const DecodeParams p, int h_kv) {
  constexpr int kColumnChunks = 32 / (kCombineWarps * kSteps);
  ptx::grid_dependency_wait();
  int req;
  const SplitSlots slots = split_slots(p, req);
  if (slots.splits == 0) return;

  int x = static_cast<int>(blockIdx.x);
  const int chunk = x % kColumnChunks;
  x /= kColumnChunks;
  const int wg = x % 2;
  x /= 2;
  const int groups = row_groups(p.blocks), group = x % groups;
  const int block = x / groups;  // (latent head, row block)
  const int blocks = p.blocks.count() * h_kv;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;

  // Two lanes per row walk the statistics; then each lane picks up its two rows.
  const auto* stats = reinterpret_cast<const float2*>(p.partial_stats) + block * kTileRows + group * 16;
  const std::int64_t stats_stride = static_cast<std::int64_t>(blocks) * kTileRows;
  float m = -INFINITY;
#pragma unroll 4
  for (int i = lane % 2; i < slots.splits; i += 2)
    m = fmaxf(m, stats[slots.at(i) * stats_stride + lane / 2].x);
  m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 1));
  const float base = m == -INFINITY ? 0.0f : m;
  float l = 0.0f;
#pragma unroll 4
  for (int i = lane % 2; i < slots.splits; i += 2) {
    const float2 s = stats[slots.at(i) * stats_stride + lane / 2];
    l += s.y * exp2_fast(s.x - base);
  }
  l += __shfl_xor_sync(0xFFFFFFFFu, l, 1);
  const int low = lane / 4, high = lane / 4 + 8;  // this lane's rows of the group
  const float base0 = __shfl_sync(0xFFFFFFFFu, base, 2 * low),
              base1 = __shfl_sync(0xFFFFFFFFu, base, 2 * high);
  const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
  const float inverse0 = __shfl_sync(0xFFFFFFFFu, inverse, 2 * low);
  const float inverse1 = __shfl_sync(0xFFFFFFFFu, inverse, 2 * high);

  const int first = (chunk * kCombineWarps + warp) * kSteps;  // of the groups of 8 columns
  const auto* from = reinterpret_cast<const float4*>(p.partial_out) +
                     ((static_cast<std::int64_t>(block) * groups + group) * 2 + wg) * kFragment + first * 32 +
                     lane;
  const std::int64_t stride = static_cast<std::int64_t>(blocks) * groups * 2 * kFragment;
  float4 acc[kSteps] = {};
#pragma unroll(8 / kSteps)
  for (int i = 0; i < slots.splits; ++i) {
    const std::int64_t slot = slots.at(i);
    const float2 s0 = stats[slot * stats_stride + low], s1 = stats[slot * stats_stride + high];
    const float w0 = exp2_fast(s0.x - base0) * inverse0, w1 = exp2_fast(s1.x - base1) * inverse1;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float4 o = from[slot * stride + j * 32];
      // A split without keys has written no O. (A sum of NaN scores is NaN, not 0.)
      if (s0.y != 0.0f) {
        acc[j].x += w0 * o.x;
        acc[j].y += w0 * o.y;
      }
      if (s1.y != 0.0f) {
        acc[j].z += w1 * o.z;
        acc[j].w += w1 * o.w;
      }
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = group * 16 + low + 8 * h;
    const int m_block = block % p.blocks.count();
    const int in_group = m_block % p.blocks.head_chunks * kTileRows + row % p.blocks.heads;
    const int token = m_block / p.blocks.head_chunks * p.blocks.tokens + row / p.blocks.heads;
    const int head = block / p.blocks.count() * p.group + in_group;
    if (row >= p.blocks.tokens * p.blocks.heads || token >= p.s_q || in_group >= p.group) continue;
    auto* to = static_cast<std::uint16_t*>(p.out) + req * p.out_stride_b + token * p.out_stride_s +
               head * p.out_stride_h + wg * 256 + first * 8 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      *reinterpret_cast<std::uint32_t*>(to + j * 8) =
          h == 0 ? pack2<kBf16>(acc[j].x, acc[j].y) : pack2<kBf16>(acc[j].z, acc[j].w);
    }
    // Lane 2 * row knows the row's sum; it is the same in both of a row's lanes.
    if (p.lse != nullptr && wg == 0 && chunk == 0 && warp == 0 && lane % 4 == 0) {
      const float inv = h == 0 ? inverse0 : inverse1, top = h == 0 ? base0 : base1;
      p.lse[req * p.lse_stride_b + head * p.lse_stride_h + token * p.lse_stride_s] =
          inv == 0.0f ? INFINITY : (top - log2f(inv)) * 0.69314718056f;
    }
  }
}

}  // namespace flash_mla::sm90
