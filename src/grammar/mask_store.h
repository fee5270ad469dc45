#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace flash_mla::grammar {

/// Masks of tokens by the state of an automaton that they were computed for, up to 4 MiB. Any number of threads may use one
/// object.
class MaskStore {
 public:
  using Mask = std::vector<std::uint32_t>;

  /// Null: it has none of `words` words.
  std::shared_ptr<const Mask> find(std::int32_t state, std::size_t words) const;
  /// The same mask, or an equal one that is there.
  std::shared_ptr<const Mask> keep(std::int32_t state, std::shared_ptr<const Mask> mask);
  std::size_t num_bytes() const;

 private:
  static constexpr std::size_t kMaxBytes = 4 << 20;

  struct Hash {
    std::size_t operator()(const std::shared_ptr<const Mask>& mask) const;
  };
  struct Same {
    bool operator()(const std::shared_ptr<const Mask>& a, const std::shared_ptr<const Mask>& b) const {
      return *a == *b;
    }
  };

  mutable std::mutex mutex_;  // of what follows
  std::unordered_map<std::int32_t, std::shared_ptr<const Mask>> by_state_;
  std::unordered_set<std::shared_ptr<const Mask>, Hash, Same> masks_;
  std::size_t num_bytes_ = 0;
};

}  // namespace flash_mla::grammar
