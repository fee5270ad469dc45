#include "model/step.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "flash_mla/error.h"

namespace flash_mla::model {
namespace {

[[noreturn]] void fail(const std::string& what, std::int64_t value, const std::string& expected) {
  throw InvalidArgument(fmt::format("{} is {}, expected {}", what, value, expected));
}

std::int64_t pages_of(std::int64_t tokens) { return (tokens + kPageSize - 1) / kPageSize; }

class Planner {
 public:
  Planner(const ForwardBatch& batch, const StepLimits& limits)
      : batch_(batch),
        limits_(limits),
        tokens_(std::ssize(batch.token_ids)),
        seqs_(std::ssize(batch.seq_lens)) {}

  Step plan() {
    check();
    step_.batch_invariant = batch_.batch_invariant;
    step_.masked = batch_.masked;
    step_.max_blocks = std::max(batch_.max_blocks, 1);
    step_.order.resize(static_cast<std::size_t>(tokens_));
    for (std::int64_t s = 0; s < seqs_; ++s) {
      if (absorbed(s)) add_absorbed(s);
    }
    step_.num_absorbed = step_.num_tokens();
    for (std::int64_t s = 0; s < seqs_; ++s) {
      if (!absorbed(s)) add_chunk(s);
    }
    step_.first_chosen = std::ssize(batch_.logit_rows);
    for (const auto& rows : {batch_.logit_rows, batch_.drawn_rows, batch_.greedy_rows}) {
      for (const std::int32_t row : rows)
        step_.logit_rows.push_back(step_.order[static_cast<std::size_t>(row)]);
    }
    if (!batch_.draws.empty()) {
      step_.draws.resize(step_.logit_rows.size());
      std::ranges::copy(batch_.draws, step_.draws.begin() + step_.first_chosen);
    }
    return std::move(step_);
  }

 private:
  std::int64_t start(std::int64_t s) const { return batch_.query_starts[static_cast<std::size_t>(s)]; }
  std::int64_t new_tokens(std::int64_t s) const { return start(s + 1) - start(s); }
  // A token's bits depend on its form, so that in a batch-invariant step there is one: how many tokens come
  // at once depends on neighbours, prefix reuse and preemption.
  bool absorbed(std::int64_t s) const {
    return batch_.batch_invariant || new_tokens(s) <= kMaxAbsorbedTokens;
  }
  std::int64_t seq_len(std::int64_t s) const { return batch_.seq_lens[static_cast<std::size_t>(s)]; }
  std::span<const std::int32_t> pages(std::int64_t s) const {
    return batch_.block_table.subspan(static_cast<std::size_t>(s * batch_.max_blocks),
                                      static_cast<std::size_t>(pages_of(seq_len(s))));
  }

  void check() const {
    if (std::ssize(batch_.query_starts) != seqs_ + 1) {
      fail("size of query_starts", std::ssize(batch_.query_starts),
           fmt::format("{}, one more than seq_lens has", seqs_ + 1));
    }
    if (start(0) != 0) fail("query_starts[0]", start(0), "0");
    if (start(seqs_) != tokens_) {
      fail(fmt::format("query_starts[{}]", seqs_), start(seqs_),
           fmt::format("{}, the number of token_ids", tokens_));
    }
    if (batch_.max_blocks < 0) fail("max_blocks", batch_.max_blocks, ">= 0");
    if (std::ssize(batch_.block_table) != seqs_ * batch_.max_blocks) {
      fail("size of block_table", std::ssize(batch_.block_table),
           fmt::format("{} sequences * {} max_blocks", seqs_, batch_.max_blocks));
    }
    for (std::int64_t s = 0; s < seqs_; ++s) check_sequence(s);
    for (std::int64_t t = 0; t < tokens_; ++t) {
      const std::int32_t id = batch_.token_ids[static_cast<std::size_t>(t)];
      if (id < -limits_.num_tokens_before || id >= limits_.vocab_size) {
        fail(fmt::format("token_ids[{}]", t), id,
             fmt::format("0 to {}, the vocabulary", limits_.vocab_size - 1));
      }
    }
    check_rows("logit_rows", batch_.logit_rows);
    check_rows("drawn_rows", batch_.drawn_rows);
    if (batch_.draws.size() != batch_.drawn_rows.size()) {
      fail("size of draws", std::ssize(batch_.draws),
           fmt::format("{}, that of drawn_rows", batch_.drawn_rows.size()));
    }
    check_rows("greedy_rows", batch_.greedy_rows);
  }

  void check_rows(const char* name, std::span<const std::int32_t> rows) const {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (rows[i] < 0 || rows[i] >= tokens_) {
        fail(fmt::format("{}[{}]", name, i), rows[i], fmt::format("0 to {}", tokens_ - 1));
      }
    }
  }

