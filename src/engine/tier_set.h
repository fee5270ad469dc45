#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "flash_mla/engine.h"
#include "kv/kv_tier.h"

namespace flash_mla::engine {

/// The tiers of an engine, whose ranks share them, and their figures. From any thread.
class TierSet {
 public:
  /// Throws as kv::make_tiers does.
  TierSet(std::span<const std::string> specs, const kv::TierConfig& config)
      : tiers_(kv::make_tiers(specs, config)), stats_(tiers_.size()) {
    for (std::size_t i = 0; i < size(); ++i) stats_[i].name = tiers_[i]->name();
  }

  std::size_t size() const { return tiers_.size(); }
  kv::KvTier& operator[](std::size_t tier) const { return *tiers_[tier]; }

  void count(std::size_t tier, const std::function<void(KvTierStats&)>& change) {
    const std::lock_guard lock(mutex_);
    change(stats_[tier]);
  }
  std::vector<KvTierStats> stats() const {
    const std::lock_guard lock(mutex_);
    return stats_;
  }

 private:
  const std::vector<std::unique_ptr<kv::KvTier>> tiers_;
  mutable std::mutex mutex_;
  std::vector<KvTierStats> stats_;
};

}  // namespace flash_mla::engine
