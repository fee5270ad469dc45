#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "engine/balance.h"
#include "engine/prefix_loader.h"
#include "flash_mla/engine.h"
#include "kv/page_pool.h"

namespace flash_mla::engine {

struct PeerTicket;
struct TierTicket;

/// A sequence as the scheduler sees it. The engine adds its own members by deriving.
struct Sequence {
  /// Unique; smaller is earlier. Of one request's continuations, consecutive.
  std::uint64_t order = 0;
  std::vector<std::int32_t> tokens;  ///< prompt and what has been generated
  std::int64_t cached_tokens = 0;    ///< found in the prefix cache when it was first admitted
  int preemptions = 0;
  /// The logits of its tokens from this one on are wanted: they are computed even where the cache has them.
  std::optional<std::int64_t> score_from;
  /// What may follow `tokens`, to be checked in the next step that is planned, as far as there is room.
  std::vector<std::int32_t> drafts;

  /// Tokens whose latents are in the cache.
  std::int64_t num_computed() const { return pages.num_tokens(); }
  std::int64_t num_remaining() const { return static_cast<std::int64_t>(tokens.size()) - num_computed(); }

  // The scheduler's own.
  kv::SequencePages pages;
  std::int64_t rank = 0;  // its place in the queue: smaller goes first
  bool admitted = false;  // at least once
  bool running = false;
  bool loading = false;    // its pages are being filled from a tier
  bool scheduled = false;  // in the plan that is being made

  /// Where its pages come from, or go to, until the prefix loader has taken it.
  std::optional<BootstrapRoom> room;

  // The prefix loader's own.
  std::shared_ptr<TierTicket> ticket;       // null: nothing is looked up or loaded
  std::int64_t num_stored = 0;              // tokens that tiers have, or have been offered
  std::shared_ptr<PeerTicket> peer_ticket;  // null: there is no room
};

struct SchedulerOptions {
  int max_batch_size = 128;                  ///< sequences that hold pages
  int max_tokens_per_step = 2048;            ///< >= max_batch_size
  int max_scored_tokens = kMaxScoredTokens;  ///< per step, of sequences with score_from
  int max_drafts = 0;                        ///< per step, of all sequences
};

/// Throws InvalidArgument for options out of range.
void check(const SchedulerOptions& options);

/// What one sequence does in a step: tokens [begin, begin + count) go through the model.
struct ScheduledWork {
  Sequence* sequence = nullptr;
  std::int64_t begin = 0;
  int count = 0;
  bool decoding = false;             ///< a single token after others of the same sequence
  bool samples = false;              ///< the last of them is the sequence's last: a token is to be chosen
  std::vector<std::int32_t> drafts;  ///< go through the model behind them
  int num_drafts() const { return static_cast<int>(drafts.size()); }
};

struct StepPlan {
  std::vector<ScheduledWork> work;
  std::vector<kv::PageCopy> copies;  ///< to be made in this order before the model runs
  std::vector<Sequence*> preempted;
  int num_tokens = 0;  ///< with drafts
  int num_scored = 0;  ///< of which of sequences with score_from
};

/// Decides what runs in a step: continuous batching with chunked prefill.
///
/// Every running sequence that is past its prompt gets its one token. What is left of max_tokens_per_step
/// goes to prompts, running or waiting, in the order of their rank: prompt length plus max_tokens_per_step
/// for every step that passed before the arrival. Of requests that arrive together the shortest goes first,
/// and a request can be overtaken only by those that arrive within the steps which its own prompt takes. When
/// the first in line does not fit into the pool, nobody behind it is admitted; so nobody starves.
///
/// A sequence joins if the pool has pages for its whole prompt. When continuations outgrow the pool, the
/// latest arrival lets go of its pages and returns to the queue with its old rank, to be computed again (its
/// pages are often still in the prefix cache). The earliest arrival is never preempted, so something always
/// finishes.
///
/// Drafts go along behind a sequence's one token where neither a prompt of this step has a use for the place nor
/// the prefix cache for the page.
///
/// With a prefix loader, a sequence is looked up when it is queued. While the answer is awaited others may overtake it;
/// what has been found is loaded into the pages that it gets when it joins, and only then it runs.
///
/// Pure logic over the PagePool's counts: no model, no clock, no thread.
class Scheduler {
 public:
  struct Counters {
    std::int64_t tokens_looked_up = 0;  ///< of prompts, when first admitted
    std::int64_t tokens_hit = 0;        ///< of which in the prefix cache
    std::int64_t preemptions = 0;
  };

