#pragma once

#include <memory>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/config.h"
#include "model/ops.h"

namespace flash_mla::model {

using checkpoint::Checkpoint;

/// Two products with a gate between: down(silu(gate(x)) * up(x)).
struct FeedForward {
  std::int64_t intermediate = 0;
  std::unique_ptr<Linear> gate_up;  ///< (2 * intermediate, hidden)
  std::unique_ptr<Linear> down;     ///< (hidden, intermediate)
};

struct MixtureOfExperts {
  std::unique_ptr<Linear> router;
  Buffer correction_bias;  ///< empty but for V3's routing
  std::unique_ptr<Experts> experts;
  FeedForward shared;  ///< intermediate == 0: none
};

struct Attention {
  /// One product for all that reads the layer's input: q_a_proj (or q_proj) above kv_a_proj_with_mqa.
  std::unique_ptr<Linear> qkv_a;
  Buffer q_norm;                ///< empty without q_lora_rank
  std::unique_ptr<Linear> q_b;  ///< null without q_lora_rank
  Buffer kv_norm;
  std::unique_ptr<Linear> kv_b;      ///< (heads * (nope + v), rank), for the un-absorbed form
  std::unique_ptr<HeadLinear> w_uk;  ///< (heads, rank, nope): its key half, transposed for queries
  std::unique_ptr<HeadLinear> w_uv;  ///< (heads, v, rank): its value half
  std::unique_ptr<Linear> o;
};

struct Layer {
  Buffer input_norm, post_attention_norm;
  Attention attention;
  FeedForward dense;     ///< of a dense layer
  MixtureOfExperts moe;  ///< of a mixture layer
};

struct Weights {
  Buffer embedding;
  std::vector<Layer> layers;
  Buffer norm;
  std::unique_ptr<Linear> lm_head;
};

/// kv_b (heads * (nope + v), rank) as its key half, transposed for queries, and its value half: of float, or
/// of std::uint16_t, the bits of bfloat16.
template <class Element>
struct AbsorbedHalves {
  std::vector<Element> uk;  ///< (heads, rank, nope)
  std::vector<Element> uv;  ///< (heads, v, rank)
};
template <class Element>
AbsorbedHalves<Element> split_kv_b(const ModelConfig& config, const Element* kv_b);

/// Reads a checkpoint's weights onto the device. Throws InvalidArgument for a tensor that is missing, has
/// another shape, or holds a NaN or infinity; the message names it.
Weights load_weights(const ModelConfig& config, const Checkpoint& checkpoint, Ops& ops);

/// Random weights, the same ones every time: for benchmarks and load tests.
Weights random_weights(const ModelConfig& config, Ops& ops);

}  // namespace flash_mla::model
