#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "comm/thread_group.h"
#include "model/model.h"

namespace flash_mla::model {

/// The model of one of several ranks that have tokens of their own and share the experts (ModelOptions::dp). All go
/// through every step together: the module for multi-token prediction, if there is one, as often on each, then the model
/// once, with the tokens that the rank has or with none. Where a rank fails, or does not come in time, that step and all
/// later calls throw comm::RankError on every rank.
class LockStepModel : public Model {
 public:
  /// Makes the model of one rank, which keeps the communicator.
  using MakeRank = std::function<std::unique_ptr<Model>(int rank, comm::Communicator& communicator)>;

  /// Of all ranks, made at once on a thread each. Throws what `make` throws on any. `batch_invariant`: steps are.
  static std::vector<std::unique_ptr<Model>> make(int num_ranks, bool batch_invariant, const MakeRank& make,
                                                  std::chrono::milliseconds timeout = comm::kTimeout);
  /// The same where a model is one of several ranks itself (ParallelModel); `numbers`: of the first rank of each.
  static std::vector<std::unique_ptr<Model>> make(std::vector<int> numbers, bool batch_invariant,
                                                  const MakeRank& make,
                                                  std::chrono::milliseconds timeout = comm::kTimeout);

  int vocab_size() const override { return model_->vocab_size(); }
  std::int64_t max_position() const override { return model_->max_position(); }
  std::size_t bytes_per_page() const override { return model_->bytes_per_page(); }
  std::size_t free_memory() const override { return model_->free_memory(); }
  ScheduleOptions schedule_options(int sequences, bool batch_invariant) const override {
    return model_->schedule_options(sequences, batch_invariant);
  }
  void allocate_cache(int num_pages) override { model_->allocate_cache(num_pages); }
  void copy_page(int source, int target) override { model_->copy_page(source, target); }
  std::unique_ptr<PageCopies> make_page_copies() override { return model_->make_page_copies(); }
  std::size_t bytes_per_copied_page() const override { return model_->bytes_per_copied_page(); }
  std::string page_format() const override { return model_->page_format(); }
  int num_plain_layers() const override { return model_->num_plain_layers(); }
  std::vector<std::size_t> layer_page_bytes() const override { return model_->layer_page_bytes(); }
  Buffer allocate_host(std::size_t bytes) const override { return model_->allocate_host(bytes); }
  void reserve(int num_tokens, int num_rows) override { model_->reserve(num_tokens, num_rows); }
  void launch(const ForwardBatch& batch) override;
  bool draws_take_masks() const override { return model_->draws_take_masks(); }
  void choose(std::span<const TokenRule> rules) override { model_->choose(rules); }
  void collect(float* logits, std::int32_t* tokens) override { model_->collect(logits, tokens); }
  bool has_draft_module() const override { return model_->has_draft_module(); }
  void draft(const DraftBatch& batch, std::int32_t* tokens) override;
  void end_step() override;
  /// Of what this rank's tokens choose, and of what it has run of all ranks' choices.
  std::vector<ExpertCounts> expert_counts() const override { return model_->expert_counts(); }
  std::string why_no_expert_counts() const override { return model_->why_no_expert_counts(); }
  double weight_bytes() const override { return model_->weight_bytes(); }
  double device_seconds() const override { return model_->device_seconds(); }
  std::int64_t experts_hit(int num_tokens) override { return model_->experts_hit(num_tokens); }
  std::vector<RankStats> rank_stats() const override;
  std::vector<RankSpan> rank_spans() const override;
  std::string broken() const override { return broken_ ? broken_->what() : ""; }

 private:
  LockStepModel(std::shared_ptr<comm::ThreadGroup> group, int rank, bool batch_invariant);
  template <class F>
  void take_part(F&& f);
  void join_drafts(const DraftBatch& batch, std::int32_t* tokens);
  ForwardBatch nothing() const;

  std::shared_ptr<comm::ThreadGroup> group_;
  std::unique_ptr<comm::Communicator> communicator_;
  std::unique_ptr<Model> model_;
  const bool batch_invariant_;
  bool drafted_ = false, launched_ = false;  ///< in this step
  double seconds_ = 0;
  RankSpan span_;
  std::optional<comm::RankError> broken_;
};

}  // namespace flash_mla::model
