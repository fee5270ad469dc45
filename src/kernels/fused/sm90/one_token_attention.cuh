#pragma once

// Attention of one token, at most 16 heads, over its cached keys: a CTA takes a stretch of them in tiles
// of 32. Of several tokens each has stretches of its own, those it has alone, and a CTA takes them in turn.
//
// Scores: products of 16 heads x 16 keys for each warp, a quarter of the 576 columns each; the quarters are
// summed by the warps that own the rows, two each, which also keep the softmax's maximum and sum. Values: 64
// of the 512 columns for each warp. Rows of Q and of the tile are padded by 16 bytes, so that the eight rows
// that ldmatrix reads lie in different banks.

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/fused/sm90/one_token_ring.cuh"
#include "kernels/fused/sm90/tagged.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::one_token_kernel {

inline constexpr int kHeads = 16, kTileKeys = 32, kPageKeys = 64;
inline constexpr int kPitch = kKey + 8;
inline constexpr int kScorePitch = kTileKeys + 8;
inline constexpr int kMaxSplits = 128;
inline constexpr int kVectors = kKey / 8;  // of a row of Q or a key

/// Vectors of activations that a warp has at a time.
template <int kTokens>
inline constexpr int kActVectors = kTokens > 1 ? 2 : 1;

struct QueryAndKeys {
  bf16 q[kHeads][kPitch];
  bf16 keys[kTileKeys][kPitch];
};
template <int kTokens>
struct alignas(16) AttentionSmem {
  union {
    QueryAndKeys tile;
    float routing[2][8 * 32];  // while nobody has a query
    bf16 act[kWarps][kActVectors<kTokens>]
            [kMaxK];  // while nobody has keys: experts' activations for each warp
  };
  bf16 p[kHeads][kScorePitch];
  float rescale[kHeads];
  std::uint64_t arrived;  // the tile's keys
};
/// What several phases use in turn.
template <int kTokens>
union alignas(16) ScratchSmem {
  float scores[4][kHeads][kScorePitch];  // by quarter of the columns
  float latent[kTokens][2][kRank];       // of a head: sums over even and odd splits
  float down[kTokens][kMaxSlots][kMaxDownRows];
  VectorSmem<kTokens> vector;
};

/// Which of a token's keys a CTA takes: `splits` of them have some.
struct KeyRange {
  int first, end, splits;

  __device__ KeyRange(int len, int cta, int ctas) {
    const int most = min(ctas, kMaxSplits) * kTileKeys;
    const int each = (len + most - 1) / most * kTileKeys;
    splits = (len + each - 1) / each;
    first = cta * each;
    end = min(len, first + each);
  }
};

/// Stretches of all tokens' keys. The splits of every token are numbered behind those of the token before.
template <int kTokens>
struct AllSplits {
  int count = 0;

  __device__ AllSplits(int len, int ctas) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) count += KeyRange(len + t, 0, ctas).splits;
  }
  /// CTAs that have any.
  __device__ unsigned ctas_with_keys(int ctas) const { return min(count, ctas); }
};

template <int kTokens>
class Attention {
 public:
  __device__ Attention(const OneToken& p, const Share& share, AttentionSmem<kTokens>& s,
                       ScratchSmem<kTokens>& scratch)
      : p_(p),
        share_(share),
        s_(s),
        scratch_(scratch),
        first_len_(__ldg(p.len)),
        len_(first_len_),
        range_(len_, share.cta, share.ctas) {}

  /// Turns to the split of that number, of all tokens; false if there is none.
  __device__ bool take(int number) {
    split_ = number;
#pragma unroll 1
    for (token_ = 0; token_ < kTokens; ++token_) {
      len_ = first_len_ + token_;
      range_ = KeyRange(len_, split_, share_.ctas);
      if (split_ < range_.splits) return true;
      split_ -= range_.splits;
    }
    return false;
  }
  __device__ int token() const { return token_; }
  __device__ int split() const { return split_; }

  // Of one token.
  __device__ bool has_keys() const { return range_.first < range_.end; }
  __device__ int splits() const { return range_.splits; }

  /// By warp 7: asks for the first tile's keys, but for the step's own, which are still to be made; the
  /// others it brings into L2.
  __device__ void prefetch(const bf16* cache) {
    if (!has_keys()) return;
    load_tile(cache, range_.first);
    for (int key = range_.first + kTileKeys + share_.lane; key < min(range_.end, first_len_ - 1); key += 32) {
      prefetch_bulk(key_at(cache, key), kKey * 2);
    }
  }

