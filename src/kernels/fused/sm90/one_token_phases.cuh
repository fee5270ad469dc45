#pragma once

// The phases of attention but for attention itself, and the router's rows.

#include "kernels/fused/sm90/one_token_exchange.cuh"
#include "kernels/fused/sm90/one_token_ring.cuh"
#include "kernels/rows/sm90/row_math.cuh"

namespace flash_mla::sm90::one_token_kernel {

/// Head `head` of a token's query: out = [| its last 64 columns turned], a pair for each lane.
__device__ __forceinline__ void rotate_query(const OneToken& p, int token, const Tagged* q, Tagged* out,
                                             unsigned round, int head, int lane) {
  const std::uint32_t pair = await_2(q + head * (p.nope + kRope) + p.nope + 2 * lane, round);
  bf16 turned[2];
  rotate(reinterpret_cast<const bf16*>(&pair), turned, __ldg(p.cosines + token * (kRope / 2) + lane),
         __ldg(p.sines + token * (kRope / 2) + lane));
  for (int i = 0; i < 2; ++i) store_tagged(out + head * kKey + kRank + 2 * lane + i, turned[i], round);
}

/// By one warp: a token's latent, normalised, and its key, turned, to its place in the cache and to
/// `own_key`.
__device__ __forceinline__ void append_key(const OneToken& p, const OneTokenLayer& l, int token,
                                           const Tagged* kv, Tagged* own_key, unsigned round, int lane) {
  const std::int64_t slot = __ldg(p.slot + token);
  bf16* const key = static_cast<bf16*>(l.cache) + slot * kKey;
  const auto put = [&](int column, bf16 value) {
    store_tagged(own_key + column, value, round);
    if (slot >= 0) key[column] = value;
  };
  uint4 v[2];
  await_8<2>(
      round, [&](int i) { return kv + i * 256 + lane * 8; }, [](int) { return true; }, v);
  float x[16], squares = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t pairs[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[i * 8 + 2 * j] = low(pairs[j]), x[i * 8 + 2 * j + 1] = high(pairs[j]);
    }
  }
#pragma unroll
  for (const float f : x) squares = fmaf(f, f, squares);
  const float factor = rsqrtf(warp_total(squares) / float(kRank) + p.latent_eps);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int column = i / 8 * 256 + lane * 8 + i % 8;
    put(column, __float2bfloat16(x[i] * factor * __ldg(l.kv_norm + column)));
  }
  const std::uint32_t pair = await_2(kv + kRank + 2 * lane, round);
  bf16 turned[2];
  rotate(reinterpret_cast<const bf16*>(&pair), turned, __ldg(p.cosines + token * (kRope / 2) + lane),
         __ldg(p.sines + token * (kRope / 2) + lane));
  for (int i = 0; i < 2; ++i) put(kRank + 2 * lane + i, turned[i]);
}

/// The products of W_UK's next 16 rows, of p.nope columns, with a head's queries; a row's sum ends in one lane.
template <int kTokens>
__device__ __forceinline__ void absorb(const OneToken& p, Ring<kTokens>& ring, Exchange<kTokens>& e,
                                       unsigned round, int index, int lane) {
  constexpr int kPerHead = kRank / kUkRows;
  const int head = index / kPerHead, first = index % kPerHead * kUkRows;
  const int lanes = p.nope / 8, rows = 32 / lanes;  // lanes of a row, rows read at a time
  const int column = lane % lanes * 8;
  uint4 v[kTokens];
  await_8<kTokens>(
      round, [&](int t) { return e.qkv[t] + head * (p.nope + kRope) + column; }, [](int) { return true; }, v);
  float x[kTokens][8];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const std::uint32_t pairs[4] = {v[t].x, v[t].y, v[t].z, v[t].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[t][2 * i] = low(pairs[i]), x[t][2 * i + 1] = high(pairs[i]);
  }
  const std::uint8_t* const piece = ring.piece(0);
  const int to = head * kKey + first + lane / lanes;
#pragma unroll 2
  for (int row = 0; row < kUkRows; row += rows) {
    const uint4 w = *reinterpret_cast<const uint4*>(piece + row * p.nope * 2 + lane * 16);
    float sums[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float a[2] = {};
      Ring<kTokens>::dot8(w, x[t], a);
      sums[t] = a[0] + a[1];
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) sums[t] += __shfl_xor_sync(~0u, sums[t], offset);
    }
    if (lane % lanes == 0) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
        store_tagged(e.q_latent[t] + to + row, __float2bfloat16(sums[t]), round);
    }
  }
  ring.release(1);
}

/// The CTA's rows of W_UV times the latents of its head.
template <int kTokens>
__device__ __forceinline__ void expand(const OneToken& p, Ring<kTokens>& ring, const Share& share,
                                       const float (&latent)[kTokens][2][kRank], Exchange<kTokens>& e,
                                       unsigned round) {
  float x[kTokens][16];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int at = i / 8 * 256 + share.lane * 8 + i % 8;
      x[t][i] = __bfloat162float(__float2bfloat16(latent[t][0][at] + latent[t][1][at]));
    }
  }
  const int count = share.of_cta((share.uv_rows + kUvRows - 1) / kUvRows);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int first = (share.warp + i * kWarps) * kUvRows, rows = min(kUvRows, share.uv_rows - first);
    const std::uint8_t* const piece = ring.piece(0);
    float sums[kTokens][kUvRows];
#pragma unroll
    for (int r = 0; r < kUvRows; ++r) {
      float a[kTokens][2] = {};
      if (r < rows) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint4 w = *reinterpret_cast<const uint4*>(piece + r * kRank * 2 + j * 512 + share.lane * 16);
#pragma unroll
          for (int t = 0; t < kTokens; ++t) Ring<kTokens>::dot8(w, x[t] + j * 8, a[t]);
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) sums[t][r] = warp_total(a[t][0] + a[t][1]);
    }
    ring.release(1);
    if (share.lane < rows) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        store_tagged(e.attended[t] + share.uv_head * p.v + share.uv_first + first + share.lane,
                     __float2bfloat16(share.lane == 0 ? sums[t][0] : sums[t][1]), round);
      }
    }
  }
}

/// One of the router's rows, float32, times the tokens' h.
template <int kTokens>
__device__ __forceinline__ void route_row(const OneToken& p, Ring<kTokens>& ring,
                                          const bf16 (&x)[kTokens][kMaxK], int lane, float (&sums)[kTokens]) {
#pragma unroll
  for (float& sum : sums) sum = 0;
#pragma unroll 1
  for (int part = 0; part < p.hidden; part += kRouterColumns) {
    const std::uint8_t* const piece = ring.piece(0);
    const int columns = min(kRouterColumns, p.hidden - part);
#pragma unroll 2
    for (int at = lane * 4; at < columns; at += 128) {
      const float4 w = *reinterpret_cast<const float4*>(piece + at * 4);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const uint2 v = *reinterpret_cast<const uint2*>(x[t] + part + at);
        sums[t] += w.x * low(v.x) + w.y * high(v.x) + (w.z * low(v.y) + w.w * high(v.y));
      }
    }
    ring.release(1);
  }
#pragma unroll
  for (float& sum : sums) sum = warp_total(sum);
}

}  // namespace flash_mla::sm90::one_token_kernel
