#pragma once

// How the rows of all weights are dealt to the warps of the grid, and the order in which a warp takes its
// rows. Copies run ahead of the products in that order, so both sides ask here.

#include <cuda_bf16.h>

#include <cstdint>

#include "model/cuda/one_token.h"

namespace flash_mla::model::cuda::one_token_kernel {

using bf16 = __nv_bfloat16;

inline constexpr int kWarps = 8, kThreads = 32 * kWarps;  // that multiply; one warp more copies
inline constexpr int kRank = 512, kRope = 64, kKey = kRank + kRope;
inline constexpr int kMostK = 2048;       // of a product: a lane holds 64 of x
inline constexpr int kPieceBytes = 4096;  // of a copy
inline constexpr int kUkRows = 16;        // rows of W_UK in a copy
inline constexpr int kUvRows = 2;         // rows of W_UV in a copy
inline constexpr int kRouterColumns = 1024;
inline constexpr int kMostSlots = 16;     // experts of a token, or slices of a dense layer
inline constexpr int kMostDownRows = 32;  // of a CTA

/// The products of a layer, in order.
enum Stage : int { kQkv, kUk, kUv, kO, kRouter, kPairs, kDown, kStages };

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
  int slices = intermediate > kMostK ? (intermediate + kMostK - 1) / kMostK : 1;
  while (slices <= kMostSlots && intermediate % (8 * slices) != 0) ++slices;
  return slices;
}

__device__ __forceinline__ Ffn ffn_of(const OneToken& p, bool mixture, int slices) {
  const std::int64_t hidden = p.hidden;
  if (mixture) {
    const std::int64_t width = p.moe_intermediate;
    return {p.experts_per_token + p.shared_experts,
            p.shared_experts,
            p.moe_intermediate,
            2 * width * hidden,
            width * hidden,
            width * hidden,
            width};
  }
  const int width = p.intermediate / slices;
  return {slices, slices, width, width * hidden, p.intermediate * hidden, width, p.intermediate};
}

/// What this warp does. Rows are dealt to all CTAs' first warps, then to their second ones, and so on.
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
  /// Of the CTA's rows of all slots of W_down, slot after slot, the warp has a stretch.
  __device__ __forceinline__ int down_begin(int slots, int w) const { return slots * down_rows * w / kWarps; }
};

/// The experts of the mixture layer that was routed last.
struct Choice {
  std::int32_t ids[32];
  float weights[32];
};

/// A copy: `bytes` from `from`.
struct Piece {
  const void* from;
  std::uint32_t bytes;
};

/// Walks through the warp's pieces of all layers.
class Walk {
 public:
  __device__ Walk(const OneToken& p, const Share& share, const Choice& choice)
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
    return layer_ + 1 == p_.num_layers && stage_ + 1 == kStages && at_ >= count_;
  }
  /// Whose pieces come next.
  __device__ __forceinline__ int layer() const { return layer_; }

  /// The next piece, if there is one and it is known which.
  __device__ __forceinline__ bool next(Piece& piece) {
    while (at_ >= count_) {
      if (stage_ + 1 < kStages) {
        ++stage_;
      } else {
        if (layer_ + 1 >= p_.num_layers) return false;
        ++layer_;
        stage_ = kQkv;
      }
      enter();
    }
    const OneTokenLayer& l = p_.layers[layer_];
    const std::int64_t row = share_.index + std::int64_t(at_) * share_.stride;
    const void* base;
    std::int64_t offset;  // elements
    int elements;
    int size = 2;
    switch (stage_) {
      case kQkv:
        base = l.qkv, offset = row * p_.hidden, elements = p_.hidden;
        break;
      case kUk:
        base = l.w_uk, offset = row * kUkRows * p_.nope, elements = kUkRows * p_.nope;
        break;
      case kUv: {
        const int first = (share_.warp + at_ * kWarps) * kUvRows;
        base = l.w_uv, offset = (std::int64_t(share_.uv_head) * p_.v + share_.uv_first + first) * kRank;
        elements = min(kUvRows, share_.uv_rows - first) * kRank;
        break;
      }
      case kO:
        elements = p_.heads * p_.v;
        base = l.o, offset = row * elements;
        break;
      case kRouter: {
        const int parts = router_parts(), part = at_ % parts, first = part * kRouterColumns;
        base = l.router, size = 4;
        offset = (share_.index + std::int64_t(at_ / parts) * share_.stride) * p_.hidden + first;
        elements = min(kRouterColumns, p_.hidden - first);
        break;
      }
      case kPairs: {
        const int pair = share_.index + at_ / 2 * share_.stride;
        while (pair >= slot_end_) ++slot_, slot_end_ += ffn_.width;
        if (slot_ >= ffn_.shared && chosen_ != layer_) return false;
        base = l.gate_up, elements = p_.hidden;
        offset = expert(slot_) * ffn_.gate_slot + std::int64_t(pair - slot_end_ + ffn_.width) * p_.hidden +
                 (at_ % 2 != 0 ? ffn_.up : 0);
        break;
      }
      default: {
        const int at = share_.down_begin(ffn_.slots, share_.warp) + at_;
        while (at >= slot_end_) ++slot_, slot_end_ += share_.down_rows;
        if (slot_ >= ffn_.shared && chosen_ != layer_) return false;
        base = l.down, elements = ffn_.width;
        offset = expert(slot_) * ffn_.down_slot +
                 (share_.down_first + at - slot_end_ + share_.down_rows) * ffn_.down_pitch;
        break;
      }
    }
    piece = {static_cast<const char*>(base) + offset * size, static_cast<std::uint32_t>(elements * size)};
    ++at_;
    return true;
  }

 private:
  __device__ __forceinline__ int router_parts() const {
    return (p_.hidden + kRouterColumns - 1) / kRouterColumns;
  }

  /// Which expert of the layer's weights a slot is.
  __device__ __forceinline__ std::int64_t expert(int slot) const {
    if (p_.layers[layer_].router == nullptr) return slot;
    return slot < ffn_.shared ? p_.num_experts + slot : choice_.ids[slot - ffn_.shared];
  }

  __device__ __forceinline__ void enter() {
    const bool mixture = p_.layers[layer_].router != nullptr;
    at_ = 0;
    switch (stage_) {
      case kQkv:
        ffn_ = ffn_of(p_, mixture, slices_);
        count_ = share_.of(p_.heads * (p_.nope + kRope) + kKey);
        break;
      case kUk:
        count_ = share_.of(p_.heads * (kRank / kUkRows));
        break;
      case kUv:
        count_ = share_.of_cta((share_.uv_rows + kUvRows - 1) / kUvRows);
        break;
      case kO:
        count_ = share_.of(p_.hidden);
        break;
      case kRouter:
        count_ = mixture ? share_.of(p_.num_experts) * router_parts() : 0;
        break;
      case kPairs:
        count_ = 2 * share_.of(ffn_.slots * ffn_.width);
        slot_ = 0, slot_end_ = ffn_.width;
        break;
      default:
        count_ = share_.down_begin(ffn_.slots, share_.warp + 1) - share_.down_begin(ffn_.slots, share_.warp);
        slot_ = 0, slot_end_ = share_.down_rows;
        break;
    }
  }

  const OneToken& p_;
  const Share& share_;
  const Choice& choice_;
  int slices_;
  Ffn ffn_;
  int layer_ = 0, stage_ = kQkv, at_ = 0, count_ = 0;
  int slot_ = 0, slot_end_ = 0;  // of the next piece, and where the slot's pairs or rows end
  int chosen_ = -1;
};

}  // namespace flash_mla::model::cuda::one_token_kernel
