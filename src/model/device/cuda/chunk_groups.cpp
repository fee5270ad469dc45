#include "model/device/cuda/chunk_groups.h"

#include <algorithm>

namespace flash_mla::model {

ChunkGroups group_chunks(const Step& step, std::int64_t most_keys, std::int64_t dense_keys) {
  ChunkGroups out;
  for (const Chunk& chunk : step.chunks) {
    const std::int64_t begin = chunk.seq_len - chunk.num_tokens;
    const std::int64_t whole = std::clamp<std::int64_t>(dense_keys - begin, 0, chunk.num_tokens);
    if (whole > 0) {
      const std::int64_t first = chunk.first_token - step.num_absorbed, keys = begin + whole;
      // Where the chunk before was cut, its other queries lie between.
      if (out.dense.empty() || out.dense.back().num_keys + keys > most_keys ||
          out.dense.back().first_query + out.dense.back().num_queries != first) {
        out.dense.emplace_back().first_query = first;
      }
      ChunkGroups::Dense& group = out.dense.back();
      group.num_queries += whole;
      group.num_keys += keys;
      group.query_starts.push_back(static_cast<std::int32_t>(group.num_queries));
      group.key_starts.push_back(static_cast<std::int32_t>(group.num_keys));
      group.tables.push_back(static_cast<std::int32_t>(group.pages.size()));
      group.pages.insert(group.pages.end(), chunk.pages.begin(), chunk.pages.end());
    }
    if (whole < chunk.num_tokens) {
      out.listed.push_back({chunk.first_token + whole, chunk.num_tokens - whole,
                            static_cast<std::int32_t>(chunk.seq_len), chunk.pages});
    }
  }
  return out;
}

}  // namespace flash_mla::model
