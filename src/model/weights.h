#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/quantized.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/config.h"
#include "flash_mla/tensor.h"
#include "model/parallel/partition.h"

namespace flash_mla::model {

using checkpoint::Checkpoint;
using checkpoint::ModelConfig;

// The weights of a model as a device gets them to make its layers (device.h): sizes, and how to read them
// when there is room. Vectors (norms, biases) are always float32. Of a model that several ranks share these are a rank's part
// (partition.h): `heads` is the rank's number then, and so are the sizes named with it below.

/// A matrix that is read when it is asked for. rows == 0: the layer has none.
struct Weight {
  std::int64_t rows = 0, columns = 0;
  std::vector<std::string> tensors;  ///< of the checkpoint, from top to bottom; or none
  /// Writes its rows * columns elements to host memory, row-major, in the type that the weights were asked
  /// for. Empty: the device makes them up. Throws InvalidArgument, naming the tensor.
  std::function<void(void*)> read;
  /// The form in which all of it is stored, if that is quantised; then `read_quantized` writes it as it is: codes
  /// (rows, columns) and scales (rows, groups). It throws as `read` does.
  std::optional<QuantizedFormat> stored;
  std::function<void(std::uint8_t* codes, float* scales)> read_quantized;

  std::int64_t size() const { return rows * columns; }
};

/// Of the indexer of sparse attention. Rope dimensions come first in a head, and pairs are neighbours.
struct IndexerWeights {
  Weight q_b;  ///< (index heads * index dim, q_lora_rank); none without an indexer
  Weight k;    ///< (index dim, hidden)
  std::vector<float> k_norm, k_norm_bias;  ///< a LayerNorm's
  Weight head_weights;                     ///< (index heads, hidden), always float32
};

struct AttentionWeights {
  std::vector<float> norm;  ///< of the layer's input (hidden)
  /// One product for all that reads it: q_a_proj (or q_proj) above kv_a_proj_with_mqa.
  Weight qkv_a;
  std::vector<float> qkv_a_bias;  ///< or empty
  std::vector<float> q_norm;      ///< empty without q_lora_rank
  Weight q_b;                     ///< (heads * (nope + rope), q_lora_rank); none without
  std::vector<float> kv_norm;
  IndexerWeights indexer;
  Weight kv_b;  ///< (heads * (nope + v), rank)
  Weight o;     ///< (hidden, heads * v); of an exact partition (its share of hidden, all heads * v)
  std::vector<float> o_bias;  ///< of o's rows; or empty: rank 0 alone adds it to a sum
};

struct FeedForwardWeights {
  std::vector<float> norm;
  Weight gate_up;  ///< (2 * intermediate, hidden): gate_proj above up_proj; of both the rank's share
  Weight down;     ///< (hidden, intermediate), of whose columns, or if exact rows, the rank has its share
};

struct ExpertWeights {
  Weight gate_up;  ///< (2 * intermediate, hidden)
  Weight down;     ///< (hidden, intermediate)
};

struct MixtureWeights {
  std::vector<float> norm;
  Weight router;                       ///< (n_routed_experts, hidden), always float32
  std::vector<float> correction_bias;  ///< empty but for V3's routing
  std::int64_t intermediate = 0;       ///< of an expert
  /// A routed expert's. Empty: the device makes them up.
  std::function<ExpertWeights(int e)> expert;
  /// Of each routed expert, the ranks that have it, ascending. Empty: this one has all.
  std::vector<std::vector<int>> ranks;
  Weight shared_gate_up,
      shared_down;  ///< the shared experts as one network, in parts like a dense one's; or none
};

struct HeadWeights {
  std::vector<float> norm;
  Weight weight;  ///< (vocab_size, hidden), of whose rows the rank has its share
};

/// Of the module for multi-token prediction (arXiv 2412.19437, section 2.2), besides its decoder layer, which is layer
/// num_hidden_layers. Embedding and LM head are the model's.
struct MtpWeights {
  std::vector<float> token_norm, state_norm;  ///< enorm, hnorm
  Weight projection;  ///< eh_proj (hidden, 2 * hidden): columns of the token, then those of the state
  std::vector<float> model_norm;  ///< the model's last norm, which its states have gone through
  std::vector<float> head_norm;   ///< shared_head.norm, which the module's have
};

/// Gives the weights of a model; it must live as long as what it gives is read.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual Weight embedding() = 0;  ///< (vocab_size, hidden)
  virtual AttentionWeights attention(int layer) = 0;
  virtual FeedForwardWeights feed_forward(int layer) = 0;  ///< of a dense layer
  virtual MixtureWeights mixture(int layer) = 0;           ///< of a mixture layer
  virtual HeadWeights head() = 0;
  /// Whether there is a module for multi-token prediction; then mtp() and layer num_hidden_layers are its.
  virtual bool has_mtp() const { return false; }
  virtual MtpWeights mtp() { return {}; }
};

/// Whether a checkpoint has a module for multi-token prediction that the model can use.
bool has_module(const ModelConfig& config, const Checkpoint& checkpoint);

/// A checkpoint's, in float32 or bfloat16. It and what it gives throw InvalidArgument for a tensor that is
/// missing, has another shape, or holds a NaN or infinity; the message names it. Config, the whole model's, and
/// checkpoint must outlive it.
std::unique_ptr<WeightSource> checkpoint_weights(const ModelConfig& config, const Checkpoint& checkpoint,
                                                 DType dtype, const Partition& partition = {});

/// Random ones in float32, the same every time and of every partition; with `made_up_by_device` the
/// matrices are left to the device. For benchmarks and load tests. `config` must outlive it. `with_module`: of a module
/// for multi-token prediction too, which any model but one whose layers share indices can have.
std::unique_ptr<WeightSource> random_weights(const ModelConfig& config, bool made_up_by_device,
                                             bool with_module = false, const Partition& partition = {});

/// kv_b (heads * (nope + v), rank), of the heads of `config`, as its key half, transposed for queries, and its value
/// half: of float, or of std::uint16_t, the bits of bfloat16.
template <class Element>
struct AbsorbedHalves {
  std::vector<Element> uk;  ///< (heads, rank, nope)
  std::vector<Element> uv;  ///< (heads, v, rank)
};
template <class Element>
AbsorbedHalves<Element> split_kv_b(const ModelConfig& config, const Element* kv_b);

}  // namespace flash_mla::model
