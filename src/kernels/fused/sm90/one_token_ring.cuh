#pragma once

// A warp's ring of weights in shared memory, and its products of weight rows with the tokens' vectors.
//
// Columns 256 i + 8 lane ... + 7 of a row and of the vector are a lane's, 16 bytes of each. The products are
// made by mma.m16n8k16: the row's 16 bytes are its operand with 16 rows as they are, lane (g, t) having two
// pairs of columns for row g and two for row g + 8; the vector's, of the first two pairs or of the others,
// are its operand with 8 columns. Wanted are the sums on a diagonal, (g, g) or (g + 8, g). The rest is waste,
// but takes a fifth of the instructions that widening and multiplying take.
//
// Loops are loops: a phase's code is fetched anew in every layer, and that takes longer than to run it.

#include <cstdint>

#include "kernels/fused/sm90/one_token_work.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/mma.cuh"

namespace flash_mla::sm90::one_token_kernel {

/// Pieces of a warp's ring. Several tokens want more of the memory for themselves.
template <int kTokens>
inline constexpr int kDepth = kTokens > 1 ? 4 : 5;

/// `bytes` (divisible by 16) to shared memory, counted at `barrier`. What is read once need not stay in L2.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, std::uint32_t bytes,
                                          std::uint64_t* barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(ptx::smem_address(to)),
      "l"(from), "r"(bytes), "r"(ptx::smem_address(barrier)), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void prefetch_bulk(const void* from, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ std::uint64_t read_once_policy() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ float low(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(std::uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ float warp_total(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

template <int kTokens>
struct RingSmem {
  std::uint8_t pieces[kWarps][kDepth<kTokens>][kPieceBytes];
};
template <int kTokens>
struct RingState {
  std::uint64_t arrived[kWarps][kDepth<kTokens>];  // pieces
  std::uint64_t read[kWarps][kDepth<kTokens>];     // and their places free again
};

/// By one lane for each ring: copies the pieces of its warp's walk, in order, while there is room.
template <int kTokens>
class RingFiller {
 public:
  __device__ RingFiller(RingSmem<kTokens>& ring, RingState<kTokens>& state, Walk<kTokens>& walk, int warp)
      : pieces_(ring.pieces[warp]),
        arrived_(state.arrived[warp]),
        read_(state.read[warp]),
        walk_(walk),
        policy_(read_once_policy()) {}

  /// Asks for a piece, if there is one and room for it. False: there is none any more.
  __device__ __forceinline__ bool step() {
    if (!known_) known_ = walk_.next(next_);  // ahead of the room for it
    if (!known_) return !walk_.done();
    if (!ptx::mbarrier_test_wait(read_ + at_, parity_)) return true;
    ptx::mbarrier_arrive_expect_tx(arrived_ + at_, next_.bytes);
    copy_bulk(pieces_[at_], next_.from, next_.bytes, arrived_ + at_, policy_);
    at_ = at_ + 1 == kDepth<kTokens> ? 0 : at_ + 1;
    if (at_ == 0) parity_ ^= 1;
    known_ = false;
    return true;
  }

 private:
  std::uint8_t (*pieces_)[kPieceBytes];
  std::uint64_t* arrived_;
  std::uint64_t* read_;
  Walk<kTokens>& walk_;
  std::uint64_t policy_;
  Piece next_;
  bool known_ = false;
  int at_ = 0;
  std::uint32_t parity_ = 1;  // of the phase before the first, which counts as complete
};

/// Which of the sums of a few weight rows and vectors a lane has at the end: row `row` with the vector of `token`.
template <int kTokens>
struct Owner {
  static constexpr int kPadded = kTokens > 2 ? 4 : kTokens;  // a power of two
  static constexpr int kLanes = 32 / (2 * kPadded);          // that have the same sum
  int row, token;
  bool first;  // of those lanes

  __device__ explicit Owner(int lane)
      : row(kTokens > 1 ? lane / (kLanes * kPadded) : lane),
        token(kTokens > 1 ? lane / kLanes % kPadded : 0),
        first(kTokens > 1 ? lane % kLanes == 0 && token < kTokens : true) {}
  /// Whether the lane is to hand on its sum, of `count` rows.
  __device__ __forceinline__ bool of(int count) const { return row < count && first; }
};

/// A warp's side of its ring.
template <int kTokens>
class Ring {
 public:
  __device__ Ring(const RingSmem<kTokens>& ring, RingState<kTokens>& state, int warp, int lane)
      : pieces_(ring.pieces[warp]), arrived_(state.arrived[warp]), read_(state.read[warp]), lane_(lane) {}

  /// The i-th piece from the oldest on, once it has arrived.
  __device__ __forceinline__ const std::uint8_t* piece(int i) {
    const int at = at_ + i < kDepth<kTokens> ? at_ + i : at_ + i - kDepth<kTokens>;
    ptx::mbarrier_wait(arrived_ + at, (parity_ >> at) & 1);
    return pieces_[at];
  }
  /// The oldest `count` pieces have been read.
  __device__ __forceinline__ void release(int count) {
    __syncwarp();
    for (int i = 0; i < count; ++i) {
      if (lane_ == 0) ptx::mbarrier_arrive(read_ + at_);
      parity_ ^= 1u << at_;
      at_ = at_ + 1 == kDepth<kTokens> ? 0 : at_ + 1;
    }
  }

  /// The products of x, in shared memory, with the next one or two pieces, rows of k bfloat16, in every lane.
  __device__ __forceinline__ void multiply(int count, int k, const bf16* x, float (&out)[2]) {
    product(count, k, x, out);
    release(count);
  }
  /// The same, of pieces that are to stay.
  __device__ __forceinline__ void product(int count, int k, const bf16* x, float (&out)[2]) {
    const std::uint32_t first = ptx::smem_address(piece(0)) + lane_ * 16;
    const std::uint32_t second = count > 1 ? ptx::smem_address(piece(1)) + lane_ * 16 : first;
    const std::uint32_t vector = ptx::smem_address(x) + lane_ * 16;
    float a[2][4] = {}, b[2][4] = {};
#pragma unroll 2
    for (int i = 0; i < k; i += 256) {
      const bool inside = i + lane_ * 8 < k;
      const uint4 u = load_shared(vector + 2 * i, inside);
      const uint4 v = load_shared(first + 2 * i, inside);
      const uint4 w = load_shared(second + 2 * i, inside);
      ptx::mma_m16n8k16_bf16(a[0], v.x, v.y, v.z, v.w, u.x, u.z);
      ptx::mma_m16n8k16_bf16(b[0], w.x, w.y, w.z, w.w, u.x, u.z);
      ptx::mma_m16n8k16_bf16(a[1], v.x, v.y, v.z, v.w, u.y, u.w);
      ptx::mma_m16n8k16_bf16(b[1], w.x, w.y, w.z, w.w, u.y, u.w);
    }
    // The diagonal's element g is in the lane whose quad is g and which has columns g and g ^ 1.
    const int g = lane_ / 4;
    const bool has = lane_ % 4 == g / 2, odd = g % 2 != 0;
    out[0] = has ? (odd ? a[0][1] + a[1][3] : a[0][0] + a[1][2]) : 0.0f;
    out[1] = has ? (odd ? b[0][1] + b[1][3] : b[0][0] + b[1][2]) : 0.0f;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      out[0] += __shfl_xor_sync(~0u, out[0], offset);
      out[1] += __shfl_xor_sync(~0u, out[1], offset);
    }
  }

  /// The same products of all vectors: Owner says which of them a lane gets. Sums are made in the order of
  /// product(), so that they have its bits.
  __device__ __forceinline__ float multiply_all(int count, int k, const bf16 (*x)[kMaxK]) {
    if constexpr (kTokens == 1) {
      float sums[2];
      multiply(count, k, x[0], sums);
      return lane_ == 0 ? sums[0] : sums[1];
    } else {
      const std::uint32_t first = ptx::smem_address(piece(0)) + lane_ * 16;
      const std::uint32_t second = count > 1 ? ptx::smem_address(piece(1)) + lane_ * 16 : first;
      const std::uint32_t vectors = ptx::smem_address(x[0]) + lane_ * 16;
      float a[kTokens][2][4] = {}, b[kTokens][2][4] = {};
#pragma unroll 1
      for (int i = 0; i < k; i += 256) {
        const bool inside = i + lane_ * 8 < k;
        const uint4 v = load_shared(first + 2 * i, inside);
        const uint4 w = load_shared(second + 2 * i, inside);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const uint4 u = load_shared(vectors + t * (kMaxK * 2) + 2 * i, inside);
          ptx::mma_m16n8k16_bf16(a[t][0], v.x, v.y, v.z, v.w, u.x, u.z);
          ptx::mma_m16n8k16_bf16(b[t][0], w.x, w.y, w.z, w.w, u.x, u.z);
          ptx::mma_m16n8k16_bf16(a[t][1], v.x, v.y, v.z, v.w, u.y, u.w);
          ptx::mma_m16n8k16_bf16(b[t][1], w.x, w.y, w.z, w.w, u.y, u.w);
        }
      }
      constexpr int kPadded = Owner<kTokens>::kPadded;
      const int g = lane_ / 4;
      const bool has = lane_ % 4 == g / 2, odd = g % 2 != 0;
      float sums[2 * kPadded] = {};
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        sums[t] = has ? (odd ? a[t][0][1] + a[t][1][3] : a[t][0][0] + a[t][1][2]) : 0.0f;
        sums[kPadded + t] = has ? (odd ? b[t][0][1] + b[t][1][3] : b[t][0][0] + b[t][1][2]) : 0.0f;
      }
      release(count);
      return reduce(sums);
    }
  }

  /// 16 bytes, or 0.
  __device__ static __forceinline__ uint4 load_shared(std::uint32_t address, bool inside) {
    uint4 v;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %5, 0;\n"
        "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
        "@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "r"(address), "r"(unsigned(inside))
        : "memory");
    return v;
  }

  __device__ static __forceinline__ void dot8(const uint4& w, const float* x, float (&sum)[2]) {
    sum[0] = fmaf(low(w.x), x[0], sum[0]), sum[1] = fmaf(high(w.x), x[1], sum[1]);
    sum[0] = fmaf(low(w.y), x[2], sum[0]), sum[1] = fmaf(high(w.y), x[3], sum[1]);
    sum[0] = fmaf(low(w.z), x[4], sum[0]), sum[1] = fmaf(high(w.z), x[5], sum[1]);
    sum[0] = fmaf(low(w.w), x[6], sum[0]), sum[1] = fmaf(high(w.w), x[7], sum[1]);
  }

 private:
  /// The sums over all lanes: lanes hand each other the halves that they do not own.
  template <int kCount>
  __device__ __forceinline__ float reduce(float (&sums)[kCount]) const {
    int offset = 16;
#pragma unroll
    for (int half = kCount / 2; half > 0; half /= 2, offset /= 2) {
      const bool upper = (lane_ & offset) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float handed = upper ? sums[i] : sums[i + half], kept = upper ? sums[i + half] : sums[i];
        sums[i] = kept + __shfl_xor_sync(~0u, handed, offset);
      }
    }
#pragma unroll
    for (; offset > 0; offset /= 2) sums[0] += __shfl_xor_sync(~0u, sums[0], offset);
    return sums[0];
  }

