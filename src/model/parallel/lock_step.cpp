#include "model/parallel/lock_step.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <exception>
#include <numeric>
#include <thread>
#include <utility>

namespace flash_mla::model {
namespace {

// Applications of the module that a batch takes.
std::int64_t num_applications(const DraftBatch& batch) {
  if (batch.tokens.token_ids.empty()) return 0;
  return std::max(1, *std::ranges::max_element(batch.num_drafts));
}

// The largest of all ranks' values.
std::int64_t largest(comm::Communicator& communicator, std::int64_t value) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(communicator.size()));
  const auto column = [](std::int64_t* values, std::int64_t rows) {
    return Matrix{reinterpret_cast<std::byte*>(values), DType::kInt64, rows, 1, 1};
  };
  communicator.all_gather(column(&value, 1), column(all.data(), std::ssize(all)));
  return *std::ranges::max_element(all);
}

constexpr std::array<std::int32_t, 1> kNoStarts = {0};

}  // namespace

std::vector<std::unique_ptr<Model>> LockStepModel::make(int num_ranks, bool batch_invariant,
                                                        const MakeRank& make,
                                                        std::chrono::milliseconds timeout) {
  std::vector<int> numbers(static_cast<std::size_t>(num_ranks));
  std::iota(numbers.begin(), numbers.end(), 0);
  return LockStepModel::make(std::move(numbers), batch_invariant, make, timeout);
}

std::vector<std::unique_ptr<Model>> LockStepModel::make(std::vector<int> numbers, bool batch_invariant,
                                                        const MakeRank& make,
                                                        std::chrono::milliseconds timeout) {
  const int num_ranks = static_cast<int>(numbers.size());
  const auto group = std::make_shared<comm::ThreadGroup>(std::move(numbers), timeout);
  std::vector<std::unique_ptr<LockStepModel>> ranks;
  ranks.reserve(static_cast<std::size_t>(num_ranks));
  for (int rank = 0; rank < num_ranks; ++rank)
    ranks.push_back(std::unique_ptr<LockStepModel>(new LockStepModel(group, rank, batch_invariant)));
  std::vector<std::exception_ptr> errors(ranks.size());
  {
    std::vector<std::jthread> threads;
    for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
      threads.emplace_back([&, rank] {
        try {
          ranks[rank]->model_ = make(static_cast<int>(rank), *ranks[rank]->communicator_);
        } catch (...) {
          errors[rank] = std::current_exception();
        }
      });
    }
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  return {std::make_move_iterator(ranks.begin()), std::make_move_iterator(ranks.end())};
}

LockStepModel::LockStepModel(std::shared_ptr<comm::ThreadGroup> group, int rank, bool batch_invariant)
    : group_(std::move(group)),
      communicator_(group_->communicator(rank)),
      batch_invariant_(batch_invariant) {}

// What f throws is the end of all ranks: those that have done more than others cannot go back.
template <class F>
void LockStepModel::take_part(F&& f) {
  if (broken_) throw comm::RankError(*broken_);
  const auto begin = std::chrono::steady_clock::now();
  try {
    f();
  } catch (const comm::RankError& e) {
    broken_ = e;
  } catch (const std::exception& e) {
    broken_ = comm::RankError(communicator_->number(), e.what());
  } catch (...) {
    broken_ = comm::RankError(communicator_->number(), "an unknown exception");
  }
  if (broken_) communicator_->fail(*broken_);
  seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (broken_) throw comm::RankError(*broken_);
}

ForwardBatch LockStepModel::nothing() const {
  ForwardBatch out;
  out.query_starts = kNoStarts;
  out.batch_invariant = batch_invariant_;
  return out;
}

void LockStepModel::join_drafts(const DraftBatch& batch, std::int32_t* tokens) {
  drafted_ = true;
  DraftBatch joined = batch;
  joined.num_applications = static_cast<int>(largest(*communicator_, num_applications(batch)));
  model_->draft(joined, tokens);
}

void LockStepModel::draft(const DraftBatch& batch, std::int32_t* tokens) {
  take_part([&] { join_drafts(batch, tokens); });
}

void LockStepModel::launch(const ForwardBatch& batch) {
  take_part([&] {
    DraftBatch none;
    none.tokens = nothing();
    if (has_draft_module() && !drafted_) join_drafts(none, nullptr);
    launched_ = true;
    const double exchanged = communicator_->traffic().seconds;
    span_.begin = std::chrono::steady_clock::now();
    model_->launch(batch);
    span_.end = std::chrono::steady_clock::now();
    span_.exchange_seconds = communicator_->traffic().seconds - exchanged;
  });
}

void LockStepModel::end_step() {
  if (!launched_ && !broken_) {
    try {
      launch(nothing());
      model_->collect(nullptr, nullptr);
    } catch (const comm::RankError&) {
      // broken() says it
    }
  }
  drafted_ = launched_ = false;
}

std::vector<RankSpan> LockStepModel::rank_spans() const {
  std::vector<RankSpan> out = model_->rank_spans();
  if (out.empty()) out.push_back(span_);
  return out;
}

std::vector<RankStats> LockStepModel::rank_stats() const {
  std::vector<RankStats> out = model_->rank_stats();
  if (out.empty()) out.resize(1);
  RankStats& first = out.front();
  const comm::Traffic& traffic = communicator_->traffic();
  first.seconds = seconds_;
  first.exchanges += traffic.calls;
  first.bytes_sent += traffic.bytes;
  first.exchange_seconds += traffic.seconds;
  if (out.size() == 1) first.weight_bytes = weight_bytes();
  return out;
}

}  // namespace flash_mla::model