  /// By all warps, with the round's q (heads, 576) and the step's own keys, a token's behind the other's: the partial
  /// result of the CTA's keys, `out` (16, 512) and `stats` (16) pairs of maximum (base 2) and sum.
  __device__ void run(const Tagged* q, const Tagged* own_keys, unsigned round, const bf16* cache, float* out,
                      float2* stats) {
    const int warp = share_.warp, lane = share_.lane;
    load_vectors(q, own_keys, round, range_.first);
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of rows 2 warp and 2 warp + 1
    float o[8][4] = {};
    for (int first = range_.first; first < range_.end; first += kTileKeys) {
      if (first > range_.first) {
        sync_warps();  // the tile before has been read
        if (warp == 7) load_tile(cache, first);
        load_own(own_keys, round, first);
      }
      clear_behind(first);
      sync_warps();
      ptx::mbarrier_wait(&s_.arrived, phase_);
      phase_ ^= 1;
      score();
      sync_warps();
      softmax(first, maximum, sum);
      sync_warps();
      add_values(o);
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = g + 8 * h;
      if (head >= p_.heads) continue;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        *reinterpret_cast<float2*>(out + head * kRank + warp * 64 + n * 8 + 2 * t) =
            make_float2(o[n][2 * h], o[n][2 * h + 1]);
      }
    }
    if (lane < 2) stats[2 * warp + lane] = make_float2(maximum[lane], sum[lane]);
  }

 private:
  __device__ const bf16* key_at(const bf16* cache, int key) const {
    const std::int64_t page = __ldg(p_.table + key / kPageKeys);
    return cache + (page * kPageKeys + key % kPageKeys) * kKey;
  }

  /// By one warp, a key for each lane.
  __device__ void load_tile(const bf16* cache, int first) {
    const int key = first + share_.lane,
              count = max(0, min(min(range_.end, first_len_ - 1) - first, kTileKeys));
    if (share_.lane == 0) ptx::mbarrier_arrive_expect_tx(&s_.arrived, count * kKey * 2);
    __syncwarp();
    if (share_.lane < count) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
              ptx::smem_address(s_.tile.keys[share_.lane])),
          "l"(key_at(cache, key)), "r"(kKey * 2), "r"(ptx::smem_address(&s_.arrived))
          : "memory");
    }
  }

  /// Where in the tile the step's i-th key is, if it is there.
  __device__ __forceinline__ int own_row(int first, int i) const { return first_len_ - 1 + i - first; }
  __device__ __forceinline__ bool has_own(int first, int i) const {
    return (kTokens == 1 || i <= token_) && own_row(first, i) >= 0 && own_row(first, i) < kTileKeys;
  }

  /// Zeros, which a product with 0 leaves 0, behind the token's own key.
  __device__ void clear_behind(int first) {
    if (!has_own(first, token_)) return;
    const int begin = own_row(first, token_) + 1;
    for (int i = threadIdx.x; i < (kTileKeys - begin) * kVectors; i += kThreads) {
      *reinterpret_cast<uint4*>(&s_.tile.keys[begin + i / kVectors][i % kVectors * 8]) =
          make_uint4(0, 0, 0, 0);
    }
    ptx::fence_async_proxy();  // the next layer's keys come by the copy engine
  }

  /// Q, and those of the step's own keys that are in the tile at `first`.
  __device__ void load_vectors(const Tagged* q, const Tagged* own_keys, unsigned round, int first) {
    constexpr int kEach = ((kHeads + kTokens) * kVectors + kThreads - 1) / kThreads;
    const auto at = [](int i) { return static_cast<int>(threadIdx.x) + i * kThreads; };
    const bool has_first = has_own(first, 0);
    const auto own = [&](int i) {  // of the vectors behind Q
      if constexpr (kTokens == 1) return has_first && at(i) < (kHeads + 1) * kVectors;
      return at(i) < (kHeads + kTokens) * kVectors && has_own(first, at(i) / kVectors - kHeads);
    };
    uint4 v[kEach];
    await_8<kEach>(
        round,
        [&](int i) {
          return at(i) < kHeads * kVectors ? q + at(i) * 8 : own_keys + (at(i) - kHeads * kVectors) * 8;
        },
        [&](int i) { return at(i) < p_.heads * kVectors || (at(i) >= kHeads * kVectors && own(i)); }, v);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = at(i) / kVectors, column = at(i) % kVectors * 8;
      if (row < kHeads) {
        // Rows behind the heads: await_8 left zeros.
        *reinterpret_cast<uint4*>(&s_.tile.q[row][column]) = v[i];
      } else if (own(i)) {
        *reinterpret_cast<uint4*>(&s_.tile.keys[own_row(first, kTokens > 1 ? row - kHeads : 0)][column]) = v[i];
        ptx::fence_async_proxy();
      }
    }
  }

  /// The step's own keys that are in a later tile than the first.
  __device__ void load_own(const Tagged* own_keys, unsigned round, int first) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (!has_own(first, i) || threadIdx.x >= kVectors) continue;
      const int column = static_cast<int>(threadIdx.x) * 8;
      *reinterpret_cast<uint4*>(&s_.tile.keys[own_row(first, i)][column]) =
          await_8(own_keys + i * kKey + column, round);
      ptx::fence_async_proxy();
    }
  }

  __device__ void score() {
    const int warp = share_.warp, lane = share_.lane;
    const int keys = warp % 2 * 16, quarter = warp / 2;
    float d[2][4] = {};
#pragma unroll
    for (int i = 0; i < kKey / 64; ++i) {
      const int k = (quarter * (kKey / 64) + i) * 16;
      std::uint32_t a[4], b[4];
      ldmatrix_x4(a, ptx::smem_address(&s_.tile.q[lane % 16][k + lane / 16 * 8]));
      ldmatrix_x4(b, ptx::smem_address(&s_.tile.keys[keys + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]));
      ptx::mma_m16n8k16_bf16(d[0], a[0], a[1], a[2], a[3], b[0], b[1]);
      ptx::mma_m16n8k16_bf16(d[1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float2*>(&scratch_.scores[quarter][g + 8 * h][keys + n * 8 + 2 * t]) =
            make_float2(d[n][2 * h], d[n][2 * h + 1]);
      }
    }
  }

  /// Two rows for each warp, a key for each lane.
  __device__ void softmax(int first, float (&maximum)[2], float (&sum)[2]) {
    const int lane = share_.lane;
    const bool valid = first + lane < range_.end;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 2 * share_.warp + r;
      float s = 0;
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) s += scratch_.scores[quarter][row][lane];
      s = valid ? s * p_.softmax_scale * 1.44269504f : -INFINITY;
      float highest = fmaxf(maximum[r], s);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2)
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, offset));
      const bf16 rounded = __float2bfloat16(exp2_fast(s - highest));
      const float rescale = exp2_fast(maximum[r] - highest);
      sum[r] = sum[r] * rescale + warp_total(__bfloat162float(rounded));
      maximum[r] = highest;
      s_.p[row][lane] = rounded;
      if (lane == 0) s_.rescale[row] = rescale;
    }
  }

  __device__ void add_values(float (&o)[8][4]) {
    const int warp = share_.warp, lane = share_.lane;
    const float upper = s_.rescale[lane / 4], lower = s_.rescale[lane / 4 + 8];
#pragma unroll
    for (int n = 0; n < 8; ++n) o[n][0] *= upper, o[n][1] *= upper, o[n][2] *= lower, o[n][3] *= lower;
#pragma unroll
    for (int k = 0; k < kTileKeys; k += 16) {
      std::uint32_t a[4];
      ldmatrix_x4(a, ptx::smem_address(&s_.p[lane % 16][k + lane / 16 * 8]));
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        std::uint32_t b[4];
        ldmatrix_x4_transposed(
            b, ptx::smem_address(&s_.tile.keys[k + lane % 16][warp * 64 + n * 8 + lane / 16 * 8]));
        ptx::mma_m16n8k16_bf16(o[n], a[0], a[1], a[2], a[3], b[0], b[1]);
        ptx::mma_m16n8k16_bf16(o[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
  }

  const OneToken& p_;
  const Share& share_;
  AttentionSmem<kTokens>& s_;
  ScratchSmem<kTokens>& scratch_;
  const int first_len_;  // keys that the first token sees
  int token_ = 0, split_ = 0;
  int len_;  // keys that the token sees
  KeyRange range_;
  std::uint32_t phase_ = 0;
};

/// A head's latent output, from the splits' partial results: thread i has columns 4 (i % 128) ... + 3, of
/// every second split. `out` (splits, 16, 512), `stats` (splits, 16). The two halves' sums go to `latent`.
__device__ __forceinline__ void combine_splits(const float* out, const float2* stats, int splits, int head,
                                               const Share& share, float (&latent)[2][kRank]) {
  constexpr int kTogether = 16, kPerLane = kMaxSplits / 32;
  const int half = static_cast<int>(threadIdx.x) / 128, column = static_cast<int>(threadIdx.x) % 128 * 4;
  float2 own[kPerLane];  // of splits lane, lane + 32, ...
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int split = share.lane + 32 * i;
    own[i] = split < splits ? __ldcg(stats + split * kHeads + head) : make_float2(-INFINITY, 0);
  }
  float4 v[kTogether];
  const auto load = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int split = begin + 2 * i + half;
      v[i] = split < splits ? __ldcg(reinterpret_cast<const float4*>(
                                  out + (std::int64_t(split) * kHeads + head) * kRank + column))
                            : make_float4(0, 0, 0, 0);
    }
  };
  load(0);
  float highest = -INFINITY, total = 0;
#pragma unroll
  for (const float2& o : own) highest = fmaxf(highest, o.x);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, offset));
  float weight[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    weight[i] = exp2_fast(own[i].x - highest);
    total = fmaf(weight[i], own[i].y, total);
  }
  const float factor = 1.0f / warp_total(total);
  float4 sum = make_float4(0, 0, 0, 0);
  static_assert(2 * kTogether == 32);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i * 32 >= splits) break;
    if (i > 0) load(i * 32);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const float w = __shfl_sync(~0u, weight[i], 2 * j + half) * factor;
      if (i * 32 + 2 * j + half >= splits) continue;
      sum.x = fmaf(w, v[j].x, sum.x), sum.y = fmaf(w, v[j].y, sum.y);
      sum.z = fmaf(w, v[j].z, sum.z), sum.w = fmaf(w, v[j].w, sum.w);
    }
  }
  *reinterpret_cast<float4*>(&latent[half][column]) = sum;
}

}  // namespace flash_mla::sm90::one_token_kernel
