#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/balance.h"
#include "engine/inbox.h"
#include "engine/module_drafts.h"
#include "engine/peer_hub.h"
#include "engine/peer_loader.h"
#include "engine/prefix_loader.h"
#include "engine/requests.h"
#include "engine/rooms_and_tiers.h"
#include "engine/scheduler.h"
#include "engine/speculation.h"
#include "engine/statistics.h"
#include "engine/step_pipeline.h"
#include "engine/tier_transfers.h"
#include "engine/token_chooser.h"
#include "flash_mla/engine.h"
#include "kv/cache_log.h"
#include "kv/page_pool.h"
#include "model/model.h"

namespace flash_mla::engine {

/// A model with its cache, and the requests that run on it: scheduler, steps, choice of tokens. The engine has one, or one
/// for each rank with requests of its own. All calls but those that say so are made by one thread at a time.
class EngineRank {
 public:
  /// As EngineCore's. `inbox` and `statistics` are those of all ranks, and `first` (null: this is it) is rank 0, whose tiers
  /// are this one's too. Throws InvalidArgument for options out of range.
  EngineRank(int rank, const EngineRank* first, std::unique_ptr<model::Model> model,
             TextDecoderFactory make_decoder, std::vector<std::int32_t> eos_token_ids,
             const EngineOptions& options, std::unique_ptr<Drafter> drafter, const std::string& weights,
             Inbox& inbox, Statistics& statistics);
  ~EngineRank();
  /// Waits for transfers of pages that are under way; there will be no more. Before any rank is destroyed.
  void end_transfers();

  const model::Model& model() const { return *model_; }
  int num_pages() const { return pool_.num_pages(); }
  std::int64_t max_length() const { return max_length_; }  ///< what model and cache hold of a sequence
  /// Figures of where pages come from besides the cache. From any thread.
  void add_to(EngineStats& stats) const;
  /// Throws InvalidArgument for a room that this server cannot take part in. From any thread.
  void check(const BootstrapRoom& room) const;

  /// What has yet to be done here, and tokens of a prompt that the prefix cache has.
  RankLoad backlog() const { return scheduler_.backlog(); }
  std::int64_t cached_prefix(const ActiveRequest& request) const;

  void begin(std::unique_ptr<ActiveRequest> request);
  /// As Requests::cancel: without effect on those of other ranks.
  void cancel(RequestId id, int continuation) { requests_.cancel(id, continuation); }
  void cancel_all();
  /// What has come into the prefix cache and left it since the last call; empty without EngineOptions::cache_events. From
  /// any thread.
  std::vector<CacheEvent> take_cache_events();
  void drop_ended() { requests_.drop_ended(); }
  /// One step, if there is work; where ranks share experts, it is one of all ranks, which take part with work or without.
  /// False if there was nothing to do.
  bool step();

  bool has_work() const;
  bool is_busy() const { return !scheduler_.idle(); }  ///< with sequences
  /// The last step() had work, but nothing to compute before pages come.
  bool waits() const { return waits_; }
  void note_load();

 private:
  bool run_step();
  void poll_loader();
  void launch_ahead(const LaunchedStep& step);
  void finish(LaunchedStep& step);
  void accept_tokens(LaunchedStep& step);
  void accept(LaunchedStep& step, const std::vector<TokenChoice>& choices);
  void give_up(LaunchedStep& step, const std::string& why);
  void end_all(LaunchedStep& step, const std::string& why);
  void drop_ahead();
  void hand_over_events();
  Statistics::Load load() const;

  const int rank_;
  std::unique_ptr<model::Model> model_;
  const EngineOptions options_;
  std::unique_ptr<kv::CacheLog> cache_log_;  // null: nobody asks; the pool writes there
  kv::PagePool pool_;
  std::unique_ptr<TierTransfers> tiers_;  // null: there are none
  std::shared_ptr<PeerHub> hub_;          // of all ranks; null: the engine has no role
  std::unique_ptr<PeerLoader> peers_;     // null: there are none
  std::unique_ptr<RoomsAndTiers> both_;   // of these, where there are both
  PrefixLoader* loader_;                  // the last of these, or null: pages come from nowhere else
  Scheduler scheduler_;
  std::int64_t max_length_;
  Inbox& inbox_;
  Statistics& statistics_;
  Requests requests_;
  std::unique_ptr<ModuleDrafts> module_drafts_;  // null: the model's module, if it has one, does not draft
  StepPipeline pipeline_;
  TokenChooser chooser_;
  Speculation speculation_;
  bool waits_ = false;
  std::unique_ptr<LaunchedStep> ahead_;  // launched ahead; at least one of its continuations goes on
};

}  // namespace flash_mla::engine
