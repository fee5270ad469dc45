#pragma once

// A warp's ring of weights in shared memory, and its products of weight rows with the vector in its
// registers.
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

inline constexpr int kDepth = 5;  // pieces of a warp's ring

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

struct RingSmem {
  std::uint8_t pieces[kWarps][kDepth][kPieceBytes];
};
struct RingState {
  std::uint64_t arrived[kWarps][kDepth];  // pieces
  std::uint64_t read[kWarps][kDepth];     // and their places free again
};

/// By one lane for each ring: copies the pieces of its warp's walk, in order, while there is room.
class RingFiller {
 public:
  __device__ RingFiller(RingSmem& ring, RingState& state, Walk& walk, int warp)
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
    at_ = at_ + 1 == kDepth ? 0 : at_ + 1;
    if (at_ == 0) parity_ ^= 1;
    known_ = false;
    return true;
  }

 private:
  std::uint8_t (*pieces_)[kPieceBytes];
  std::uint64_t* arrived_;
  std::uint64_t* read_;
  Walk& walk_;
  std::uint64_t policy_;
  Piece next_;
  bool known_ = false;
  int at_ = 0;
  std::uint32_t parity_ = 1;  // of the phase before the first, which counts as complete
};

/// A warp's side of its ring.
class Ring {
 public:
  __device__ Ring(const RingSmem& ring, RingState& state, int warp, int lane)
      : pieces_(ring.pieces[warp]), arrived_(state.arrived[warp]), read_(state.read[warp]), lane_(lane) {}

  /// The i-th piece from the oldest on, once it has arrived.
  __device__ __forceinline__ const std::uint8_t* piece(int i) {
    const int at = at_ + i < kDepth ? at_ + i : at_ + i - kDepth;
    ptx::mbarrier_wait(arrived_ + at, (parity_ >> at) & 1);
    return pieces_[at];
  }
  /// The oldest `count` pieces have been read.
  __device__ __forceinline__ void release(int count) {
    __syncwarp();
    for (int i = 0; i < count; ++i) {
      if (lane_ == 0) ptx::mbarrier_arrive(read_ + at_);
      parity_ ^= 1u << at_;
      at_ = at_ + 1 == kDepth ? 0 : at_ + 1;
    }
  }

  /// The products of x, in shared memory, with the next one or two pieces, rows of k bfloat16, in every lane.
  __device__ __forceinline__ void multiply(int count, int k, const bf16* x, float (&out)[2]) {
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
    release(count);
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

/// A vector that only this warp of the CTA wants, to shared memory.
__device__ __forceinline__ void load_vector(const bf16* from, int k, int lane, bf16* to) {
  __syncwarp();  // what was there has been read
#pragma unroll
  for (int i = 0; i < kMaxK / 256; ++i) {
    const int at = i * 256 + lane * 8;
    if (at < k) ptx::copy_async_16(to + at, from + at);
  }
  ptx::copy_async_wait_all();
  __syncwarp();
}

/// A vector that all warps of all CTAs want, by way of shared memory: if every warp read it from L2, the few
/// slices that have it would take a microsecond. `own(i)` waits for columns i ... i + 7.
struct VectorSmem {
  alignas(16) bf16 x[kMaxK];
  float squares[kWarps];
};
template <class Own>
__device__ __forceinline__ void share_vector(int k, VectorSmem& s, Own&& own_columns) {
  const int own = static_cast<int>(threadIdx.x) * 8;
  sync_warps();  // what was there has been read
  if (own < k) *reinterpret_cast<uint4*>(s.x + own) = own_columns(own);
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

/// The same of the vector / sqrt(mean of its squares + eps) * norm, rounded as a bfloat16 row is.
template <class Own>
__device__ __forceinline__ void share_normalised(const NormWeights& norm, float eps, int k, VectorSmem& s,
                                                 Own&& own_columns) {
  const int own = static_cast<int>(threadIdx.x) * 8;
  sync_warps();  // what was there has been read
  const uint4 v = own < k ? own_columns(own) : make_uint4(0, 0, 0, 0);
  const float row[8] = {low(v.x), high(v.x), low(v.y), high(v.y), low(v.z), high(v.z), low(v.w), high(v.w)};
  float square = 0;
#pragma unroll
  for (const float r : row) square = fmaf(r, r, square);
  square = warp_total(square);
  if (threadIdx.x % 32 == 0) s.squares[threadIdx.x / 32] = square;
  sync_warps();
  square = 0;
#pragma unroll
  for (const float r : s.squares) square += r;
  const float factor = rsqrtf(square / static_cast<float>(k) + eps);
  if (own < k) {
    std::uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] =
          pack2<true>(row[2 * i] * factor * norm.w[2 * i], row[2 * i + 1] * factor * norm.w[2 * i + 1]);
    }
    *reinterpret_cast<uint4*>(s.x + own) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
  sync_warps();
}

}  // namespace flash_mla::sm90::one_token_kernel
