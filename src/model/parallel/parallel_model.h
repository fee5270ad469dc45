#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "comm/thread_group.h"
#include "model/model.h"
#include "model/parallel/partition.h"

namespace flash_mla::model {

/// A model whose weights several ranks have in parts: every step goes to all of them, each of which is a thread of its
/// own, and rank 0's results come back. A step in which a rank fails, or does not come in time, throws
/// comm::RankError, and so does whatever is asked of the model from then on.
class ParallelModel : public Model {
 public:
  /// Makes the model of one rank, which keeps the communicator. Called on the rank's own thread, of all ranks at once.
  using MakeRank = std::function<std::unique_ptr<Model>(int rank, comm::Communicator& communicator)>;
  /// The same of one that shares the experts with ranks of other tokens, too.
  using MakeLinkedRank = std::function<std::unique_ptr<Model>(int rank, const RankLinks& links)>;

  /// Throws what `make` throws on any rank. `timeout`: how long ranks wait for each other within a step.
  ParallelModel(int num_ranks, const MakeRank& make, std::chrono::milliseconds timeout = comm::kTimeout);
  /// Ranks [first, first + num_ranks) of `all`, which share the routed experts. In a step that fails here all others fail.
  ParallelModel(int num_ranks, std::shared_ptr<comm::ThreadGroup> all, int first, const MakeLinkedRank& make,
                std::chrono::milliseconds timeout = comm::kTimeout);
  ~ParallelModel() override;

  int vocab_size() const override { return first().vocab_size(); }
  std::int64_t max_position() const override { return first().max_position(); }
  /// Of all ranks: they share the host's memory, and each has a cache of its own.
  std::size_t bytes_per_page() const override;
  std::size_t free_memory() const override { return first().free_memory(); }
  ScheduleOptions schedule_options(int sequences, bool batch_invariant) const override {
    return first().schedule_options(sequences, batch_invariant);
  }
  void allocate_cache(int num_pages) override;
  void copy_page(int source, int target) override;
  /// Every rank has the same cache, with the same bits: pages are copied from rank 0, and to all.
  std::unique_ptr<PageCopies> make_page_copies() override;
  std::size_t bytes_per_copied_page() const override { return first().bytes_per_page(); }
  std::string page_format() const override { return first().page_format(); }
  int num_plain_layers() const override { return first().num_plain_layers(); }
  std::vector<std::size_t> layer_page_bytes() const override { return first().layer_page_bytes(); }
  Buffer allocate_host(std::size_t bytes) const override { return first().allocate_host(bytes); }
  void reserve(int num_tokens, int num_rows) override;
  void launch(const ForwardBatch& batch) override;
  bool draws_take_masks() const override { return first().draws_take_masks(); }
  void choose(std::span<const TokenRule> rules) override;
  void collect(float* logits, std::int32_t* tokens) override;
  bool has_draft_module() const override { return first().has_draft_module(); }
  void draft(const DraftBatch& batch, std::int32_t* tokens) override;
  bool launches_ahead() const override { return first().launches_ahead(); }
  double weight_bytes() const override;
  double device_seconds() const override { return first().device_seconds(); }
  std::int64_t experts_hit(int num_tokens) override { return first().experts_hit(num_tokens); }
  std::vector<ExpertCounts> expert_counts() const override;
  std::string why_no_expert_counts() const override { return first().why_no_expert_counts(); }
  std::vector<RankStats> rank_stats() const override;
  std::vector<RankSpan> rank_spans() const override;
  std::string broken() const override { return broken_ ? broken_->what() : ""; }

 private:
  class Thread;
  struct Rank {
    std::unique_ptr<comm::Communicator> communicator;
    std::unique_ptr<comm::Communicator> expert_ranks;  ///< or null
    std::unique_ptr<Model> model;
    std::exception_ptr error;  ///< of its last call
    std::unique_ptr<Thread> thread;
    std::vector<float> logits;         ///< that nobody reads
    std::vector<std::int32_t> tokens;  ///< likewise
    RankStats stats;
    RankSpan span;
    double exchange_seconds() const;  ///< so far
  };
  enum class Call { kSetUp, kStep };

  Model& first() const { return *ranks_[0].model; }
  /// f(rank) on all ranks, rank 0's on this thread; throws what they throw.
  template <class F>
  void on_all(Call call, F&& f);
  void raise(Call call);
  void check_alive() const;

  comm::ThreadGroup group_;
  const std::shared_ptr<comm::ThreadGroup> all_;  ///< or null
  std::vector<Rank> ranks_;
  std::optional<comm::RankError> broken_;
  std::vector<std::size_t> logit_rows_;  ///< of the steps that are on their way
};

}  // namespace flash_mla::model