  /// Throws InvalidArgument for options out of range. `loader` may be null.
  Scheduler(const SchedulerOptions& options, kv::PagePool& pool, PrefixLoader* loader = nullptr);

  /// Queues a sequence that has tokens. Its whole length must fit into the pool. It stays the caller's and
  /// must live until finish().
  void add(Sequence& sequence);

  /// A continuation beside `parent` with the same tokens: runs along on shared pages if the batch has room,
  /// else it waits for its turn.
  void fork(const Sequence& parent, Sequence& child);

  /// The next step. Sequences in it must be committed before the next plan.
  StepPlan plan();

  /// The step after the last plan before that has been committed: one more token for each of `continuing`,
  /// which are sequences of that plan at their last token and get one more from it. The token's place in
  /// their `tokens` is still empty. Nothing, if the pool has no pages left for it or if a sequence could join
  /// instead: then plan() must decide, after the commits. What is planned here is committed like any other
  /// plan.
  std::optional<StepPlan> plan_ahead(std::span<Sequence* const> continuing);

  /// The model has run `work`; of its drafts nothing counts yet.
  void commit(const ScheduledWork& work);
  /// The first draft of `sequence` behind what has been committed is now its last token.
  void commit_draft(Sequence& sequence);
  /// Whatever drafts are left of the last step's do not count: pages that were for them alone go back.
  void drop_drafts(Sequence& sequence);

  /// The sequence leaves, running or waiting. `keep` as in kv::PagePool::release.
  void finish(Sequence& sequence, bool keep = true);

  int num_running() const { return static_cast<int>(running_.size()); }
  int num_waiting() const { return static_cast<int>(waiting_.size() + loading_.size()); }
  bool idle() const { return running_.empty() && num_waiting() == 0; }
  /// What has yet to be done.
  RankLoad backlog() const;
  const Counters& counters() const { return counters_; }
  std::span<Sequence* const> running() const { return running_; }

 private:
  struct ByRank {
    bool operator()(const Sequence* a, const Sequence* b) const {
      return std::pair(a->rank, a->order) < std::pair(b->rank, b->order);
    }
  };

  /// Sequences that hold pages.
  int num_active() const { return static_cast<int>(running_.size() + loading_.size()); }
  void look_up(Sequence& sequence);
  bool is_awaited(Sequence& sequence);
  Sequence* next_to_join();
  void take_loaded();
  void load(Sequence& sequence);
  void plan_decoding(StepPlan& plan);
  void plan_prefill(StepPlan& plan);
  void plan_drafts(StepPlan& plan);
  bool reserve(Sequence& sequence, std::int64_t num_tokens, StepPlan& plan);
  std::int64_t promised_pages() const;
  bool fits(const Sequence& sequence) const;
  bool try_to_join(Sequence& sequence);
  void schedule(Sequence& sequence, int count, StepPlan& plan);
  void preempt(Sequence& sequence, StepPlan& plan);
  void start(Sequence& sequence);
  void stop(Sequence& sequence);

  SchedulerOptions options_;
  kv::PagePool& pool_;
  PrefixLoader* loader_;  // or null
  std::int64_t step_ = 0;
  std::vector<Sequence*> running_;  // earliest first
  std::vector<Sequence*> loading_;
  std::set<Sequence*, ByRank> waiting_;
  Counters counters_;
};

}  // namespace flash_mla::engine
