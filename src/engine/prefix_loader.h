#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace flash_mla {
struct EngineStats;
}

namespace flash_mla::engine {

struct Sequence;
struct StepPlan;

/// Where the pages of a prompt's beginning may come from besides the prefix cache. No call waits for anything. All are
/// made by the thread that steps.
class PrefixLoader {
 public:
  virtual ~PrefixLoader() = default;
  /// Begins to look for `tokens`, with which the sequence begins.
  virtual void look_up(Sequence& sequence, std::span<const std::int32_t> tokens) = 0;
  /// Tokens from the first on that load() could bring, 0 if it is not worth waiting any longer; nothing while that is
  /// not known. 0 of a sequence that has not been looked up.
  virtual std::optional<std::int64_t> found(Sequence& sequence) = 0;
  /// Begins to load tokens [sequence.num_computed(), end) into its pages, which are reserved.
  virtual void load(Sequence& sequence, std::int64_t end) = 0;
  /// Tokens from the first on that the pages have now; nothing while the load goes on. Where it has been given up, the
  /// sequence has no pages any more.
  virtual std::optional<std::int64_t> loaded(Sequence& sequence) = 0;
  /// Whether loaded() has an answer.
  virtual bool has_loaded(const Sequence& sequence) const = 0;
  /// The sequence runs without what was found, if anything was.
  virtual void skip(Sequence& sequence) { forget(sequence); }
  /// Nobody waits for the sequence any more. Where a load goes on, its pages are taken from it and kept until they are
  /// no longer written.
  virtual void forget(Sequence& sequence) = 0;
  /// Pages are wanted: whatever is under way ends as soon as it can.
  virtual void hurry() = 0;
  /// Whether pages will come back to the pool for which nobody has to do anything.
  virtual bool holds_pages() const = 0;

  // Around steps.
  /// Lets go of pages that no copy reads or writes any more, and looks what else has come.
  virtual void poll() {}
  /// Sequences that cannot run since the last call, and why. They wait, and are to be ended.
  virtual std::vector<std::pair<Sequence*, std::string>> refused() { return {}; }
  /// The plan goes to the model now.
  virtual void launching(const StepPlan& plan) { static_cast<void>(plan); }
  /// A step of the sequence has been committed.
  virtual void store(Sequence& sequence) { static_cast<void>(sequence); }
  /// A step has taken `seconds` for `tokens` of prompts.
  virtual void prefilled(int tokens, double seconds) {
    static_cast<void>(tokens), static_cast<void>(seconds);
  }
  /// Its figures. From any thread.
  virtual void add_to(EngineStats& stats) const = 0;
};

}  // namespace flash_mla::engine
