#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/matrix.h"
#include "model/device/cpu/context.h"
#include "model/device/cpu/indexer.h"
#include "model/device/cpu/latent_cache.h"
#include "model/device/cpu/linear.h"
#include "model/device/cpu/reduced_linear.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

class CpuAttention : public Attention {
 public:
  CpuAttention(CpuContext& context, const AttentionWeights& weights);

  /// With Rows::kLogits, where the step has a prompt or other tokens whose logits nobody wants: only the logit rows go
  /// on, as absorbed ones.
  void forward(Residual& x, Rows rows) override;

  std::size_t bytes_per_page() const override;
  void free_cache() override;
  void allocate_cache(int num_pages) override;
  void clear_cache() override;
  void copy_page(int source, int target) override;
  std::array<std::span<std::byte>, 2> page(int index) const override;
  std::string page_format() const override;
  bool has_plain_rows() const override;

 private:
  /// The part of the layer's first product that is the queries', and that of latents and keys.
  struct Projected {
    Matrix q, kv, q_a;  ///< q_a: what q was made from, normalised, with q_lora_rank
  };
  using Lists = CpuLatentCache::Lists;
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
  /// Of the tokens that `lists` are of, one behind the other.
  void absorbed_attention(const Matrix& q, const Matrix& out, std::span<const Lists> lists);
  void expanded_attention(const Matrix& q, const Matrix& out);
  std::int64_t whole_tokens(const Chunk& chunk) const;
  void chosen_attention(const Matrix& q, const Matrix& out);
  /// The slots that tokens first to first + count - 1 of the step attend to, as pages of one token.
  void fill_slots(std::int64_t first, std::int64_t count);

  CpuContext& context_;
  std::vector<float> norm_;
  CpuLinear qkv_a_;
  std::vector<float> q_norm_;
  std::unique_ptr<CpuLinear> q_b_;  ///< null: queries are projected directly
  std::vector<float> kv_norm_;
  KeyValueWeights kv_b_;
  CpuReducedLinear o_;
  std::unique_ptr<CpuIndexer> indexer_;        ///< null: attention is dense, or another layer chooses
  std::vector<std::int32_t> slots_, lengths_;  ///< of fill_slots
  std::vector<Lists> lists_;                   ///< of the step's absorbed tokens
  CpuLatentCache cache_;
};

}  // namespace flash_mla::model
