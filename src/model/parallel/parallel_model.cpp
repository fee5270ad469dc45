#include "model/parallel/parallel_model.h"

#include <fmt/format.h>
#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>

namespace flash_mla::model {

/// Runs one function after another.
class ParallelModel::Thread {
 public:
  explicit Thread(int rank)
      : thread_([this, rank](const std::stop_token& stop) {
          pthread_setname_np(pthread_self(), fmt::format("rank {}", rank).c_str());
          run(stop);
        }) {}

  void start(std::function<void()> work) {
    {
      const std::lock_guard lock(mutex_);
      work_ = std::move(work);
    }
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return work_ == nullptr; });
  }

 private:
  void run(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (changed_.wait(lock, stop, [this] { return work_ != nullptr; })) {
      const std::function<void()> work = work_;
      lock.unlock();
      work();
      lock.lock();
      work_ = nullptr;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::function<void()> work_;
  std::jthread thread_;  // last: it is joined before the rest goes
};

namespace {

std::vector<int> numbers_from(int first, int count) {
  std::vector<int> out(static_cast<std::size_t>(count));
  std::iota(out.begin(), out.end(), first);
  return out;
}

}  // namespace

ParallelModel::ParallelModel(int num_ranks, const MakeRank& make, std::chrono::milliseconds timeout)
    : ParallelModel(
          num_ranks, nullptr, 0,
          [&make](int rank, const RankLinks& links) { return make(rank, *links.ranks); }, timeout) {}

ParallelModel::ParallelModel(int num_ranks, std::shared_ptr<comm::ThreadGroup> all, int first,
                             const MakeLinkedRank& make, std::chrono::milliseconds timeout)
    : group_(numbers_from(first, num_ranks), timeout),
      all_(std::move(all)),
      ranks_(static_cast<std::size_t>(num_ranks)) {
  for (int rank = 0; rank < num_ranks; ++rank) {
    Rank& of = ranks_[static_cast<std::size_t>(rank)];
    of.communicator = group_.communicator(rank);
    if (all_) of.expert_ranks = all_->communicator(first + rank);
    if (rank > 0) of.thread = std::make_unique<Thread>(first + rank);
  }
  on_all(Call::kSetUp, [&](Rank& rank) {
    rank.model = make(rank.communicator->rank(), {rank.communicator.get(), rank.expert_ranks.get()});
  });
}

ParallelModel::~ParallelModel() {
  // A device's memory is given back where it was taken.
  for (Rank& rank : ranks_) {
    if (rank.thread) rank.thread->start([&rank] { rank.model.reset(); });
  }
  for (Rank& rank : ranks_) {
    if (rank.thread) rank.thread->wait();
  }
}

template <class F>
void ParallelModel::on_all(Call call, F&& f) {
  check_alive();
  const auto run = [&f, call](Rank& rank) {
    const auto begin = std::chrono::steady_clock::now();
    const auto fail = [&](const comm::RankError& why) {
      rank.error = std::current_exception();
      rank.communicator->fail(why);
      if (rank.expert_ranks && call == Call::kStep) rank.expert_ranks->fail(why);
    };
    try {
      f(rank);
    } catch (const comm::RankError& e) {
      fail(e);
    } catch (const std::exception& e) {
      fail({rank.communicator->number(), e.what()});
    } catch (...) {
      fail({rank.communicator->number(), "an unknown exception"});
    }
    rank.stats.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  for (Rank& rank : ranks_) {
    if (rank.thread) rank.thread->start([&run, &rank] { run(rank); });
  }
  run(ranks_[0]);
  for (Rank& rank : ranks_) {
    if (rank.thread) rank.thread->wait();
  }
  raise(call);
}

void ParallelModel::check_alive() const {
  if (broken_) throw comm::RankError(*broken_);
}

// A step that only some ranks have done leaves them apart for good. What all refuse alike, a wrong argument, does not, nor
// does a failure before or between steps.
void ParallelModel::raise(Call call) {
  std::vector<std::exception_ptr> errors;
  for (Rank& rank : ranks_) errors.push_back(std::exchange(rank.error, nullptr));
  const auto num_failed = std::ranges::count_if(errors, [](const auto& e) { return e != nullptr; });
  if (num_failed == 0) return;
  // Its own failure, not that it has heard of another's.
  std::exception_ptr own;
  int failed = -1;
  std::int64_t num_own = 0;
  for (std::size_t r = 0; r < errors.size(); ++r) {
    if (!errors[r]) continue;
    try {
      std::rethrow_exception(errors[r]);
    } catch (const comm::RankError& e) {
      if (!broken_) broken_ = e;
    } catch (...) {
      ++num_own;
      if (own) continue;
      own = errors[r];
      failed = ranks_[r].communicator->number();
    }
  }
  if (own && (call == Call::kSetUp || num_own == std::ssize(ranks_))) {
    broken_.reset();
    group_.reset();
    std::rethrow_exception(own);
  }
  if (own) {
    try {
      std::rethrow_exception(own);
    } catch (const std::exception& e) {
      broken_ = comm::RankError(failed, e.what());
    } catch (...) {
      broken_ = comm::RankError(failed, "an unknown exception");
    }
  }
  check_alive();
}

std::size_t ParallelModel::bytes_per_page() const {
  return std::accumulate(ranks_.begin(), ranks_.end(), std::size_t{0}, [](std::size_t sum, const Rank& rank) {
    return sum + rank.model->bytes_per_page();
  });
}

double ParallelModel::weight_bytes() const {
  return std::accumulate(ranks_.begin(), ranks_.end(), 0.0,
                         [](double sum, const Rank& rank) { return sum + rank.model->weight_bytes(); });
}

void ParallelModel::allocate_cache(int num_pages) {
  on_all(Call::kSetUp, [&](Rank& rank) { rank.model->allocate_cache(num_pages); });
}

void ParallelModel::copy_page(int source, int target) {
  on_all(Call::kStep, [&](Rank& rank) { rank.model->copy_page(source, target); });
}

namespace {

/// All of them.
class JointMark : public CopyMark {
 public:
  explicit JointMark(std::vector<std::unique_ptr<CopyMark>> marks) : marks_(std::move(marks)) {}
  bool done() override {
    return std::ranges::all_of(marks_, [](const auto& mark) { return mark->done(); });
  }
  void wait() override {
    for (const auto& mark : marks_) mark->wait();
  }

 private:
  std::vector<std::unique_ptr<CopyMark>> marks_;
};

/// Of the ranks' caches.
class JointCopies : public PageCopies {
 public:
  explicit JointCopies(std::vector<std::unique_ptr<PageCopies>> ranks) : ranks_(std::move(ranks)) {}
  void follow_steps() override {
    for (const auto& rank : ranks_) rank->follow_steps();
  }
  void download(std::span<const std::int32_t> pages, std::byte* to) override {
    ranks_[0]->download(pages, to);
  }
  void download(int layer, std::span<const std::int32_t> pages, std::byte* to) override {
    ranks_[0]->download(layer, pages, to);
  }
  void upload(std::span<const std::int32_t> pages, const std::byte* from) override {
    for (const auto& rank : ranks_) rank->upload(pages, from);
  }
  std::unique_ptr<CopyMark> mark() override {
    std::vector<std::unique_ptr<CopyMark>> marks;
    for (const auto& rank : ranks_) marks.push_back(rank->mark());
    return std::make_unique<JointMark>(std::move(marks));
  }

 private:
  std::vector<std::unique_ptr<PageCopies>> ranks_;
};

}  // namespace

std::unique_ptr<PageCopies> ParallelModel::make_page_copies() {
  std::vector<std::unique_ptr<PageCopies>> ranks;
  for (const Rank& rank : ranks_) ranks.push_back(rank.model->make_page_copies());
  return std::make_unique<JointCopies>(std::move(ranks));
}

void ParallelModel::reserve(int num_tokens, int num_rows) {
  on_all(Call::kSetUp, [&](Rank& rank) { rank.model->reserve(num_tokens, num_rows); });
}

double ParallelModel::Rank::exchange_seconds() const {
  return communicator->traffic().seconds + (expert_ranks ? expert_ranks->traffic().seconds : 0);
}

void ParallelModel::launch(const ForwardBatch& batch) {
  on_all(Call::kStep, [&](Rank& rank) {
    const double exchanged = rank.exchange_seconds();
    rank.span.begin = std::chrono::steady_clock::now();
    rank.model->launch(batch);
    rank.span.end = std::chrono::steady_clock::now();
    rank.span.exchange_seconds = rank.exchange_seconds() - exchanged;
  });
  logit_rows_.push_back(batch.logit_rows.size());
  const std::size_t tokens = batch.drawn_rows.size() + batch.greedy_rows.size();
  for (Rank& rank : ranks_) rank.tokens.resize(std::max(rank.tokens.size(), tokens));
}

void ParallelModel::choose(std::span<const TokenRule> rules) {
  on_all(Call::kStep, [&](Rank& rank) { rank.model->choose(rules); });
}

void ParallelModel::collect(float* logits, std::int32_t* tokens) {
  const std::size_t rows = logit_rows_.empty() ? 0 : logit_rows_.front();
  if (!logit_rows_.empty()) logit_rows_.erase(logit_rows_.begin());
  on_all(Call::kStep, [&](Rank& rank) {
    if (&rank == ranks_.data()) return rank.model->collect(logits, tokens);
    rank.logits.resize(rows * static_cast<std::size_t>(rank.model->vocab_size()));
    rank.model->collect(rank.logits.data(), rank.tokens.data());
  });
}

void ParallelModel::draft(const DraftBatch& batch, std::int32_t* tokens) {
  on_all(Call::kStep, [&](Rank& rank) {
    if (&rank == ranks_.data()) return rank.model->draft(batch, tokens);
    rank.tokens.resize(std::max(rank.tokens.size(), batch.draws.size()));
    rank.model->draft(batch, rank.tokens.data());
  });
}

// Every rank chooses for all tokens; each runs some of the choices.
std::vector<ExpertCounts> ParallelModel::expert_counts() const {
  std::vector<ExpertCounts> out = first().expert_counts();
  for (std::size_t r = 1; r < ranks_.size(); ++r) {
    const std::vector<ExpertCounts> of_rank = ranks_[r].model->expert_counts();
    for (std::size_t i = 0; i < out.size(); ++i)
      out[i].rank_counts.push_back(of_rank.at(i).rank_counts.at(0));
  }
  return out;
}

std::vector<RankStats> ParallelModel::rank_stats() const {
  std::vector<RankStats> out;
  for (const Rank& rank : ranks_) {
    RankStats& of = out.emplace_back(rank.stats);
    for (const comm::Communicator* to : {rank.communicator.get(), rank.expert_ranks.get()}) {
      if (to == nullptr) continue;
      of.exchanges += to->traffic().calls;
      of.bytes_sent += to->traffic().bytes;
    }
    of.exchange_seconds = rank.exchange_seconds();
    of.weight_bytes = rank.model->weight_bytes();
  }
  return out;
}

std::vector<RankSpan> ParallelModel::rank_spans() const {
  std::vector<RankSpan> out;
  out.reserve(ranks_.size());
  for (const Rank& rank : ranks_) out.push_back(rank.span);
  return out;
}

}  // namespace flash_mla::model
