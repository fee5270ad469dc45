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

// The module for multi-token prediction: DeepSeek::draft, and what a model or a device without one says.

namespace flash_mla::model {

void Model::draft(const DraftBatch& /*batch*/, std::int32_t* /*tokens*/) {
  throw std::logic_error("draft: the model has no module for multi-token prediction");
}

std::unique_ptr<MtpInput> Device::make_mtp_input(const MtpWeights& /*weights*/) {
  throw Unsupported("the module for multi-token prediction: this device has none yet; use device cpu");
}

std::unique_ptr<Head> Device::make_mtp_head(const Head& /*head*/, const MtpWeights& /*weights*/) {
  throw Unsupported("the module for multi-token prediction: this device has none yet; use device cpu");
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

// One more application for sequences that go on drafting, a token each.
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

}  // namespace

Ids DeepSeek::apply_module(const ForwardBatch& batch, const Ids& states, MtpInput::States of) {
  module_step_ = plan_step(batch, {config_.vocab_size, config_.max_position_embeddings, num_pages_, 0});
  Ids rows(states.size());
  for (std::size_t i = 0; i < states.size(); ++i) {
    rows[static_cast<std::size_t>(module_step_.order[i])] = states[i];
  }
  device_->begin_step(module_step_);
  device_->run([&] {
    Residual x = embedding_->forward();
    module_->input->forward(x, rows, of);                 // x = W · [norm(E[tokens]) ; norm(states)]
    module_->layer.attention->forward(x, Rows::kLogits);  // x += attention(norm(x))
    module_->layer.feed_forward->forward(x);              // x += ffn(norm(x)), or experts'
    module_->input->keep_own(x);
    device_->choose(module_->head->forward(x));
  });
  Ids out(batch.drawn_rows.size());
  if (!out.empty()) {
    const auto download = device_->start_token_download(0, std::ssize(out));
    std::memcpy(out.data(), download->wait(), out.size() * sizeof(std::int32_t));
  }
  return out;
}

void DeepSeek::draft(const DraftBatch& batch, std::int32_t* tokens) {
  if (!module_) throw std::logic_error("draft: the model has no module for multi-token prediction");
  if (!flights_.empty()) throw std::logic_error("draft: a step has not been collected");
  check(batch, step_.order.size());
  if (batch.tokens.token_ids.empty()) return;
  num_tokens_chosen_ = 0;
  std::vector<std::size_t> first(batch.num_drafts.size() + 1, 0);  // of each sequence, among the drafts
  std::inclusive_scan(batch.num_drafts.begin(), batch.num_drafts.end(), first.begin() + 1, std::plus<>(),
                      std::size_t{0});
  std::fill_n(tokens, first.back(), -1);

  Application next;
  Ids states;
  for (const std::int32_t state : batch.states)
    states.push_back(step_.order[static_cast<std::size_t>(state)]);
  for (std::size_t s = 0; s < batch.num_drafts.size(); ++s) {
    if (batch.num_drafts[s] == 0) continue;
    next.sequences.push_back(s);
    next.rows.push_back(batch.tokens.query_starts[s + 1] - 1);
    next.draws.push_back(batch.draws[first[s]]);
  }
  ForwardBatch whole = batch.tokens;
  whole.logit_rows = whole.greedy_rows = {};
  whole.drawn_rows = next.rows;
  whole.draws = next.draws;
  Ids chosen = apply_module(whole, states, MtpInput::States::kModels);

  const auto blocks = static_cast<std::size_t>(batch.tokens.max_blocks);
  for (std::int32_t done = 1;; ++done) {
    const Application last = std::exchange(next, {});
    next.max_blocks = batch.tokens.max_blocks;
    for (std::size_t i = 0; i < last.sequences.size(); ++i) {
      const std::size_t s = last.sequences[i];
      tokens[first[s] + static_cast<std::size_t>(done) - 1] = chosen[i];
      if (chosen[i] < 0 || batch.num_drafts[s] == done) continue;
      next.rows.push_back(static_cast<std::int32_t>(next.sequences.size()));
      next.sequences.push_back(s);
      next.token_ids.push_back(chosen[i]);
      next.states.push_back(static_cast<std::int32_t>(i));
      next.query_starts.push_back(static_cast<std::int32_t>(next.token_ids.size()));
      next.seq_lens.push_back(batch.tokens.seq_lens[s] + done);
      next.draws.push_back(batch.draws[first[s] + static_cast<std::size_t>(done)]);
      const auto pages = batch.tokens.block_table.subspan(s * blocks, blocks);
      next.block_table.insert(next.block_table.end(), pages.begin(), pages.end());
    }
    if (next.sequences.empty()) return;
    chosen = apply_module(next.view(batch.tokens.batch_invariant), next.states, MtpInput::States::kOwn);
  }
}

}  // namespace flash_mla::model
