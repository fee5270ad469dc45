#include "model/device/cpu/mixture_of_experts.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <span>
#include <utility>

#include "kernels/moe/cpu/router.h"
#include "kernels/rows/cpu/rows.h"
#include "model/device/cpu/reduced_linear.h"

namespace flash_mla::model {
namespace {

// Rows that a thread takes at a time: of the router, and at most of an expert. Multiples of 64, the largest
// tile of a product.
constexpr std::int64_t kBlockRows = 64;
constexpr std::int64_t kPieceRows = 128;

}  // namespace

CpuMixtureOfExperts::CpuMixtureOfExperts(CpuContext& context, const MixtureWeights& weights)
    : context_(context),
      norm_(weights.norm),
      router_(context.gemm.pack(read_values(weights.router).data(), weights.router.rows,
                                weights.router.columns, DType::kFloat32)),
      correction_bias_(weights.correction_bias),
      ranks_(weights.ranks),
      own_index_(static_cast<std::size_t>(weights.router.rows), -1),
      exchange_(context),
      counts_(static_cast<std::size_t>(weights.router.rows)) {
  for (int e = 0; e < weights.router.rows; ++e) {
    if (!ranks_.empty() &&
        std::ranges::count(ranks_[static_cast<std::size_t>(e)], context.partition.expert_rank) == 0) {
      continue;
    }
    own_index_[static_cast<std::size_t>(e)] = static_cast<std::int32_t>(experts_.size());
    const ExpertWeights expert = weights.expert(e);
    experts_.push_back({pack(context, expert.gate_up, LayerKind::kExperts),
                        pack(context, expert.down, LayerKind::kExperts), expert.gate_up.tensors,
                        expert.down.tensors});
  }
  if (weights.shared_down.rows > 0) {
    shared_ = std::make_unique<CpuGatedNetwork>(
        context, weights.shared_gate_up, weights.shared_down,
        std::int64_t{context.config.n_shared_experts} * context.config.moe_intermediate_size,
        LayerKind::kShared);
  }
}

void CpuMixtureOfExperts::forward(Residual& x) {
  const bool own_tokens = context_.partition.own_tokens;
  if (x.x.rows == 0 && !own_tokens) return;
  const Matrix h = context_.activations(context_.buffers.h, x.x.rows, x.x.columns);
  context_.rms_norm(x.x, norm_, context_.config.rms_norm_eps, h);
  route(h);
  if (own_tokens) {
    if (shared_ && h.rows > 0) shared_->add(context_, h, x.x);
    return add_from_ranks(h, x.x);
  }
  find_own(h.rows);
  count_choices();
  if (context_.partition.alone() || context_.partition.exact) {
    if (shared_) shared_->add(context_, h, x.x);
    const Matrix results = run_experts(h);
    if (context_.partition.alone()) {
      add_results(results, x.x, context_.dtype);
    } else {
      add_results_of_all(results, x.x);
    }
    return;
  }
  // One sum over ranks for shared and routed experts.
  const Matrix sum = CpuContext::matrix(context_.buffers.sum, DType::kFloat32, h.rows, h.columns);
  if (shared_) {
    shared_->multiply(context_, h, sum);
  } else {
    std::memset(sum.data, 0, static_cast<std::size_t>(h.rows * h.columns) * sizeof(float));
  }
  add_results(run_experts(h), sum, DType::kFloat32);
  reduce_into(context_, sum, x.x);
}

std::vector<std::int32_t> CpuMixtureOfExperts::experts_taken(int num_tokens) const {
  if (num_tokens > num_tokens_) return {};
  const auto* ids = reinterpret_cast<const std::int32_t*>(ids_.data());
  return {ids, ids + std::int64_t{num_tokens} * context_.config.num_experts_per_tok};
}

ExpertCounts CpuMixtureOfExperts::expert_counts() const {
  ExpertCounts out;
  for (const auto& count : counts_) out.counts.push_back(count.load(std::memory_order_relaxed));
  out.rank_counts = {own_count_.load(std::memory_order_relaxed)};
  return out;
}

// Experts of every row of h and their weights.
void CpuMixtureOfExperts::route(const Matrix& h) {
  const ModelConfig& config = context_.config;
  const std::int64_t experts = config.n_routed_experts, chosen = config.num_experts_per_tok;
  num_tokens_ = h.rows;
  const Matrix ids = CpuContext::matrix(ids_, DType::kInt32, h.rows, chosen);
  const Matrix weights = CpuContext::matrix(context_.buffers.expert_weights, DType::kFloat32, h.rows, chosen);
  // Blocks of whole tiles, so that a row's tile does not depend on how many threads there are.
  const std::int64_t blocks = (h.rows + kBlockRows - 1) / kBlockRows;
  const bool threads = h.rows * h.columns >= CpuContext::kParallelElements;
  parallel_for(blocks, threads ? context_.threads : 1, [&](std::int64_t block) {
    thread_local Buffer wide, logits_buffer;
    const std::int64_t first = block * kBlockRows, count = std::min(kBlockRows, h.rows - first);
    const Matrix input = CpuContext::matrix(wide, DType::kFloat32, count, h.columns);
    const Matrix logits = CpuContext::matrix(logits_buffer, DType::kFloat32, count, experts);
    for (std::int64_t i = 0; i < count; ++i) {
      cpu::rows::widen(h.row(first + i), context_.dtype, reinterpret_cast<float*>(input.row(i)), h.columns);
    }
    context_.gemm.run(input, router_, nullptr, logits, {1, context_.step->batch_invariant, false});
    const Routing routing = config.routing();
    for (std::int64_t i = 0; i < count; ++i) {
      cpu::choose_experts(routing, reinterpret_cast<const float*>(logits.row(i)),
                          correction_bias_.empty() ? nullptr : correction_bias_.data(),
                          reinterpret_cast<std::int32_t*>(ids.row(first + i)),
                          reinterpret_cast<float*>(weights.row(first + i)));
    }
  });
}

// Where ranks have the same tokens; else replicas take turns, if the token is not this rank's and need not leave it.
int CpuMixtureOfExperts::runs_at(std::int64_t token, std::int32_t expert) const {
  const Partition& partition = context_.partition;
  const auto e = static_cast<std::size_t>(expert);
  if (ranks_.empty()) return partition.expert_rank;
  if (!partition.own_tokens) return taken_by_[e];
  if (own_index_[e] >= 0) return partition.expert_rank;
  return ranks_[e][static_cast<std::size_t>(token) % ranks_[e].size()];
}

// Every expert of the step runs on one rank, so that its weights are read once: those with the most rows first, each on
// the rank with the least to do of those that have it. All ranks come to the same, for they have the same choices.
void CpuMixtureOfExperts::share_experts(std::int64_t num_tokens) {
  // What reading an expert's weights takes, in rows: up to 4 use them for nothing more (worth_threads).
  constexpr std::int64_t kRowsOfWeights = 4;
  const auto* ids = reinterpret_cast<const std::int32_t*>(ids_.data());
  std::vector<std::int64_t> rows(ranks_.size(), 0),
      load(static_cast<std::size_t>(context_.partition.expert_ranks), 0);
  for (std::int64_t i = 0; i < num_tokens * context_.config.num_experts_per_tok; ++i)
    ++rows[static_cast<std::size_t>(ids[i])];
  std::vector<std::size_t> order(ranks_.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, std::ranges::greater(), [&](std::size_t e) { return rows[e]; });
  taken_by_.resize(ranks_.size());
  for (const std::size_t e : order) {
    const auto load_of = [&](int rank) { return load[static_cast<std::size_t>(rank)]; };
    taken_by_[e] = *std::ranges::min_element(ranks_[e], {}, load_of);
    if (rows[e] > 0) load[static_cast<std::size_t>(taken_by_[e])] += std::max(rows[e], kRowsOfWeights);
  }
}

// Which of the step's choices are this rank's.
void CpuMixtureOfExperts::find_own(std::int64_t num_tokens) {
  const std::int64_t chosen = context_.config.num_experts_per_tok;
  const auto* ids = reinterpret_cast<const std::int32_t*>(ids_.data());
  if (!ranks_.empty()) share_experts(num_tokens);
  own_.resize(static_cast<std::size_t>(num_tokens * chosen));
  for (std::int64_t i = 0; i < num_tokens * chosen; ++i) {
    const bool here = runs_at(i / chosen, ids[i]) == context_.partition.expert_rank;
    own_[static_cast<std::size_t>(i)] = here ? own_index_[static_cast<std::size_t>(ids[i])] : -1;
  }
}

// Plain additions: one thread writes, whoever reads wants no order among them.
void CpuMixtureOfExperts::count_choices() {
  const auto add = [](std::atomic<std::int64_t>& count, std::int64_t more) {
    count.store(count.load(std::memory_order_relaxed) + more, std::memory_order_relaxed);
  };
  const auto* ids = reinterpret_cast<const std::int32_t*>(ids_.data());
  const std::int64_t choices = num_tokens_ * context_.config.num_experts_per_tok;
  for (std::int64_t i = 0; i < choices; ++i) add(counts_[static_cast<std::size_t>(ids[i])], 1);
  add(own_count_, std::ssize(own_) - std::ranges::count(own_, -1));
}

// Every expert multiplies the rows of its tokens. Whichever was done first, the results of a token's experts are then
// added in the order of its choice.
Matrix CpuMixtureOfExperts::run_experts(const Matrix& h) {
  sort_by_expert();
  const Matrix results =
      CpuContext::matrix(context_.buffers.expert_out, DType::kFloat32, std::ssize(by_expert_), h.columns);
  if (pieces_.empty()) return results;
  const std::int64_t expert_weights = 3 * h.columns * experts_[0].down.in_features();
  // Rows and weights of the average piece, for all of them.
  const auto count = std::ssize(pieces_);
  const bool threads = worth_threads(count * expert_weights, std::ssize(by_expert_) / count);
  parallel_for(count, threads ? context_.threads : 1, [&](std::int64_t i) {
    const Piece& piece = pieces_[static_cast<std::size_t>(i)];
    run_expert(h, piece, results.row_range(piece.first, piece.count));
  });
  return results;
}

void CpuMixtureOfExperts::add_results(const Matrix& results, const Matrix& rows, DType dtype,
                                      std::int64_t first) const {
  const std::int64_t chosen = context_.config.num_experts_per_tok, hidden = rows.columns;
  const auto* weight =
      reinterpret_cast<const float*>(context_.buffers.expert_weights.data()) + first * chosen;
  context_.for_rows(rows.rows, hidden * chosen, [&](std::int64_t t) {
    thread_local std::vector<float> sum;
    sum.resize(static_cast<std::size_t>(hidden));
    cpu::rows::widen(rows.row(t), dtype, sum.data(), hidden);
    for (std::int64_t i = t * chosen; i < (t + 1) * chosen; ++i) {
      const std::int64_t row = places_[static_cast<std::size_t>(i)];
      if (row < 0) continue;
      cpu::rows::add_scaled(reinterpret_cast<const float*>(results.row(row)), weight[i], sum.data(), hidden);
    }
    cpu::rows::narrow(sum.data(), rows.row(t), dtype, hidden);
  });
}

// x += the results of all ranks, added up as one rank would: each rank has a share of the tokens, gets all results of
// these, one row for a choice, and adds them in the order of the choices.
void CpuMixtureOfExperts::add_results_of_all(const Matrix& results, const Matrix& x) {
  const std::int64_t chosen = context_.config.num_experts_per_tok, hidden = x.columns;
  const auto* ids = reinterpret_cast<const std::int32_t*>(ids_.data());
  const std::vector<Range> tokens = shares(context_.partition, x.rows);
  const auto ranks = tokens.size();
  const Range own = tokens[static_cast<std::size_t>(context_.partition.rank)];

  std::vector<std::int64_t> to(ranks), from(ranks);
  const Matrix sent = CpuContext::matrix(context_.buffers.sent, DType::kFloat32, results.rows, hidden);
  std::int64_t at = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    for (std::int64_t i = tokens[r].first * chosen; i < tokens[r].end() * chosen; ++i) {
      const std::int64_t row = places_[static_cast<std::size_t>(i)];
      if (row < 0) continue;
      std::memcpy(sent.row(at++), results.row(row), static_cast<std::size_t>(hidden) * sizeof(float));
      ++to[r];
    }
  }
  for (std::int64_t i = own.first * chosen; i < own.end() * chosen; ++i)
    ++from[static_cast<std::size_t>(runs_at(i / chosen, ids[i]))];
  const Matrix received =
      CpuContext::matrix(context_.buffers.received, DType::kFloat32, own.count * chosen, hidden);
  context_.ranks->all_to_all_v(sent, to, received, from);

