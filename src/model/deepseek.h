#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/device.h"
#include "model/model.h"
#include "model/weights.h"

namespace flash_mla::model {

/// A DeepSeek-V2 or V3 decoder (arXiv 2405.04434, 2412.19437), written over the layers of a device.
class DeepSeek : public Model {
 public:
  /// Reads all `weights` onto the device, those of the module for multi-token prediction with `draft_module`. Throws
  /// InvalidArgument as they do, or std::bad_alloc.
  DeepSeek(ModelConfig config, std::unique_ptr<Device> device, WeightSource& weights,
           bool draft_module = false);

  int vocab_size() const override { return config_.vocab_size; }
  std::int64_t max_position() const override { return config_.max_position_embeddings; }
  std::size_t bytes_per_page() const override;
  std::size_t free_memory() const override { return device_->free_memory(); }
  ScheduleOptions schedule_options(int sequences, bool batch_invariant) const override {
    return device_->schedule_options(sequences, batch_invariant);
  }
  void allocate_cache(int num_pages) override;
  void copy_page(int source, int target) override;
  std::string page_format() const override;
  int num_plain_layers() const override;
  std::vector<std::size_t> layer_page_bytes() const override;
  bool set_on_layer(const std::function<void(int layer)>& on_layer) override;
  std::unique_ptr<PageCopies> make_page_copies() override;
  Buffer allocate_host(std::size_t bytes) const override { return device_->allocate_host(bytes); }
  void reserve(int num_tokens, int num_rows) override { device_->reserve(num_tokens, num_rows); }
  void launch(const ForwardBatch& batch) override;
  bool draws_take_masks() const override { return device_->chooses_among(); }
  void choose(std::span<const TokenRule> rules) override;
  void collect(float* logits, std::int32_t* tokens) override;
  bool has_draft_module() const override { return module_ != nullptr; }
  void draft(const DraftBatch& batch, std::int32_t* tokens) override;
  bool launches_ahead() const override { return device_->queues(); }
  double device_seconds() const override { return device_->device_seconds(); }
  std::int64_t experts_hit(int num_tokens) override;
  std::vector<ExpertCounts> expert_counts() const override;
  std::string why_no_expert_counts() const override;
  double weight_bytes() const override { return weight_bytes_; }
  void set_weight_bytes(double bytes) { weight_bytes_ = bytes; }

 private:
  struct Layer {
    std::unique_ptr<Attention> attention;
    std::unique_ptr<FeedForward> feed_forward;
  };
  /// For multi-token prediction.
  struct Module {
    std::unique_ptr<MtpInput> input;
    Layer layer;
    std::unique_ptr<Head> head;
  };
  /// A step that has been launched and not collected.
  struct Flight {
    std::size_t num_logit_rows = 0, num_tokens = 0;
    std::unique_ptr<Download> tokens;  ///< null: none are wanted
  };

  Layer make_layer(WeightSource& weights, int layer);
  void forward_pass();
  void start_download(Flight& flight);
  /// Queues one application of the module; returns the tokens of the batch's drawn_rows, or null where it has none.
  /// `num_tokens_before`: those of the application before that the batch can refer to.
  std::unique_ptr<Download> apply_module(const ForwardBatch& batch, const std::vector<std::int32_t>& states,
                                         ModuleStates reads, std::int64_t num_tokens_before);
  /// f of every layer's attention, the module's last.
  template <class F>
  void for_each_cache(F&& f) const {
    for (const Layer& layer : layers_) f(*layer.attention);
    if (module_) f(*module_->layer.attention);
  }

  ModelConfig config_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Embedding> embedding_;
  std::vector<Layer> layers_;
  std::unique_ptr<Head> head_;
  std::unique_ptr<Module> module_;  ///< null: none
  int num_pages_ = 0;
  double weight_bytes_ = 0;
  class Copies;

  std::function<void(int layer)> on_layer_;  ///< null: nobody asks
  std::deque<Flight> flights_;
  Step step_;                           ///< the last that was launched
  Step module_step_;                    ///< of the module's last application
  std::int64_t num_tokens_chosen_ = 0;  ///< that a next step can refer to
};

}  // namespace flash_mla::model