  void check_sequence(std::int64_t s) const {
    if (new_tokens(s) < 1) {
      fail(fmt::format("query_starts[{}]", s + 1), start(s + 1), fmt::format("more than {}", start(s)));
    }
    if (seq_len(s) < new_tokens(s)) {
      fail(fmt::format("seq_lens[{}]", s), seq_len(s), fmt::format(">= its {} new tokens", new_tokens(s)));
    }
    if (seq_len(s) > limits_.max_position) {
      fail(fmt::format("seq_lens[{}]", s), seq_len(s),
           fmt::format("<= {}, max_position_embeddings", limits_.max_position));
    }
    if (pages_of(seq_len(s)) > batch_.max_blocks) {
      fail("max_blocks", batch_.max_blocks,
           fmt::format(">= {} for seq_lens[{}] = {}", pages_of(seq_len(s)), s, seq_len(s)));
    }
    for (std::int64_t i = 0; i < pages_of(seq_len(s)); ++i) {
      const std::int32_t page = pages(s)[static_cast<std::size_t>(i)];
      if (page < 0 || page >= limits_.num_pages) {
        fail(fmt::format("block_table[{}][{}]", s, i), page,
             fmt::format("0 to {}, the pages of the cache", limits_.num_pages - 1));
      }
    }
  }

  // A new token of sequence s, the i-th.
  void add_token(std::int64_t s, std::int64_t i) {
    const std::int64_t position = seq_len(s) - new_tokens(s) + i;
    const std::int64_t page = pages(s)[static_cast<std::size_t>(position / kPageSize)];
    step_.order[static_cast<std::size_t>(start(s) + i)] = static_cast<std::int32_t>(step_.num_tokens());
    step_.token_ids.push_back(batch_.token_ids[static_cast<std::size_t>(start(s) + i)]);
    step_.positions.push_back(static_cast<std::int32_t>(position));
    step_.slots.push_back(page * kPageSize + position % kPageSize);
  }

  void add_absorbed(std::int64_t s) {
    for (std::int64_t i = 0; i < new_tokens(s); ++i) {
      add_token(s, i);
      step_.absorbed_lens.push_back(step_.positions.back() + 1);
      const std::size_t row = step_.absorbed_table.size();
      step_.absorbed_table.resize(row + static_cast<std::size_t>(step_.max_blocks), -1);
      std::copy(pages(s).begin(), pages(s).end(),
                step_.absorbed_table.begin() + static_cast<std::ptrdiff_t>(row));
    }
  }

  void add_chunk(std::int64_t s) {
    Chunk chunk;
    chunk.first_token = step_.num_tokens();
    chunk.num_tokens = new_tokens(s);
    chunk.seq_len = seq_len(s);
    chunk.pages.assign(pages(s).begin(), pages(s).end());
    for (std::int64_t i = 0; i < new_tokens(s); ++i) add_token(s, i);
    step_.chunks.push_back(std::move(chunk));
  }

  const ForwardBatch& batch_;
  const StepLimits& limits_;
  std::int64_t tokens_, seqs_;
  Step step_;
};

}  // namespace

Step plan_step(const ForwardBatch& batch, const StepLimits& limits) { return Planner(batch, limits).plan(); }

Step logit_step(const Step& step) {
  Step out = step;
  out.chunks.clear();
  out.num_absorbed = std::ssize(step.logit_rows);
  const auto rows = step.logit_rows.size(), blocks = static_cast<std::size_t>(step.max_blocks);
  out.token_ids.resize(rows);
  out.positions.resize(rows);
  out.slots.resize(rows);
  out.absorbed_lens.resize(rows);
  out.absorbed_table.assign(rows * blocks, -1);
  std::iota(out.logit_rows.begin(), out.logit_rows.end(), 0);
  for (std::size_t i = 0; i < rows; ++i) {
    const auto row = static_cast<std::size_t>(step.logit_rows[i]);
    out.token_ids[i] = step.token_ids[row];
    out.positions[i] = step.positions[row];
    out.slots[i] = step.slots[row];
    out.absorbed_lens[i] = step.positions[row] + 1;
    const auto pages = out.absorbed_table.begin() + static_cast<std::ptrdiff_t>(i * blocks);
    if (step.logit_rows[i] < step.num_absorbed) {
      std::copy_n(step.absorbed_table.begin() + static_cast<std::ptrdiff_t>(row * blocks), blocks, pages);
    } else {
      // The last chunk that begins at or before the row.
      const auto chunk = std::find_if(step.chunks.rbegin(), step.chunks.rend(),
                                      [&](const Chunk& c) { return c.first_token <= step.logit_rows[i]; });
      std::copy(chunk->pages.begin(), chunk->pages.end(), pages);
    }
  }
  return out;
}

}  // namespace flash_mla::model
