#pragma once

// How the rows of all weights are dealt to the warps of the grid, and the order in which a warp takes its
// rows. Copies run ahead of the products in that order, so both sides ask here.

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/fused/sm90/one_token.h"

namespace flash_mla::sm90::one_token_kernel {

using bf16 = __nv_bfloat16;

inline constexpr int kWarps = 8, kThreads = 32 * kWarps;  // that multiply; one warp more copies
inline constexpr int kRank = kOneTokenRank, kRope = kOneTokenRope, kKey = kRank + kRope;
inline constexpr int kMaxK = 2048;        // of a product: a lane holds 64 of x
inline constexpr int kPieceBytes = 4096;  // of a copy
inline constexpr int kUkRows = 16;        // rows of W_UK in a copy
inline constexpr int kUvRows = 2;         // rows of W_UV in a copy
inline constexpr int kRouterColumns = 1024;
inline constexpr int kMaxSlots = 16;     // experts of a token, or slices of a dense layer
inline constexpr int kMaxDownRows = 32;  // of a CTA

/// The products of a layer, in order. Of one token kDown is W_down of all experts, of several that of the shared
/// ones: they have more to do there, and are dealt for themselves.
enum Stage : int { kQkv, kUk, kUv, kO, kRouter, kSharedPairs, kPairs, kDown, kRoutedDown };
template <int kTokens>
inline constexpr int kStages = kTokens > 1 ? kRoutedDown + 1 : kRoutedDown;

/// A layer's feed-forward network as experts of `width` outputs each ("slots"): the shared ones first, then
/// the routed ones in the order of their choice. A dense layer's is cut into slices that work like shared
/// experts.
struct Ffn {
  int slots, shared, width;
  std::int64_t gate_slot, up;  // elements from one expert's gate rows to the next one's; from gate to up
  std::int64_t down_slot, down_pitch;  // from one expert's W_down to the next one's; from row to row
};

/// Slices of a dense layer: the fewest that are narrow enough.
__host__ __device__ inline int dense_slices(int intermediate) {
  int slices = intermediate > kMaxK ? (intermediate + kMaxK - 1) / kMaxK : 1;
  while (slices <= kMaxSlots && intermediate % (8 * slices) != 0) ++slices;
  return slices;
}

__device__ __forceinline__ Ffn ffn_of(const OneToken& p, bool mixture, int slices) {
  const std::int64_t hidden = p.hidden;
  if (mixture) {
    const std::int64_t width = p.moe_intermediate;
    return {p.routing.experts_per_token + p.routing.shared_experts,
            p.routing.shared_experts,
            p.moe_intermediate,
            2 * width * hidden,
            width * hidden,
            width * hidden,
            width};
  }
  const int width = p.intermediate / slices;
  return {slices, slices, width, width * hidden, p.intermediate * hidden, width, p.intermediate};
}

/// What this warp does. Rows are dealt to all CTAs' first warps, then to their second ones, and so on; pairs
/// of gate and up rows, those of shared and those of routed experts for themselves, in stretches.
struct Share {
  int warp, lane, cta, ctas, index, stride;
  int uv_head, uv_first, uv_rows;  // of this CTA, in W_UV; no rows: none
  int down_first, down_rows;       // of this CTA, in W_down

  __device__ Share(const OneToken& p, int of_warp)
      : warp(of_warp),
        lane(static_cast<int>(threadIdx.x) % 32),
        cta(static_cast<int>(blockIdx.x)),
        ctas(static_cast<int>(gridDim.x)),
        index(warp * ctas + cta),
        stride(kWarps * ctas) {
    const int parts = ctas / p.heads, part = cta % parts;
    uv_head = cta / parts;
    uv_first = p.v * part / parts;
    uv_rows = uv_head < p.heads ? p.v * (part + 1) / parts - uv_first : 0;
    down_first = p.hidden * cta / ctas;
    down_rows = p.hidden * (cta + 1) / ctas - down_first;
  }
  /// Of n dealt rows, this warp's: index, index + stride, ...
  __device__ __forceinline__ int of(int n) const { return n > index ? (n - index - 1) / stride + 1 : 0; }
  /// Of n rows dealt to the warps of the CTA.
  __device__ __forceinline__ int of_cta(int n) const { return n > warp ? (n - warp - 1) / kWarps + 1 : 0; }
  /// Of n rows dealt in stretches, where those of this warp begin, or end.
  __device__ __forceinline__ int begin_of(int n) const {
    return static_cast<int>(std::int64_t(n) * index / stride);
  }
  __device__ __forceinline__ int end_of(int n) const {
    return static_cast<int>(std::int64_t(n) * (index + 1) / stride);
  }
  /// Of the CTA's rows of all slots of W_down, slot after slot, the warp has a stretch.
  __device__ __forceinline__ int down_begin(int slots, int w) const { return slots * down_rows * w / kWarps; }
};

/// The routed experts that any of several tokens has chosen, each once.
template <int kTokens>
struct ExpertUnion {
  static constexpr int kMost = kTokens * kMaxSlots;
  int count;
  std::int32_t expert[kMost];
  std::uint32_t tokens[kMost];  // as bits
  std::uint32_t places[kMost];  // a byte for each token: which of its choices it is

