#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/buffer.h"
#include "base/matrix.h"
#include "flash_mla/tensor.h"
#include "model/device/cuda/context.h"
#include "model/device/cuda/linear.h"
#include "model/weights.h"

namespace flash_mla::model {

/// A layer's indexer: it keeps a key of every token beside the latent cache, in the same pages, and chooses the
/// tokens that a token attends to. Keys and queries are rotated by Hadamard's matrix and quantised to e4m3, whatever
/// the latent cache has; products of them are exact, and the choice is the first index_topk by score and position.
class CudaIndexer {
 public:
  /// index_head_dim is 64 or 128.
  CudaIndexer(CudaContext& context, const IndexerWeights& weights);

  /// The keys of the step's tokens into their slots; h (tokens, hidden) is the layer's normalised input.
  void append(const Matrix& h) const;
  /// The context's selection, of all tokens that attend to lists; q_a (tokens, q_lora_rank), normalised.
  void select(const Matrix& h, const Matrix& q_a) const;

  std::size_t bytes_per_page() const;
  void free_cache() { cache_ = {}; }
  void allocate_cache(int num_pages);
  /// Zeros all of it; queued.
  void clear_cache() const;
  void copy_page(int source, int target) const;
  std::span<std::byte> page(int index) const {
    return {cache_.data() + static_cast<std::size_t>(index) * bytes_per_page(), bytes_per_page()};
  }
  /// Of its keys, in words.
  std::string format() const { return "index keys of " + std::to_string(dim_) + " x e4m3"; }

 private:
  /// Quantised queries (tokens, heads * dim) and their weights (tokens, heads), with every factor in them.
  struct Queries {
    Matrix values, weights;
  };
  TensorView cache() const;
  Queries queries(const Matrix& h, const Matrix& q_a) const;
  /// Chooses for `tokens` tokens of each of `requests`, which are those of the step from `first_token` on.
  struct Rows {
    std::int64_t first_token, requests, tokens;
    const std::int32_t* lengths;  ///< (requests): keys that the last token sees
    const std::int32_t* table;    ///< (requests, width): pages
    std::int64_t width;
  };
  void select_rows(const Queries& queries, const Rows& rows) const;

  CudaContext& context_;
  std::int64_t heads_, dim_;
  CudaLinear q_b_, k_;
  Buffer k_norm_, k_norm_bias_;
  Buffer head_weights_;  ///< (heads, hidden) float32
  Buffer cache_;         ///< (pages, kPageSize, dim) e4m3, a page's scales, float32, behind its keys
};

}  // namespace flash_mla::model