  const std::uint8_t (*pieces_)[kPieceBytes];
  std::uint64_t* arrived_;
  std::uint64_t* read_;
  int lane_;
  int at_ = 0;
  std::uint32_t parity_ = 0;
};

/// Eight bfloat16 from L2, where other CTAs have written them.
__device__ __forceinline__ uint4 load8(const bf16* p) { return __ldcg(reinterpret_cast<const uint4*>(p)); }

/// Of the threads that multiply.
__device__ __forceinline__ void sync_warps() { ptx::named_barrier_sync<1, kThreads>(); }

/// Vectors that only this warp of the CTA wants, to shared memory.
template <int kCount>
__device__ __forceinline__ void load_vectors(const bf16* const (&from)[kCount], int k, int lane,
                                             bf16 (*to)[kMaxK]) {
  __syncwarp();  // what was there has been read
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int i = 0; i < kMaxK / 256; ++i) {
      const int at = i * 256 + lane * 8;
      if (at < k) ptx::copy_async_16(to[n] + at, from[n] + at);
    }
  }
  ptx::copy_async_wait_all();
  __syncwarp();
}

/// Vectors that all warps of all CTAs want, by way of shared memory: if every warp read them from L2, the few
/// slices that have them would take a microsecond. `own_columns(i, v)` waits for columns i ... i + 7 of each.
template <int kTokens>
struct VectorSmem {
  alignas(16) bf16 x[kTokens][kMaxK];
  float squares[kTokens][kWarps];
};
template <int kTokens, class Own>
__device__ __forceinline__ void share_vectors(int k, VectorSmem<kTokens>& s, Own&& own_columns) {
  const int own = static_cast<int>(threadIdx.x) * 8;
  sync_warps();  // what was there has been read
  if (own < k) {
    uint4 v[kTokens];
    own_columns(own, v);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) *reinterpret_cast<uint4*>(s.x[t] + own) = v[t];
  }
  sync_warps();
}

