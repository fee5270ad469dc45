#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "base/buffer.h"
#include "base/matrix.h"
#include "model/device/cpu/context.h"
#include "model/device/cpu/linear.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

class CpuAttention : public Attention {
 public:
  CpuAttention(CpuContext& context, const AttentionWeights& weights);

  /// With Rows::kLogits, where the step has a prompt: only the logit rows go on, as absorbed ones.
  void forward(Residual& x, Rows rows) override;

  std::size_t bytes_per_page() const override;
  void free_cache() override { cache_ = {}; }
  void allocate_cache(int num_pages) override;
  void copy_page(int source, int target) override;

 private:
  /// The part of the layer's first product that is the queries', and that of latents and keys.
  struct Projected {
    Matrix q, kv;
  };
  /// kv_b_proj, which is never quantised, in the layouts of both forms of attention.
  struct KeyValueWeights {
    KeyValueWeights(const CpuContext& context, const std::vector<float>& kv_b);
    cpu::PackedWeight both;  ///< (heads * (nope + v), rank)
    CpuHeadLinear uk;        ///< (heads, rank, nope)
    CpuHeadLinear uv;        ///< (heads, v, rank)

   private:
    KeyValueWeights(const CpuContext& context, const std::vector<float>& kv_b,
                    const AbsorbedHalves<float>& halves);
  };

  Projected project(const Matrix& h);
  void rope_and_append(const Projected& projected);
  void attend(const Matrix& q, const Matrix& out);
  void absorbed_attention(const Matrix& q, const Matrix& out);
  void decode(const Matrix& q_latent, const Matrix& out_latent);
  void expanded_attention(const Matrix& q, const Matrix& out);

  CpuContext& context_;
  std::vector<float> norm_;
  CpuLinear qkv_a_;
  std::vector<float> q_norm_;
  std::unique_ptr<CpuLinear> q_b_;  ///< null: queries are projected directly
  std::vector<float> kv_norm_;
  KeyValueWeights kv_b_;
  CpuLinear o_;
  Buffer cache_;  ///< (pages, kPageSize, 1, rank + rope)
};

}  // namespace flash_mla::model