  // Where the results of each choice lie: behind those of the ranks before, in the order of the choices.
  std::vector<std::int64_t> next(ranks, 0);
  for (std::size_t r = 1; r < ranks; ++r) next[r] = next[r - 1] + from[r - 1];
  std::ranges::fill(places_, -1);
  for (std::int64_t i = own.first * chosen; i < own.end() * chosen; ++i)
    places_[static_cast<std::size_t>(i - own.first * chosen)] =
        next[static_cast<std::size_t>(runs_at(i / chosen, ids[i]))]++;
  add_results(received, x.row_range(own.first, own.count), context_.dtype, own.first);
  gather_rows(context_, x, tokens);
}

// Of the tokens that several ranks have, each sends a share.
void CpuMixtureOfExperts::add_from_ranks(const Matrix& h, const Matrix& x) {
  const std::int64_t chosen = context_.config.num_experts_per_tok;
  const std::vector<Range> tokens = shares(context_.partition, h.rows);
  const Range own = tokens[static_cast<std::size_t>(context_.partition.rank)];
  const std::span<const std::int32_t> ids(
      reinterpret_cast<const std::int32_t*>(ids_.data()) + own.first * chosen,
      static_cast<std::size_t>(own.count * chosen));
  std::vector<int> ranks;
  ranks.reserve(ids.size());
  for (std::int64_t i = 0; i < std::ssize(ids); ++i)
    ranks.push_back(runs_at(i / chosen, ids[static_cast<std::size_t>(i)]));
  const Matrix rows = exchange_.dispatch(h.row_range(own.first, own.count), ids, ranks);
  own_.clear();
  for (const std::int32_t expert : exchange_.experts())
    own_.push_back(expert < 0 ? -1 : own_index_[static_cast<std::size_t>(expert)]);
  count_choices();
  const Matrix results = exchange_.combine(run_experts(rows), places_);
  add_results(results, x.row_range(own.first, own.count), context_.dtype, own.first);
  if (!context_.partition.alone() && x.rows > 0) gather_rows(context_, x, tokens);
}