/// The thread's eight weights of a norm: no kernel writes them, so they can be asked for ahead of the vector.
struct NormWeights {
  float w[8];
  __device__ __forceinline__ void load(const float* weights, int k) {
    const int own = static_cast<int>(threadIdx.x) * 8;
    if (own >= k) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(weights + own) + i);
      w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
  }
};

/// The same of the vectors / sqrt(mean of their squares + eps) * norm, rounded as bfloat16 rows are.
template <int kTokens, class Own>
__device__ __forceinline__ void share_normalised(const NormWeights& norm, float eps, int k,
                                                 VectorSmem<kTokens>& s, Own&& own_columns) {
  const int own = static_cast<int>(threadIdx.x) * 8;
  sync_warps();  // what was there has been read
  uint4 v[kTokens] = {};
  if (own < k) own_columns(own, v);
  float row[kTokens][8];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const std::uint32_t pairs[4] = {v[t].x, v[t].y, v[t].z, v[t].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) row[t][2 * i] = low(pairs[i]), row[t][2 * i + 1] = high(pairs[i]);
    float square = 0;
#pragma unroll
    for (const float r : row[t]) square = fmaf(r, r, square);
    square = warp_total(square);
    if (threadIdx.x % 32 == 0) s.squares[t][threadIdx.x / 32] = square;
  }
  sync_warps();
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float square = 0;
#pragma unroll
    for (const float r : s.squares[t]) square += r;
    const float factor = rsqrtf(square / static_cast<float>(k) + eps);
    if (own < k) {
      std::uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = pack2<true>(row[t][2 * i] * factor * norm.w[2 * i],
                               row[t][2 * i + 1] * factor * norm.w[2 * i + 1]);
      }
      *reinterpret_cast<uint4*>(s.x[t] + own) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
  sync_warps();
}

}  // namespace flash_mla::sm90::one_token_kernel
