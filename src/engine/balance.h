#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace flash_mla::engine {

/// What a rank with requests of its own has yet to do.
struct RankLoad {
  std::int64_t tokens = 0;  ///< of its sequences, running and waiting, that have not been computed
  int sequences = 0;        ///< running and waiting
  std::int64_t pages = 0;   ///< of its cache that are left when all of them have theirs; below 0: some wait
};

/// The rank for a prompt of `length` tokens, of which the ranks' prefix caches have `cached`, that has `continuations`: of
/// those whose cache has room, or else of all, the one with the fewest tokens to compute before the prompt's first is
/// chosen. A sequence counts as a page of tokens, since every step computes one of each: so a prefix that all prompts share
/// does not bring them all to one rank. Of equals the first. `chosen`: that one, whatever it has to do. Adds the prompt to
/// that rank's load.
std::size_t take_rank(std::span<RankLoad> loads, std::span<const std::int64_t> cached, std::int64_t length,
                      int continuations, std::optional<int> chosen = std::nullopt);

}  // namespace flash_mla::engine
