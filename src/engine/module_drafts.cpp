#include "engine/module_drafts.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "base/page_size.h"

namespace flash_mla::engine {
namespace {

// What the model is asked for, and which work each sequence's drafts are for.
struct Drafts {
  std::vector<std::int32_t> token_ids, query_starts{0}, seq_lens, block_table, states, num_drafts;
  std::vector<Draw> draws;
  std::vector<ScheduledWork*> works;  // of each sequence, or null
  std::size_t max_blocks = 0;

  // `work`: where its drafts go, or null.
  void add(const Continuation& c, ScheduledWork* work) {
    // Each token goes with the state of the one before it.
    for (int i = 0; i < c.states.count; ++i) {
      token_ids.push_back(c.tokens[static_cast<std::size_t>(c.states.begin + i) + 1]);
      states.push_back(c.states.row + i);
    }
    query_starts.push_back(static_cast<std::int32_t>(token_ids.size()));
    seq_lens.push_back(static_cast<std::int32_t>(c.states.begin + c.states.count));
    num_drafts.push_back(work == nullptr ? 0 : work->num_drafts());
    works.push_back(work);
    max_blocks = std::max(max_blocks, c.pages.pages().size());
    const SamplingParams& sampling = c.request->sampling;
    for (int i = 0; i < num_drafts.back(); ++i) {
      // Drawn with the number that the token itself will be drawn with: where the distributions agree, the tokens do.
      const DrawKey key{c.request->seed, static_cast<std::uint32_t>(c.index),
                        static_cast<std::uint64_t>(c.num_generated + i)};
      draws.push_back(sampling.temperature > 0 ? draw_of(sampling, key) : Draw());
    }
  }
};

}  // namespace

void ModuleDrafts::note(const LaunchedStep& step) {
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    Continuation& c = step.continuation(i);
    const ScheduledWork& work = step.plan.work[i];
    c.states = {step.number, work.begin, step.first_rows[i], work.count + step.drafts[i].committed};
    if (!work.samples || work.begin + work.count != std::ssize(c.request->prompt)) continue;
    // Those that have forked here share the pages that are full: one of them has the module go over these. The last
    // page is copied for each before the module has gone over what this step has left there.
    const std::int64_t end = work.begin + work.count;
    bool left = c.ended;
    for (const auto& sibling : c.request->continuations) {
      if (sibling.get() == &c) continue;
      const std::int64_t begin = std::max(work.begin, left ? 0 : (end - 1) / kPageSize * kPageSize);
      left = left && !sibling->running;
      sibling->states = {step.number, begin,
                         step.first_rows[i] + static_cast<std::int32_t>(begin - work.begin),
                         static_cast<int>(end - begin)};
    }
  }
}

void ModuleDrafts::draft(StepPlan& plan, std::int64_t number, std::span<Sequence* const> running,
                         bool batch_invariant) {
  std::unordered_map<const Sequence*, ScheduledWork*> drafting;
  for (ScheduledWork& work : plan.work) {
    if (work.num_drafts() > 0 &&
        static_cast<Continuation*>(work.sequence)->draft_source == DraftSource::kMtp) {
      drafting[work.sequence] = &work;
    }
  }
  Drafts all;
  std::vector<const Continuation*> sequences;
  for (Sequence* s : running) {
    Continuation& c = static_cast<Continuation&>(*s);
    // The state of a token that nothing follows yet is of no use.
    const std::int64_t followed = static_cast<std::int64_t>(c.tokens.size()) - 1 - c.states.begin;
    c.states.count = static_cast<int>(std::min<std::int64_t>(c.states.count, followed));
    // Nor is one whose token is to be computed again.
    const bool gone = c.num_computed() < c.states.begin + c.states.count;
    if (c.states.step != number - 1 || c.states.count < 1 || gone) continue;
    const auto work = drafting.find(s);
    all.add(c, work == drafting.end() ? nullptr : work->second);
    sequences.push_back(&c);
    c.states.count = 0;
  }
  for (auto& [sequence, work] : drafting) {
    plan.num_tokens -= work->num_drafts();
    work->drafts.clear();
  }
  if (sequences.empty()) return;
  all.block_table.assign(sequences.size() * all.max_blocks, -1);
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    std::ranges::copy(sequences[i]->pages.pages(),
                      all.block_table.begin() + static_cast<std::ptrdiff_t>(i * all.max_blocks));
  }
  model::DraftBatch batch;
  batch.tokens.token_ids = all.token_ids;
  batch.tokens.query_starts = all.query_starts;
  batch.tokens.seq_lens = all.seq_lens;
  batch.tokens.block_table = all.block_table;
  batch.tokens.max_blocks = static_cast<int>(all.max_blocks);
  batch.tokens.batch_invariant = batch_invariant;
  batch.states = all.states;
  batch.num_drafts = all.num_drafts;
  batch.draws = all.draws;
  std::vector<std::int32_t> tokens(all.draws.size());
  model_.draft(batch, tokens.data());
  auto from = tokens.begin();
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const auto end = from + all.num_drafts[i];
    if (all.works[i] != nullptr) {
      all.works[i]->drafts.assign(from,
                                  std::find(from, end, -1));  // -1: the module's logits are not to be used
      plan.num_tokens += all.works[i]->num_drafts();
    }
    from = end;
  }
}

}  // namespace flash_mla::engine
