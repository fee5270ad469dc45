#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/task_thread.h"
#include "engine/chunk_memory.h"
#include "engine/held_pages.h"
#include "engine/prefix_loader.h"
#include "engine/request.h"
#include "engine/tier_set.h"
#include "flash_mla/engine.h"
#include "kv/kv_tier.h"
#include "kv/page_pool.h"
#include "model/model.h"

namespace flash_mla::engine {

/// Pages on their way between the cache and the tiers beyond it. Prompts are looked up and loaded by one thread, chunks
/// stored by another; the thread that steps only leaves work for them, and has the device copy what is to be stored. What
/// a tier takes too long for, fails in or gets wrong counts as not found.
///
/// Of the calls those of PrefixLoader, store, poll and prefilled belong to the thread that steps.
class TierTransfers : public PrefixLoader {
 public:
  struct Options {
    std::vector<std::string> tiers;  ///< as kv::make_tiers takes them; not empty
    std::string salt;
    kv::SharedForm shared;    ///< of an LMCache server's chunks
    double wait_seconds = 0;  ///< EngineOptions::kv_tier_wait_seconds
    /// Called from either thread when found(), loaded() or poll() may have changed.
    std::function<void()> on_news;
  };
  /// Throws as kv::make_tiers does, and Unsupported for a model whose pages cannot be copied. `shared`: another rank's
  /// tiers(), which are this one's too; its model must outlive this object.
  TierTransfers(model::Model& model, kv::PagePool& pool, Options options,
                std::shared_ptr<TierSet> shared = nullptr);
  /// Waits for the calls to tiers that are under way.
  ~TierTransfers() override;

  void look_up(Sequence& sequence, std::span<const std::int32_t> tokens) override;
  std::optional<std::int64_t> found(Sequence& sequence) override;
  void load(Sequence& sequence, std::int64_t end) override;
  std::optional<std::int64_t> loaded(Sequence& sequence) override;
  bool has_loaded(const Sequence& sequence) const override;
  void forget(Sequence& sequence) override;
  void hurry() override;
  bool holds_pages() const override { return !held_.empty(); }

  /// Offers the tiers the chunks of a sequence that have become full since it was last called.
  void store(Sequence& sequence) override;
  void poll() override;
  /// By that it is judged what is worth waiting for.
  void prefilled(int tokens, double seconds) override;
  void add_to(EngineStats& stats) const override { stats.kv_tiers = tiers_->stats(); }
  const std::shared_ptr<TierSet>& tiers() const { return tiers_; }

 private:
  double allowance(std::int64_t tokens) const;
  void do_look_up(TierTicket& ticket);
  void do_load(TierTicket& ticket);
  Buffer read(TierTicket& ticket, std::int64_t chunk);
  void refill();
  void store_everywhere(model::CopyMark& mark, std::span<const std::int32_t> tokens, const Buffer& bytes);
  void store_in(std::size_t tier, std::span<const std::int32_t> tokens, const Buffer& bytes);
  void store_chunk(Sequence& sequence, std::int64_t chunk);

  kv::PagePool& pool_;
  const std::function<void()> on_news_;
  const double wait_seconds_;
  std::shared_ptr<ChunkMemory> memory_;
  const std::shared_ptr<TierSet> tiers_;
  std::unique_ptr<model::PageCopies> uploads_, downloads_;
  double seconds_per_token_ = 0;  // of prompts, lately; 0: not known
  HeldPages held_;
  std::vector<std::weak_ptr<TierTicket>> loads_;

  // Last, so that they end first, and the one that leaves work for the other before it.
  TaskThread storer_, loader_;
};

}  // namespace flash_mla::engine
