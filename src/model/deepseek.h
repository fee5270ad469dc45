#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "model/model.h"
#include "model/ops.h"
#include "model/weights.h"

namespace flash_mla::model {

/// A DeepSeek-V2 or V3 decoder (arXiv 2405.04434, 2412.19437), written over the operations of a device.
class DeepSeek : public Model {
 public:
  /// `weights` were made by `ops`.
  DeepSeek(ModelConfig config, Weights weights, std::unique_ptr<Ops> ops);

  int vocab_size() const override { return config_.vocab_size; }
  std::int64_t max_position() const override { return config_.max_position_embeddings; }
  std::size_t bytes_per_page() const override;
  std::size_t free_memory() const override { return ops_->free_memory(); }
  ScheduleOptions schedule_options(int sequences, bool batch_invariant) const override {
    return ops_->schedule_options(sequences, batch_invariant);
  }
  void allocate_cache(int num_pages) override;
  void copy_page(int source, int target) override;
  void reserve(int num_tokens, int num_rows) override;
  void launch(const ForwardBatch& batch) override;
  void collect(float* logits, std::int32_t* tokens) override;
  bool launches_ahead() const override { return ops_->queues(); }
  double device_seconds() const override { return ops_->device_seconds(); }
  std::int64_t experts_hit(int num_tokens) override;

 private:
  void begin(Step& step);
  void layers(Step& step);
  Matrix layer_by_layer(const Step& step, Matrix x, Step& rest);
  /// The part of the layer's first product that is the queries', and that of latents and keys.
  struct Projected {
    Matrix q, kv;
  };
  Projected project(const Attention& weights, Matrix h);
  void attend(const Attention& weights, const Buffer& cache, Matrix q, const Matrix* kv, Matrix x);
  void feed_forward(const FeedForward& weights, Matrix h, Matrix x);
  void mixture(const Layer& layer, const Buffer& ids, Matrix h, Matrix x, const Buffer* next_norm);

  std::size_t layer_page_bytes() const;
  /// (rows, columns) activations in a buffer that grows and stays.
  Matrix activations(Buffer& buffer, std::int64_t rows, std::int64_t columns);
  Matrix activations(Buffer& buffer, std::int64_t rows, std::int64_t columns, DType dtype);

  ModelConfig config_;
  std::unique_ptr<Ops> ops_;
  Weights weights_;
  int num_pages_ = 0;
  std::vector<Buffer> caches_;  ///< one per layer: (pages, kPageSize, 1, kv_lora_rank + qk_rope_head_dim)

  /// A step that has been launched and not collected.
  struct Flight {
    std::size_t num_logit_rows = 0, num_tokens = 0;
    std::unique_ptr<Download> tokens;  ///< null: none are wanted
  };
  std::deque<Flight> flights_;
  Step step_;                           ///< the last that was launched
  std::int64_t num_tokens_chosen_ = 0;  ///< that a next step can refer to

  std::int64_t num_absorbed_ = 0;  ///< of the step that runs
  Buffer x_, h_, qkv_a_, q_a_, q_, q_latent_, out_latent_, attended_, act_, expert_weights_;
  std::vector<Buffer> expert_ids_;  ///< of each layer: (tokens, experts_per_token_) int32
  int experts_per_token_;           ///< the folded shared ones counted in
  Buffer last_x_, last_q_, last_, logits_, tokens_;
};

}  // namespace flash_mla::model