// Lists this rank's choices (token * num_experts_per_tok + rank) expert by expert in `by_expert_`, and cuts each
// expert's into pieces.
void CpuMixtureOfExperts::sort_by_expert() {
  const std::size_t num_experts = experts_.size();
  expert_ends_.assign(num_experts, 0);
  for (const std::int32_t e : own_) {
    if (e >= 0) ++expert_ends_[static_cast<std::size_t>(e)];
  }
  pieces_.clear();
  std::int64_t first = 0;
  for (std::size_t e = 0; e < num_experts; ++e) {
    const std::int64_t end = first + std::exchange(expert_ends_[e], first);
    for (; first < end; first += kPieceRows) {
      pieces_.push_back({e, first, std::min(kPieceRows, end - first)});
    }
    first = end;
  }
  by_expert_.resize(static_cast<std::size_t>(first));
  places_.assign(own_.size(), -1);
  for (std::size_t i = 0; i < own_.size(); ++i) {
    if (own_[i] < 0) continue;
    places_[i] = expert_ends_[static_cast<std::size_t>(own_[i])]++;
    by_expert_[static_cast<std::size_t>(places_[i])] = static_cast<std::int64_t>(i);
  }
  // The longest first, so that no thread is left with one at the end.
  std::stable_sort(pieces_.begin(), pieces_.end(),
                   [](const Piece& a, const Piece& b) { return a.count > b.count; });
}

