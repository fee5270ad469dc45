#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/prefix_loader.h"
#include "kv/page_pool.h"

namespace flash_mla::engine {

/// Of an engine that is one side of prefill and decode and has tiers: a room goes first. A prefill server loads what tiers
/// have of a prompt once its pages have been asked for, so that nothing is held for a room that waits, and sends that, too.
/// A decode server asks tiers for prompts without a room, and for those whose pages have not come.
class RoomsAndTiers : public PrefixLoader {
 public:
  /// All of them outlive this object.
  RoomsAndTiers(PrefixLoader& rooms, PrefixLoader& tiers, const kv::PagePool& pool)
      : rooms_(rooms), tiers_(tiers), pool_(pool) {}

  void look_up(Sequence& sequence, std::span<const std::int32_t> tokens) override;
  std::optional<std::int64_t> found(Sequence& sequence) override;
  void load(Sequence& sequence, std::int64_t end) override { loader_of(sequence).load(sequence, end); }
  std::optional<std::int64_t> loaded(Sequence& sequence) override {
    return loader_of(sequence).loaded(sequence);
  }
  bool has_loaded(const Sequence& sequence) const override {
    return loader_of(sequence).has_loaded(sequence);
  }
  void skip(Sequence& sequence) override;
  void forget(Sequence& sequence) override;
  void hurry() override { rooms_.hurry(), tiers_.hurry(); }
  bool holds_pages() const override { return rooms_.holds_pages() || tiers_.holds_pages(); }
  void poll() override { rooms_.poll(), tiers_.poll(); }
  std::vector<std::pair<Sequence*, std::string>> refused() override { return rooms_.refused(); }
  void launching(const StepPlan& plan) override { rooms_.launching(plan); }
  void store(Sequence& sequence) override { rooms_.store(sequence), tiers_.store(sequence); }
  void prefilled(int tokens, double seconds) override { tiers_.prefilled(tokens, seconds); }
  void add_to(EngineStats& stats) const override { rooms_.add_to(stats), tiers_.add_to(stats); }

 private:
  PrefixLoader& loader_of(const Sequence& sequence) const;

  PrefixLoader &rooms_, &tiers_;
  const kv::PagePool& pool_;
  std::map<const Sequence*, std::int64_t>
      waiting_;  // for a room; leading tokens that tiers may be asked for then
};

}  // namespace flash_mla::engine
