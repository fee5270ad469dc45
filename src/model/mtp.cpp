#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "flash_mla/error.h"
#include "model/deepseek.h"

// The module for multi-token prediction: DeepSeek::draft, and what a model without one says.

namespace flash_mla::model {

void Model::draft(const DraftBatch& /*batch*/, std::int32_t* /*tokens*/) {
  throw std::logic_error("draft: the model has no module for multi-token prediction");
}

namespace {

using Ids = std::vector<std::int32_t>;

void check(const DraftBatch& batch, std::size_t num_states) {
  if (batch.states.size() != batch.tokens.token_ids.size()) {
    throw InvalidArgument(fmt::format("size of states is {}, expected {}, that of token_ids",
                                      batch.states.size(), batch.tokens.token_ids.size()));
  }
  for (std::size_t i = 0; i < batch.states.size(); ++i) {
    if (batch.states[i] < 0 || static_cast<std::size_t>(batch.states[i]) >= num_states) {
      throw InvalidArgument(fmt::format("states[{}] is {}, expected 0 to {}, tokens of the last step", i,
                                        batch.states[i], static_cast<std::int64_t>(num_states) - 1));
    }
  }
  if (batch.num_drafts.size() != batch.tokens.seq_lens.size()) {
    throw InvalidArgument(fmt::format("size of num_drafts is {}, expected {}, that of seq_lens",
                                      batch.num_drafts.size(), batch.tokens.seq_lens.size()));
  }
  std::int64_t drafts = 0;
  for (std::size_t i = 0; i < batch.num_drafts.size(); ++i) {
    if (batch.num_drafts[i] < 0) {
      throw InvalidArgument(fmt::format("num_drafts[{}] is {}, expected >= 0", i, batch.num_drafts[i]));
    }
    drafts += batch.num_drafts[i];
  }
  if (std::ssize(batch.draws) != drafts) {
    throw InvalidArgument(
        fmt::format("size of draws is {}, expected {}, the sum of num_drafts", batch.draws.size(), drafts));
  }
}

// An application of the module behind the first, for sequences that go on drafting, a token each: the one that the
// application before has chosen for it.
struct Application {
  std::vector<std::size_t> sequences;
  Ids token_ids, query_starts{0}, seq_lens, block_table, rows, states;
  std::vector<Draw> draws;
  int max_blocks = 0;

