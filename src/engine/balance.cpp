#include "engine/balance.h"

#include <tuple>

#include "base/page_size.h"

namespace flash_mla::engine {

std::size_t take_rank(std::span<RankLoad> loads, std::span<const std::int64_t> cached, std::int64_t length,
                      int continuations, std::optional<int> chosen) {
  const auto tokens = [&](std::size_t rank) { return length - cached[rank]; };
  // And one to grow into for each.
  const auto pages = [&](std::size_t rank) {
    return (tokens(rank) + kPageSize - 1) / kPageSize + continuations;
  };
  const auto cost = [&](std::size_t rank) {
    const RankLoad& load = loads[rank];
    return std::tuple(load.pages < pages(rank),
                      load.tokens + tokens(rank) + std::int64_t{kPageSize} * load.sequences);
  };
  auto best = static_cast<std::size_t>(chosen.value_or(0));
  for (std::size_t rank = 1; rank < loads.size() && !chosen; ++rank) {
    if (cost(rank) < cost(best)) best = rank;
  }
  RankLoad& load = loads[best];
  load.pages -= pages(best);
  load.tokens += tokens(best);
  load.sequences += continuations;
  return best;
}

}  // namespace flash_mla::engine
