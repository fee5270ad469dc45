#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>

namespace flash_mla::model {

/// Tokens per page of the cache.
inline constexpr int kPageSize = 64;

/// One step over several sequences, each with a run of new tokens (one in decoding, a chunk in prefill). All
/// arrays live on the host and only for the call.
struct ForwardBatch {
  std::span<const std::int32_t> token_ids;  ///< (num_tokens), sequence after sequence
  std::span<const std::int32_t>
      query_starts;  ///< (num_seqs + 1): tokens of sequence i are [starts[i], starts[i+1])
  std::span<const std::int32_t>
      seq_lens;  ///< (num_seqs): tokens in the cache once this step has been appended
  std::span<const std::int32_t> block_table;  ///< (num_seqs, max_blocks): pages of each sequence
  int max_blocks = 0;
  std::span<const std::int32_t> logit_rows;   ///< tokens (indices into token_ids) whose logits are wanted
  std::span<const std::int32_t> greedy_rows;  ///< tokens of which only the likeliest successor is wanted
  /// The same bits for a sequence whatever else is in the batch.
  bool batch_invariant = false;
};

/// A loaded model with its paged latent cache. Position of a sequence's n-th new token is
/// seq_len - new tokens + n; forward appends every new token's latent to the pages before it attends.
class Model {
 public:
  virtual ~Model() = default;
  virtual int vocab_size() const = 0;
  virtual std::int64_t max_position() const = 0;
  virtual std::size_t bytes_per_page() const = 0;  ///< over all layers
  /// (Re-)allocates the cache; contents are lost. Throws std::bad_alloc.
  virtual void allocate_cache(int num_pages) = 0;
  /// Copies one page, in every layer.
  virtual void copy_page(int source, int target) = 0;
  /// Makes room for steps of up to `num_tokens` tokens with `num_rows` logit and greedy rows, so that no
  /// later step has to. Optional; after allocate_cache.
  virtual void reserve(int num_tokens, int num_rows) = 0;
  /// Writes to host memory: logits (logit_rows.size(), vocab_size) float32, and for every greedy row the
  /// token of the largest logit, the first among equals, or -1 where one is NaN or +inf or all are -inf.
  virtual void forward(const ForwardBatch& batch, float* logits, std::int32_t* greedy) = 0;
};

enum class ModelDevice { kAuto, kCpu, kCuda };
enum class ModelPrecision { kAuto, kFloat32, kBFloat16 };

struct ModelOptions {
  ModelDevice device = ModelDevice::kAuto;
  /// Of weights, activations between kernels and cache. kAuto: bfloat16 where the device multiplies it
  /// natively.
  ModelPrecision precision = ModelPrecision::kAuto;
  int num_threads = 0;  ///< CPU: 0 for as many as OpenMP would use
};

/// Loads config and weights of a Hugging Face model directory. Throws InvalidArgument or Unsupported.
std::unique_ptr<Model> load_model(const std::filesystem::path& directory, const ModelOptions& options = {});

}  // namespace flash_mla::model
