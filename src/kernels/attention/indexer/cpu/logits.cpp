// A task is a group of neighbouring rows and a run of 4096 keys: each tile of 64 keys is laid out once and scored
// for every row of the group. Workspace: a tile and the group's queries per thread.

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/indexer/cpu/indexer.h"
#include "kernels/attention/sparse_decode/cpu/team.h"

namespace flash_mla::cpu {
namespace {

constexpr std::int64_t kRunKeys = 4096;
// Laying out a tile costs about a fifth of scoring it for one row of 64 heads.
constexpr std::int64_t kGroupRows = 8;

/// Rows that share their keys.
std::int64_t group_rows(const indexer::Rows& rows) {
  return rows.table == nullptr ? kGroupRows : std::min(rows.rows_per_request, kGroupRows);
}

class Call {
 public:
  Call(const indexer::Rows& rows, IndexElement element, std::int64_t first, std::int64_t last,
       const indexer::Logits& logits, std::byte* workspace)
      : rows_(rows),
        element_(element),
        kernel_(index_tile_kernel(element)),
        first_(first),
        last_(last),
        logits_(logits),
        workspace_(workspace),
        tile_bytes_(kernel_.tile_bytes(rows.dim)),
        query_bytes_(kernel_.query_bytes(rows.heads, rows.dim)) {
    // Groups end where a request does. Without a table there is one request.
    span_ = rows.table == nullptr ? last - first : rows.rows_per_request;
    groups_per_span_ = (span_ + group_rows(rows) - 1) / group_rows(rows);
    first_span_ = rows.table == nullptr ? 0 : first / span_;
    const std::int64_t spans = rows.table == nullptr ? 1 : (last - 1) / span_ - first_span_ + 1;
    groups_ = spans * groups_per_span_;
    std::int64_t most = 0;
    for (std::int64_t row = first; row < last; ++row) {
      most = std::max(most, rows.end(row) - (rows.table == nullptr ? rows.begin(row) : 0));
    }
    // The keys of a group without a table may begin anywhere; a run more reaches the last of them, as long as
    // its rows begin within one run. Where they do not, the last run goes on to the end.
    runs_ = (most + kRunKeys - 1) / kRunKeys;
  }

  std::int64_t tasks() const { return groups_ * runs_; }

  void score(int thread, std::int64_t task) const {
    const std::int64_t group = task / runs_, run = task % runs_;
    const std::int64_t span = group / groups_per_span_, at = group % groups_per_span_ * group_rows(rows_);
    const std::int64_t span_begin = rows_.table == nullptr ? first_ : (first_span_ + span) * span_;
    const std::int64_t row0 = std::max(span_begin + at, first_);
    const std::int64_t row1 = std::min({span_begin + at + group_rows(rows_), span_begin + span_, last_});
    if (row0 >= row1) return;
    std::int64_t begin = std::numeric_limits<std::int64_t>::max(), end = 0;
    for (std::int64_t row = row0; row < row1; ++row) {
      if (rows_.end(row) <= rows_.begin(row)) continue;
      begin = std::min(begin, rows_.begin(row));
      end = std::max(end, rows_.end(row));
    }
    begin += run * kRunKeys;
    if (run + 1 < runs_) end = std::min(end, begin + kRunKeys);
    if (begin >= end) return;
    std::byte* tile = workspace_ + static_cast<std::size_t>(thread) * scratch_bytes();
    std::byte* queries = tile + tile_bytes_;
    for (std::int64_t row = row0; row < row1; ++row) {
      kernel_.pack_query(rows_.query(row), element_, rows_.heads, rows_.dim, query(queries, row - row0));
    }
    for (; begin < end; begin += kTileKeys) {
      score_tile(row0, row1, begin, std::min(begin + kTileKeys, end), tile, queries);
    }
  }

  /// -inf in the columns of a row that are no key of it.
  void clean(std::int64_t i) const {
    float* out = logits_.data + i * logits_.stride;
    const std::int64_t row = first_ + i, begin = logits_.compressed ? 0 : rows_.begin(row);
    const std::int64_t count = std::max<std::int64_t>(rows_.end(row) - rows_.begin(row), 0);
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    if (count == 0) {
      std::fill_n(out, logits_.width, kNone);
      return;
    }
    std::fill_n(out, begin, kNone);
    std::fill(out + begin + count, out + logits_.width, kNone);
  }

  std::size_t scratch_bytes() const {
    return tile_bytes_ + static_cast<std::size_t>(group_rows(rows_)) * query_bytes_;
  }

 private:
  std::byte* query(std::byte* queries, std::int64_t i) const {
    return queries + static_cast<std::size_t>(i) * query_bytes_;
  }

  void score_tile(std::int64_t row0, std::int64_t row1, std::int64_t begin, std::int64_t end, std::byte* tile,
                  std::byte* queries) const {
    const std::int64_t request = rows_.request(row0);
    const auto n = static_cast<int>(end - begin);
    std::array<const std::byte*, kTileKeys> keys;
    std::array<float, kTileKeys> scales, scores;
    scales.fill(1.0f);
    for (int t = 0; t < n; ++t) {
      const auto i = static_cast<std::size_t>(t);
      keys[i] = rows_.keys + rows_.place(request, begin + t, rows_.key_bytes);
      if (rows_.scales == nullptr) continue;
      std::memcpy(&scales[i], rows_.scales + rows_.place(request, begin + t, indexer::kScaleBytes),
                  sizeof(float));
    }
    kernel_.pack_keys(keys.data(), n, element_, rows_.dim, tile);
    for (std::int64_t row = row0; row < row1; ++row) {
      const std::int64_t from = std::max(begin, rows_.begin(row)), to = std::min(end, rows_.end(row));
      if (from >= to) continue;
      kernel_.score(tile, query(queries, row - row0), rows_.weights + row * rows_.weights_stride, rows_.heads,
                    rows_.dim, scores.data());
      float* out =
          logits_.data + (row - first_) * logits_.stride + (logits_.compressed ? -rows_.begin(row) : 0);
      for (std::int64_t j = from; j < to; ++j) {
        const auto i = static_cast<std::size_t>(j - begin);
        out[j] = scores[i] * scales[i];
      }
    }
  }

  const indexer::Rows& rows_;
  IndexElement element_;
  const IndexTileKernel& kernel_;
  std::int64_t first_, last_;
  const indexer::Logits& logits_;
  std::byte* workspace_;
  std::size_t tile_bytes_, query_bytes_;
  std::int64_t span_ = 0, groups_per_span_ = 0, first_span_ = 0, groups_ = 0, runs_ = 0;
};

}  // namespace

std::size_t index_logits_workspace_size(const indexer::Rows& rows, IndexElement element, int num_threads) {
  const IndexTileKernel& kernel = index_tile_kernel(element);
  return static_cast<std::size_t>(num_threads) *
         (kernel.tile_bytes(rows.dim) +
          static_cast<std::size_t>(group_rows(rows)) * kernel.query_bytes(rows.heads, rows.dim));
}

void index_logits(const indexer::Rows& rows, IndexElement element, std::int64_t first, std::int64_t last,
                  const indexer::Logits& logits, void* workspace, int num_threads) {
  if (first >= last) return;
  const Call call(rows, element, first, last, logits, static_cast<std::byte*>(workspace));
  run_team(
      is_forked_child() ? 1 : num_threads, call.tasks(),
      [&](int thread, std::int64_t i) { call.score(thread, i); }, logits.clean ? last - first : 0,
      [&](int, std::int64_t i) { call.clean(i); });
}

}  // namespace flash_mla::cpu
