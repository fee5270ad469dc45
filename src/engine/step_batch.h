#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "engine/scheduler.h"
#include "model/model.h"

namespace flash_mla::engine {

/// What is wanted of a sequence's last token in a step, and of every draft behind it.
enum class Wanted {
  kNothing,    ///< its prompt goes on
  kLogits,     ///< all logits: the host chooses
  kDrawn,      ///< a token that the model draws
  kLikeliest,  ///< the likeliest token
};

/// A StepPlan as the model takes it.
struct StepBatch {
  /// What is wanted of a sequence, and where it is among the results: the row of the logits, or the index
  /// among the tokens. What belongs to its drafts comes behind.
  struct Result {
    Wanted wanted = Wanted::kNothing;
    std::size_t index = 0;
    std::size_t first_scored = 0;  ///< row of the logits of its first token whose successor is scored
    int num_scored = 0;            ///< such tokens, one row after another
    bool is_token() const { return wanted == Wanted::kDrawn || wanted == Wanted::kLikeliest; }
  };

  std::vector<Result> results;  ///< of each work of the plan
  std::size_t num_tokens = 0;   ///< that the model chooses
  bool masked = false;          ///< some of them not among all tokens

  std::vector<std::int32_t> token_ids, query_starts{0}, seq_lens, block_table;
  std::vector<std::int32_t> logit_rows, drawn_rows, greedy_rows;
  std::vector<Draw> draws;
  int max_blocks = 0;

  model::ForwardBatch view(bool batch_invariant) const;
};

/// Says what is wanted of a work that samples. If that is kDrawn, adds a draw for its last token and one for
/// every draft. Sets `masked` where a format or rules say which tokens the model may choose.
using WantedOf = std::function<Wanted(const ScheduledWork&, std::vector<Draw>&, bool& masked)>;
/// How many of a work's tokens, and behind how many others of it, have a successor in the prompt whose
/// log-probability is wanted.
struct ScoredTokens {
  int skipped = 0, count = 0;
};
using ScoredOf = std::function<ScoredTokens(const ScheduledWork&)>;
/// The index, among the tokens that the step before chooses, of the token that a sequence does not have yet.
using TokenIndexOf = std::function<std::size_t(const Sequence&)>;

StepBatch make_batch(const StepPlan& plan, const WantedOf& wanted_of, const ScoredOf& scored_of,
                     const TokenIndexOf& token_index_of);

}  // namespace flash_mla::engine
