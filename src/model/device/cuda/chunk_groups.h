#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "model/step.h"

namespace flash_mla::model {

/// How the chunks of a step are divided among launches of prefill attention. Host memory alone.
struct ChunkGroups {
  /// Chunks, or the first tokens of one, whose tokens attend to everything before them. Their queries lie behind one
  /// another, and so do their keys once they are gathered.
  struct Dense {
    std::int64_t first_query = 0;  ///< behind the absorbed tokens
    std::int64_t num_queries = 0, num_keys = 0;
    std::vector<std::int32_t> query_starts{0}, key_starts{0};  ///< (sequences + 1)
    std::vector<std::int32_t> tables, pages;                   ///< (sequences): first page of each in `pages`
  };
  /// The other tokens of a chunk, each of which attends to those that are listed for it.
  struct Listed {
    std::int64_t first_token = 0, num_tokens = 0;
    std::int32_t seq_len = 0;  ///< keys that the last of them sees
    std::vector<std::int32_t> pages;
  };
  std::vector<Dense> dense;
  std::vector<Listed> listed;
};

inline constexpr std::int64_t kAllDense = std::numeric_limits<std::int64_t>::max();

/// Tokens that see at most `dense_keys` keys are dense. A group has up to `most_keys` keys, or one chunk.
ChunkGroups group_chunks(const Step& step, std::int64_t most_keys, std::int64_t dense_keys = kAllDense);

}  // namespace flash_mla::model
