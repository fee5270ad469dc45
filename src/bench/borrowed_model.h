#pragma once

#include "model/model.h"

namespace flash_mla::bench {

/// A model that outlives the engine it is given to.
class BorrowedModel : public model::Model {
 public:
  explicit BorrowedModel(model::Model& model) : model_(model) {}
  int vocab_size() const override { return model_.vocab_size(); }
  std::int64_t max_position() const override { return model_.max_position(); }
  std::size_t bytes_per_page() const override { return model_.bytes_per_page(); }
  std::size_t free_memory() const override { return model_.free_memory(); }
  ScheduleOptions schedule_options(int sequences, bool batch_invariant) const override {
    return model_.schedule_options(sequences, batch_invariant);
  }
  void allocate_cache(int num_pages) override { model_.allocate_cache(num_pages); }
  void copy_page(int source, int target) override { model_.copy_page(source, target); }
  std::string page_format() const override { return model_.page_format(); }
  std::unique_ptr<model::PageCopies> make_page_copies() override { return model_.make_page_copies(); }
  Buffer allocate_host(std::size_t bytes) const override { return model_.allocate_host(bytes); }
  void reserve(int num_tokens, int num_rows) override { model_.reserve(num_tokens, num_rows); }
  void launch(const model::ForwardBatch& batch) override { model_.launch(batch); }
  bool draws_take_masks() const override { return model_.draws_take_masks(); }
  void choose(std::span<const TokenRule> rules) override { model_.choose(rules); }
  void collect(float* logits, std::int32_t* tokens) override { model_.collect(logits, tokens); }
  bool has_draft_module() const override { return model_.has_draft_module(); }
  void draft(const model::DraftBatch& batch, std::int32_t* tokens) override { model_.draft(batch, tokens); }
  bool launches_ahead() const override { return model_.launches_ahead(); }
  void end_step() override { model_.end_step(); }

 private:
  model::Model& model_;
};

}  // namespace flash_mla::bench