  ForwardBatch view(bool batch_invariant) const {
    ForwardBatch out;
    out.token_ids = token_ids;
    out.query_starts = query_starts;
    out.seq_lens = seq_lens;
    out.block_table = block_table;
    out.max_blocks = max_blocks;
    out.drawn_rows = rows;
    out.draws = draws;
    out.batch_invariant = batch_invariant;
    return out;
  }
};

// Those sequences of `last`, which has given the `done`-th draft of each, that are to have another.
Application next_of(const Application& last, int done, const DraftBatch& batch,
                    const std::vector<std::size_t>& first) {
  Application next;
  next.max_blocks = batch.tokens.max_blocks;
  const auto blocks = static_cast<std::size_t>(next.max_blocks);
  for (std::size_t i = 0; i < last.sequences.size(); ++i) {
    const std::size_t s = last.sequences[i];
    if (batch.num_drafts[s] == done) continue;
    next.rows.push_back(static_cast<std::int32_t>(next.sequences.size()));
    next.sequences.push_back(s);
    next.token_ids.push_back(-1 - static_cast<std::int32_t>(i));
    next.states.push_back(static_cast<std::int32_t>(i));
    next.query_starts.push_back(static_cast<std::int32_t>(next.token_ids.size()));
    next.seq_lens.push_back(batch.tokens.seq_lens[s] + done);
    next.draws.push_back(batch.draws[first[s] + static_cast<std::size_t>(done)]);
    const auto pages = batch.tokens.block_table.subspan(s * blocks, blocks);
    next.block_table.insert(next.block_table.end(), pages.begin(), pages.end());
  }
  return next;
}

}  // namespace

std::unique_ptr<Download> DeepSeek::apply_module(const ForwardBatch& batch, const Ids& states,
                                                 ModuleStates reads, std::int64_t num_tokens_before) {
  module_step_ =
      plan_step(batch, {config_.vocab_size, config_.max_position_embeddings, num_pages_, num_tokens_before});
  module_step_.reads = reads;
  module_step_.states.resize(states.size());
  for (std::size_t i = 0; i < states.size(); ++i) {
    module_step_.states[static_cast<std::size_t>(module_step_.order[i])] = states[i];
  }
  device_->begin_step(module_step_);
  device_->run([&] {
    Residual x = embedding_->forward();
    module_->input->forward(x);                           // x = W · [norm(E[tokens]) ; norm(states)]
    module_->layer.attention->forward(x, Rows::kLogits);  // x += attention(norm(x))
    module_->layer.feed_forward->forward(x);              // x += ffn(norm(x)), or experts'
    module_->input->keep_own(x);
    device_->choose(module_->head->forward(x));
  });
  if (batch.drawn_rows.empty()) return nullptr;
  return device_->start_token_download(0, std::ssize(batch.drawn_rows));
}

void DeepSeek::draft(const DraftBatch& batch, std::int32_t* tokens) {
  if (!module_) throw std::logic_error("draft: the model has no module for multi-token prediction");
  if (!flights_.empty()) throw std::logic_error("draft: a step has not been collected");
  check(batch, step_.order.size());
  if (batch.tokens.token_ids.empty() && batch.num_applications == 0) return;
  num_tokens_chosen_ = 0;
  std::vector<std::size_t> first(batch.num_drafts.size() + 1, 0);  // of each sequence, among the drafts
  std::inclusive_scan(batch.num_drafts.begin(), batch.num_drafts.end(), first.begin() + 1, std::plus<>(),
                      std::size_t{0});
  std::fill_n(tokens, first.back(), -1);

  Application last;
  Ids states;
  for (const std::int32_t state : batch.states)
    states.push_back(step_.order[static_cast<std::size_t>(state)]);
  for (std::size_t s = 0; s < batch.num_drafts.size(); ++s) {
    if (batch.num_drafts[s] == 0) continue;
    last.sequences.push_back(s);
    last.rows.push_back(batch.tokens.query_starts[s + 1] - 1);
    last.draws.push_back(batch.draws[first[s]]);
  }
  ForwardBatch whole = batch.tokens;
  whole.logit_rows = whole.greedy_rows = {};
  whole.drawn_rows = last.rows;
  whole.draws = last.draws;
  // All applications are queued before the first draft is waited for: each finds its tokens where the one before has
  // left them.
  std::vector<std::pair<std::vector<std::size_t>, std::unique_ptr<Download>>> chosen;
  chosen.emplace_back(last.sequences, apply_module(whole, states, ModuleStates::kModels, 0));
  for (int done = 1; !last.sequences.empty(); ++done) {
    Application next = next_of(last, done, batch, first);
    if (next.sequences.empty()) break;
    chosen.emplace_back(next.sequences, apply_module(next.view(batch.tokens.batch_invariant), next.states,
                                                     ModuleStates::kOwn, std::ssize(last.sequences)));
    last = std::move(next);
  }
  for (auto others = std::ssize(chosen); others < batch.num_applications; ++others) {
    Application none;
    apply_module(none.view(batch.tokens.batch_invariant), {}, ModuleStates::kOwn, 0);
  }
  for (std::size_t done = 0; done < chosen.size(); ++done) {
    const auto& [sequences, download] = chosen[done];
    if (!download) continue;
    Ids of_each(sequences.size());
    std::memcpy(of_each.data(), download->wait(), of_each.size() * sizeof(std::int32_t));
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      std::int32_t* const drafts = tokens + first[sequences[i]];
      // What stands in for a token that there is not is no draft, nor is what follows it.
      if (done == 0 || drafts[done - 1] >= 0) drafts[done] = of_each[i];
    }
  }
}

}  // namespace flash_mla::model
