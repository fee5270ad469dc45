#include "model/device/cpu/context.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/aligned.h"
#include "kernels/rows/cpu/rows.h"

namespace flash_mla::model {
namespace {

// Blocks of 64 keys between the fixed split points of a batch-invariant step.
constexpr int kInvariantSplitBlocks = 16;

// Query rows (tokens times heads) of a run: dense decode takes up to 16 in the time of one, and 128 over the keys at
// once; and 64 tokens at all. And runs of many lengths are calls of many kinds, none of which has work for all threads.
constexpr std::int64_t kRowsOfVector = 16, kRowsOfRun = 128, kTokensOfRun = 64, kMaxKindsOfRuns = 8;

// Whether token t goes on where the absorbed token before it ends. In a batch-invariant step what it attends to is then
// also cut at the same keys, so that it has the bits that it has alone.
bool goes_on(const Step& step, std::int64_t t) {
  const auto at = static_cast<std::size_t>(t), width = static_cast<std::size_t>(step.max_blocks);
  const std::int32_t position = step.positions[at];
  if (position != step.positions[at - 1] + 1) return false;
  if (step.batch_invariant && position % (kInvariantSplitBlocks * kPageSize) == 0) return false;
  const auto pages = step.absorbed_table.begin() + static_cast<std::ptrdiff_t>(at * width);
  return std::equal(pages, pages + static_cast<std::ptrdiff_t>(width),
                    pages - static_cast<std::ptrdiff_t>(width));
}

}  // namespace

ScheduleOptions CpuContext::schedule_options(bool batch_invariant) const {
  ScheduleOptions options = cpu_schedule_options(threads);
  if (batch_invariant) options.fixed_split_blocks = kInvariantSplitBlocks;
  return options;
}

void CpuContext::reserve(std::int64_t num_tokens, std::int64_t num_rows) {
  const std::int64_t hidden = config.hidden_size, heads = config.num_attention_heads;
  const std::int64_t rank = config.kv_lora_rank, rope_width = config.qk_rope_head_dim;
  const std::int64_t q_width = heads * (config.qk_nope_head_dim + rope_width), q_rank = config.q_lora_rank;
  const std::int64_t intermediate =
      std::max(config.intermediate_size, config.n_shared_experts * config.moe_intermediate_size);
  activations(buffers.x, num_tokens, hidden);
  activations(buffers.h, num_tokens, hidden);
  activations(buffers.qkv_a, num_tokens, (q_rank > 0 ? q_rank : q_width) + rank + rope_width);
  activations(buffers.q_a, num_tokens, q_rank);
  activations(buffers.q, num_tokens, q_rank > 0 ? q_width : 0);
  activations(buffers.keys, cache_format ? num_tokens : 0, rank + rope_width);
  activations(buffers.q_latent, num_tokens, heads * (rank + rope_width));
  activations(buffers.out_latent, num_tokens, heads * rank);
  activations(buffers.attended, num_tokens, heads * config.v_head_dim);
  activations(buffers.act, num_tokens, intermediate);
  matrix(buffers.expert_weights, DType::kFloat32, num_tokens, config.num_experts_per_tok);
  activations(buffers.logit_h, num_rows, hidden);
  matrix(buffers.logits, DType::kFloat32, num_rows, config.vocab_size);
  matrix(buffers.tokens, DType::kInt32, num_rows, 1);
}

void CpuContext::begin_step(const Step& next) {
  step = &next;
  const std::size_t tokens = next.token_ids.size(), pairs = rope.inv_freq.size();
  cosines.resize(tokens * pairs);
  sines.resize(tokens * pairs);
  // A cosine and a sine take as long as some 16 elements of other operations.
  for_rows(next.num_tokens(), static_cast<std::int64_t>(16 * pairs), [&](std::int64_t token) {
    const auto t = static_cast<std::size_t>(token);
    for (std::size_t i = 0; i < pairs; ++i) {
      const float angle = static_cast<float>(next.positions[t]) * rope.inv_freq[i];
      cosines[t * pairs + i] = std::cos(angle) * rope.scale;
      sines[t * pairs + i] = std::sin(angle) * rope.scale;
    }
  });
  if (&next != &narrowed_) selection.clear();  // it was the last step's
  selects_ = config.index_topk > 0 &&
             std::any_of(next.positions.begin(), next.positions.end(),
                         [&](std::int32_t position) { return position >= config.index_topk; });
  find_runs();
}

// Runs are no longer than leaves work for every thread, unless shorter ones would take as long.
std::int64_t CpuContext::longest_run() const {
  if (selects_) return 1;
  const std::int64_t heads = config.num_attention_heads;
  const std::int64_t piece = step->batch_invariant ? kInvariantSplitBlocks * kPageSize : kPageSize;
  std::int64_t pieces = 0;  // that threads can take, if every token is a run
  for (const std::int32_t length : step->absorbed_lens) pieces += (length + piece - 1) / piece;
  const std::int64_t least = std::max<std::int64_t>(kRowsOfVector / heads, 1);
  const std::int64_t most = std::clamp<std::int64_t>(kRowsOfRun / heads, 1, kTokensOfRun);
  return std::clamp(pieces / threads, least, std::max(most, least));
}

void CpuContext::find_runs() {
  runs.clear();
  if (step->num_absorbed == 0) return;
  const std::int64_t most = longest_run();
  for (std::int64_t t = 0; t < step->num_absorbed;) {
    std::int64_t end = t + 1;
    while (end < step->num_absorbed && end - t < most && goes_on(*step, end)) ++end;
    if (runs.empty() || runs.back().tokens != end - t) runs.push_back({t, end - t, {}, {}});
    runs.back().lengths.push_back(step->absorbed_lens[static_cast<std::size_t>(end - 1)]);
    t = end;
  }
  if (std::ssize(runs) > kMaxKindsOfRuns) runs.assign(1, {0, 1, step->absorbed_lens, {}});
  for (Runs& of : runs) {
    if (config.index_topk > 0) {
      for (std::int32_t& length : of.lengths) length = std::min(length, config.index_topk);
    }
    of.schedule = DecodeSchedule::build(of.lengths, schedule_options(step->batch_invariant));
  }
}

void CpuContext::narrow(std::initializer_list<Narrowed> matrices) {
  const auto rows = static_cast<std::int64_t>(step->logit_rows.size());
  for (const Narrowed& narrowed : matrices) {
    const Matrix all = *narrowed.rows;
    *narrowed.rows = activations(*narrowed.buffer, rows, all.columns);
    gather_logit_rows(all, *narrowed.rows);
  }
  if (selects_) {
    const auto width = static_cast<std::size_t>(config.index_topk);
    std::vector<std::int32_t> all = std::move(selection);
    selection.resize(step->logit_rows.size() * width);
    for (std::size_t i = 0; i < step->logit_rows.size() && !all.empty(); ++i) {
      std::copy_n(
          all.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(step->logit_rows[i]) * width),
          width, selection.begin() + static_cast<std::ptrdiff_t>(i * width));
    }
  }
  narrowed_ = logit_step(*step);
  begin_step(narrowed_);
}

Matrix CpuContext::matrix(Buffer& buffer, DType type, std::int64_t rows, std::int64_t columns) {
  const std::size_t bytes = static_cast<std::size_t>(rows * columns) * dtype_size(type);
  if (bytes > buffer.bytes()) buffer = allocate_aligned(bytes);
  return {buffer.data(), type, rows, columns, columns};
}

void CpuContext::gather_logit_rows(const Matrix& x, const Matrix& out) const {
  for (std::int64_t i = 0; i < out.rows; ++i) {
    std::memcpy(out.row(i), x.row(step->logit_rows[static_cast<std::size_t>(i)]),
                static_cast<std::size_t>(x.columns * element()));
  }
}

void CpuContext::rms_norm(const Matrix& x, const std::vector<float>& weight, double eps,
                          const Matrix& out) const {
  for_rows(x.rows, x.columns, [&](std::int64_t t) {
    cpu::rows::rms_norm(x.row(t), weight.data(), static_cast<float>(eps), out.row(t), dtype, x.columns);
  });
}

}  // namespace flash_mla::model
