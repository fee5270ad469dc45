#include "engine/step_batch.h"

#include <algorithm>

namespace flash_mla::engine {

model::ForwardBatch StepBatch::view(bool batch_invariant) const {
  model::ForwardBatch batch;
  batch.token_ids = token_ids;
  batch.query_starts = query_starts;
  batch.seq_lens = seq_lens;
  batch.block_table = block_table;
  batch.max_blocks = max_blocks;
  batch.logit_rows = logit_rows;
  batch.drawn_rows = drawn_rows;
  batch.draws = draws;
  batch.greedy_rows = greedy_rows;
  batch.masked = masked;
  batch.batch_invariant = batch_invariant;
  return batch;
}

StepBatch make_batch(const StepPlan& plan, const WantedOf& wanted_of, const ScoredOf& scored_of,
                     const TokenIndexOf& token_index_of) {
  StepBatch out;
  std::size_t max_blocks = 0;
  for (const ScheduledWork& w : plan.work) {
    const std::vector<std::int32_t>& tokens = w.sequence->tokens;
    if (w.begin == static_cast<std::int64_t>(tokens.size())) {
      out.token_ids.push_back(-1 - static_cast<std::int32_t>(token_index_of(*w.sequence)));
    } else {
      const auto begin = tokens.begin() + w.begin;
      out.token_ids.insert(out.token_ids.end(), begin, begin + w.count);
    }
    const auto end = static_cast<std::int32_t>(out.token_ids.size());  // of its own tokens
    out.token_ids.insert(out.token_ids.end(), w.drafts.begin(), w.drafts.end());
    out.query_starts.push_back(static_cast<std::int32_t>(out.token_ids.size()));
    out.seq_lens.push_back(static_cast<std::int32_t>(w.begin + w.count + w.num_drafts()));
    max_blocks = std::max(max_blocks, w.sequence->pages.pages().size());

    StepBatch::Result& result = out.results.emplace_back();
    const ScoredTokens scored = scored_of(w);
    result.first_scored = out.logit_rows.size();
    result.num_scored = scored.count;
    for (int i = 0; i < scored.count; ++i) {
      out.logit_rows.push_back(end - w.count + scored.skipped + i);
    }
    if (!w.samples) continue;
    result.wanted = wanted_of(w, out.draws, out.masked);
    std::vector<std::int32_t>& rows = result.wanted == Wanted::kLogits  ? out.logit_rows
                                      : result.wanted == Wanted::kDrawn ? out.drawn_rows
                                                                        : out.greedy_rows;
    result.index = rows.size();
    for (int i = 0; i <= w.num_drafts(); ++i) rows.push_back(end - 1 + i);
  }
  for (StepBatch::Result& result : out.results) {
    if (result.wanted == Wanted::kLikeliest) result.index += out.drawn_rows.size();
  }
  out.num_tokens = out.drawn_rows.size() + out.greedy_rows.size();

  out.max_blocks = static_cast<int>(max_blocks);
  out.block_table.assign(plan.work.size() * max_blocks, -1);
  for (std::size_t i = 0; i < plan.work.size(); ++i) {
    std::ranges::copy(plan.work[i].sequence->pages.pages(),
                      out.block_table.begin() + static_cast<std::ptrdiff_t>(i * max_blocks));
  }
  return out;
}

}  // namespace flash_mla::engine
