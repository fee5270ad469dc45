#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "base/buffer.h"
#include "base/matrix.h"
#include "model/device/cuda/context.h"
#include "model/device/cuda/indexer.h"
#include "model/device/cuda/latent_cache.h"
#include "model/device/cuda/linear.h"
#include "model/device/cuda/step_data.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

class CudaAttention : public Attention {
 public:
  CudaAttention(CudaContext& context, const AttentionWeights& weights);

  /// All rows go on, whatever `rows` says.
  void forward(Residual& x, Rows rows) override;

  std::size_t bytes_per_page() const override;
  void free_cache() override;
  void allocate_cache(int num_pages) override;
  void clear_cache() override;
  void copy_page(int source, int target) override;
  std::array<std::span<std::byte>, 2> page(int index) const override;
  std::string page_format() const override;
  bool has_plain_rows() const override;

  /// (hidden) float32: of the layer's input.
  const float* norm() const { return floats(norm_); }

 private:
  /// The part of the layer's first product that is the queries', and that of latents and keys.
  struct Projected {
    Matrix q, kv;
    Matrix q_a{};  ///< what q was made from, normalised; with q_lora_rank
  };
  /// kv_b_proj in the layouts of both forms of attention.
  struct KeyValueWeights {
    KeyValueWeights(CudaContext& context, const Weight& kv_b);
    CudaLinear both;    ///< (heads * (nope + v), rank)
    CudaHeadLinear uk;  ///< (heads, rank, nope)
    CudaHeadLinear uv;  ///< (heads, v, rank)

   private:
    KeyValueWeights(CudaContext& context, const Weight& kv_b, const std::uint16_t* values);
    KeyValueWeights(CudaContext& context, const Weight& kv_b, const std::uint16_t* values,
                    const AbsorbedHalves<std::uint16_t>& halves);
  };

  void list(sm90::OneTokenLayer& layer) const;
  Projected project(const Matrix& h);
  Matrix key_rows(std::int64_t tokens);
  void absorbed_attention(const Projected& projected, const Matrix& out);
  void decode(const Matrix& q_latent, const Matrix& out_latent);
  void rope_and_append(const Projected& projected, std::int64_t first_token);
  void expanded_attention(const Matrix& q, const Matrix& out);
  void gather_and_expand(const StepData::Group& group);
  void attend_sm90(const StepData::Group& group, const Matrix& q, const Matrix& out);
  void attend_plain(const StepData::Group& group, const Matrix& q, const Matrix& out);
  void listed_attention(const Matrix& q, const Matrix& out);

  CudaContext& context_;
  Buffer norm_;
  CudaLinear qkv_a_;
  Buffer q_norm_;
  std::unique_ptr<CudaLinear> q_b_;  ///< null: queries are projected directly
  Buffer kv_norm_;
  KeyValueWeights kv_b_;
  CudaLinear o_;
  std::unique_ptr<CudaIndexer> indexer_;  ///< null: attention is dense, or another layer chooses
  CudaLatentCache cache_;
};

}  // namespace flash_mla::model