// Multiplies the rows of a piece's choices, in their order.
void CpuMixtureOfExperts::run_expert(const Matrix& h, const Piece& piece, const Matrix& out) const {
  const Expert& expert = experts_[piece.expert];
  const std::int64_t hidden = h.columns, intermediate = expert.down.in_features();
  const std::int64_t element = context_.element();
  thread_local Buffer in_buffer, gate_up_buffer, act_buffer;
  const Matrix in = context_.activations(in_buffer, piece.count, hidden),
               gate_up = context_.activations(gate_up_buffer, piece.count, 2 * intermediate),
               act = context_.activations(act_buffer, piece.count, intermediate);
  for (std::int64_t i = 0; i < piece.count; ++i) {
    const std::int64_t choice = by_expert_[static_cast<std::size_t>(piece.first + i)];
    std::memcpy(in.row(i), h.row(choice / context_.config.num_experts_per_tok),
                static_cast<std::size_t>(hidden * element));
  }
  const cpu::GemmMode mode{1, context_.step->batch_invariant, false};
  if (context_.on_product) context_.on_product(expert.gate_up_tensors, in);
  context_.gemm.run(in, expert.gate_up, nullptr, gate_up, mode);
  for (std::int64_t i = 0; i < piece.count; ++i) {
    cpu::rows::silu_mul(gate_up.row(i), gate_up.row(i) + intermediate * element, act.row(i), context_.dtype,
                        intermediate);
  }
  if (context_.on_product) context_.on_product(expert.down_tensors, act);
  context_.gemm.run(act, expert.down, nullptr, out, mode);
}

}  // namespace flash_mla::model