  __device__ __forceinline__ int place(int i, int token) const { return places[i] >> 8 * token & 0xFF; }
};
template <>
struct ExpertUnion<1> {};

/// The experts of the mixture layer that was routed last.
template <int kTokens>
struct Choice : ExpertUnion<kTokens> {
  std::int32_t ids[kTokens][32];
  float weights[kTokens][32];

  /// The i-th routed expert that the layer needs.
  __device__ __forceinline__ int routed(int i) const {
    if constexpr (kTokens > 1) {
      return this->expert[i];
    } else {
      return ids[0][i];
    }
  }
};

/// A copy: `bytes` from `from`.
struct Piece {
  const void* from;
  std::uint32_t bytes;
};

/// Walks through the warp's pieces of all layers. Most of them lie at equal distances: what has to be quick,
/// once for every piece, is an addition.
template <int kTokens>
class Walk {
 public:
  __device__ Walk(const OneToken& p, const Share& share, const Choice<kTokens>& choice)
      : p_(p), share_(share), choice_(choice), slices_(dense_slices(p.intermediate)) {
    enter();
  }

  /// Whether the next pieces depend on the layer's choice; and that it has been made.
  __device__ __forceinline__ bool wants_choice() const {
    return stage_ >= kPairs && chosen_ != layer_ && p_.layers[layer_].router != nullptr;
  }
  __device__ __forceinline__ void chosen() { chosen_ = layer_; }

  /// No piece is left.
  __device__ __forceinline__ bool done() const {
    return left_ == 0 && layer_ + 1 == p_.num_layers && stage_ + 1 == kStages<kTokens> && at_ >= end_;
  }
  /// Whose pieces come next.
  __device__ __forceinline__ int layer() const { return layer_; }

  /// The next piece, if there is one and it is known which.
  __device__ __forceinline__ bool next(Piece& piece) {
    if (left_ == 0 && !find()) return false;
    piece = {from_, bytes_};
    from_ += other_ ? back_ : ahead_;
    other_ = !other_;
    --left_;
    return true;
  }

 private:
  /// Pieces of `elements` of `size` bytes each, `count` of them `distance` elements apart.
  __device__ __forceinline__ void set(const void* base, std::int64_t first, int elements, int count,
                                      std::int64_t distance, int size = 2) {
    from_ = static_cast<const char*>(base) + first * size;
    bytes_ = static_cast<std::uint32_t>(elements * size);
    ahead_ = back_ = distance * size;
    left_ = count;
    other_ = false;
  }

