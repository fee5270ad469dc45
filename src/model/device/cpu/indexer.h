#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/matrix.h"
#include "kernels/attention/indexer/rows.h"
#include "model/device/cpu/context.h"
#include "model/device/cpu/linear.h"
#include "model/weights.h"

namespace flash_mla::model {

/// A layer's indexer: it keeps a key of every token beside the latent cache, in the same pages, and chooses the
/// tokens that a token attends to. Keys and queries stay in the context's dtype, without the rotation and the
/// quantisation that caches of 132 bytes per token have, unless the latent cache is FP8 as well: then they are
/// those of append_index_keys and quantise_index_queries.
class CpuIndexer {
 public:
  CpuIndexer(CpuContext& context, const IndexerWeights& weights);

  /// The keys of the step's tokens into their slots; h (tokens, hidden) is the layer's normalised input.
  void append(const Matrix& h);
  /// The context's selection, for the rows that it now has; q_a (tokens, q_lora_rank), normalised.
  void select(const Matrix& h, const Matrix& q_a);

  std::size_t bytes_per_page() const;
  void free_cache() { cache_ = {}; }
  void allocate_cache(int num_pages);
  void clear_cache() { std::memset(cache_.data(), 0, cache_.bytes()); }
  void copy_page(int source, int target);
  std::span<std::byte> page(int index) const {
    return {cache_.data() + static_cast<std::size_t>(index) * bytes_per_page(), bytes_per_page()};
  }
  /// Of its keys, in words.
  std::string format() const;

 private:
  bool fp8() const { return context_.fp8_index_keys; }
  std::int64_t key_bytes() const { return fp8() ? dim_ : dim_ * context_.element(); }
  void normalise_and_rotate(std::int64_t token, std::byte* key) const;
  void quantise_keys(const Matrix& k);
  /// Queries and weights as the scores take them: where keys are e4m3, rotated by Hadamard's matrix and quantised.
  struct Queries {
    const std::byte* data;
    std::int64_t row_bytes;
    Matrix weights;
  };
  Queries queries(const Matrix& h, const Matrix& q_a);
  /// Chooses for tokens first to first + count - 1 of the step, which are rows of `rows` in that order.
  void select_rows(const indexer::Rows& rows, std::int64_t first, std::int64_t count);

  CpuContext& context_;
  std::int64_t heads_, dim_;
  CpuLinear q_b_, k_;
  std::vector<float> k_norm_, k_norm_bias_;
  cpu::PackedWeight head_weights_;  ///< float32
  /// (pages, kPageSize, index_head_dim); in FP8 a page's scales, float32, follow its keys
  Buffer cache_;
};

}  // namespace flash_mla::model