  /// The next pieces that lie at equal distances.
  __device__ __forceinline__ bool find() {
    while (at_ >= end_) {
      if constexpr (kTokens > 1) {
        if (unknown_) {  // how many pieces there are depends on the choice
          if (wants_choice()) return false;
          unknown_ = false;
          enter();
          continue;
        }
      }
      if (stage_ + 1 < kStages<kTokens>) {
        ++stage_;
      } else {
        if (layer_ + 1 >= p_.num_layers) return false;
        ++layer_;
        stage_ = kQkv;
      }
      enter();
    }
    const OneTokenLayer& l = p_.layers[layer_];
    if (stage_ == kUv) {
      const int first = (share_.warp + at_ * kWarps) * kUvRows;
      set(l.w_uv, (std::int64_t(share_.uv_head) * p_.v + share_.uv_first + first) * kRank,
          min(kUvRows, share_.uv_rows - first) * kRank, 1, 0);
      ++at_;
      return true;
    }
    if (stage_ == kRouter) {
      const int parts = router_parts(), first = at_ % parts * kRouterColumns;
      set(l.router, (share_.index + std::int64_t(at_ / parts) * share_.stride) * p_.hidden + first,
          min(kRouterColumns, p_.hidden - first), 1, 0, 4);
      ++at_;
      return true;
    }
    if (stage_ < kRouter) {
      const void* base = stage_ == kQkv ? l.qkv : stage_ == kUk ? l.w_uk : l.o;
      const int elements = stage_ == kQkv ? p_.hidden : stage_ == kUk ? kUkRows * p_.nope : p_.heads * p_.v;
      set(base, std::int64_t(share_.index) * elements, elements, end_ - at_,
          std::int64_t(share_.stride) * elements);
      at_ = end_;
      return true;
    }
    // Within one slot.
    const int size = stage_ >= kDown ? share_.down_rows : ffn_.width, slot = at_ / size;
    if (slot >= ffn_.shared && chosen_ != layer_) return false;
    const int row = at_ - slot * size, count = min(end_ - at_, size - row);
    const std::int64_t expert = p_.layers[layer_].router == nullptr ? slot
                                : slot < ffn_.shared                ? p_.routing.num_experts + slot
                                                                    : choice_.routed(slot - ffn_.shared);
    if (stage_ < kDown) {
      set(l.gate_up, expert * ffn_.gate_slot + std::int64_t(row) * p_.hidden, p_.hidden, 2 * count, 0);
      ahead_ = ffn_.up * 2;
      back_ = (p_.hidden - ffn_.up) * 2;
    } else {
      set(l.down, expert * ffn_.down_slot + (share_.down_first + row) * ffn_.down_pitch, ffn_.width, count,
          ffn_.down_pitch);
    }
    at_ += count;
    return true;
  }

  __device__ __forceinline__ int router_parts() const {
    return (p_.hidden + kRouterColumns - 1) / kRouterColumns;
  }

  /// Which rows of the stage are the warp's. The pairs are two stages: of shared and of routed experts.
  __device__ __forceinline__ void enter() {
    const bool mixture = p_.layers[layer_].router != nullptr;
    at_ = 0;
    switch (stage_) {
      case kQkv:
        ffn_ = ffn_of(p_, mixture, slices_);
        end_ = share_.of(p_.heads * (p_.nope + kRope) + kKey);
        break;
      case kUk:
        end_ = share_.of(p_.heads * (kRank / kUkRows));
        break;
      case kUv:
        end_ = share_.of_cta((share_.uv_rows + kUvRows - 1) / kUvRows);
        break;
      case kO:
        end_ = share_.of(p_.hidden);
        break;
      case kRouter:
        end_ = mixture ? share_.of(p_.routing.num_experts) * router_parts() : 0;
        break;
      case kSharedPairs:
        at_ = share_.begin_of(ffn_.shared * ffn_.width);
        end_ = share_.end_of(ffn_.shared * ffn_.width);
        break;
      case kPairs:
        if constexpr (kTokens > 1) {
          end_ = 0;
          unknown_ = wants_choice();
          if (unknown_) break;
          if (mixture) ffn_.slots = ffn_.shared + choice_.count;
        }
        at_ = ffn_.shared * ffn_.width + share_.begin_of((ffn_.slots - ffn_.shared) * ffn_.width);
        end_ = ffn_.shared * ffn_.width + share_.end_of((ffn_.slots - ffn_.shared) * ffn_.width);
        break;
      case kDown: {
        const int slots = kTokens > 1 ? ffn_.shared : ffn_.slots;
        at_ = share_.down_begin(slots, share_.warp);
        end_ = share_.down_begin(slots, share_.warp + 1);
        break;
      }
      default:
        at_ = ffn_.shared * share_.down_rows + share_.down_begin(ffn_.slots - ffn_.shared, share_.warp);
        end_ = ffn_.shared * share_.down_rows + share_.down_begin(ffn_.slots - ffn_.shared, share_.warp + 1);
        break;
    }
  }

  const OneToken& p_;
  const Share& share_;
  const Choice<kTokens>& choice_;
  int slices_;
  Ffn ffn_;
  int layer_ = 0, stage_ = kQkv, at_ = 0, end_ = 0;  // rows or pieces of the stage
  int chosen_ = -1;
  const char* from_ = nullptr;  // the next piece
  std::int64_t ahead_ = 0, back_ = 0;
  std::uint32_t bytes_ = 0;
  int left_ = 0;
  bool other_ = false;
  bool unknown_ = false;  // the stage's pieces, until the choice is made
};

}  // namespace flash_mla::sm90::one_token_kernel
