#include "comm/thread_group.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/element.h"
#include "flash_mla/error.h"

// A call has two meetings. Behind the first every rank sees what all others have laid out, and takes what is its own;
// at the second they wait until all have. A failure ends the wait at a first meeting alone: whoever has passed one may
// be reading the others' memory, and is done with that in a moment.

namespace flash_mla::comm {
namespace {

using Clock = std::chrono::steady_clock;

// Looks at what it waits for before a rank sleeps: some 50 us. Waking costs about as much, and where there are fewer
// processors than threads a rank that spins keeps others from coming.
constexpr int kSpins = 1000;

struct Call {
  const char* name = "";
  Matrix in, out;
  std::span<const std::int64_t> to, from;
  int root = -1;

  /// What all ranks must agree on.
  std::string described() const {
    std::string text = fmt::format("{} of {} {}", name, in.columns, dtype_name(in.dtype));
    if (to.empty()) text += fmt::format(" x {} rows", in.rows);
    if (root >= 0) text += fmt::format(" from rank {}", root);
    return text;
  }
  bool agrees_with(const Call& other) const {
    return std::strcmp(name, other.name) == 0 && in.columns == other.in.columns &&
           in.dtype == other.in.dtype && root == other.root && (!to.empty() || in.rows == other.in.rows);
  }
};

struct Failure {
  int rank;  ///< its number
  std::string reason;
};

void copy(const Matrix& from, const Matrix& to) {
  if (from.data == to.data) return;
  const std::size_t bytes = static_cast<std::size_t>(from.columns) * dtype_size(from.dtype);
  for (std::int64_t i = 0; i < from.rows; ++i) std::memcpy(to.row(i), from.row(i), bytes);
}

float widen(float x) { return x; }
float widen(std::uint16_t bits) { return to_float(Bf16{bits}); }
void narrow(float x, float& out) { out = x; }
void narrow(float x, std::uint16_t& out) { out = to_bf16(x).bits; }

// Elements [begin, end) of the row-major order of `terms`, all of one shape: their sum in that order, to `results`.
template <class Element>
void add_up(std::span<const Matrix> terms, std::int64_t begin, std::int64_t end,
            std::span<const Matrix> results) {
  constexpr std::int64_t kPiece = 512;  // stays in registers and the first cache
  std::array<float, kPiece> sum;
  const std::int64_t columns = terms[0].columns;
  while (begin < end) {
    const std::int64_t row = begin / columns, column = begin % columns;
    const std::int64_t count = std::min({kPiece, columns - column, end - begin});
    const auto at = [&](const Matrix& m) { return reinterpret_cast<Element*>(m.row(row)) + column; };
    const Element* first = at(terms[0]);
    for (std::int64_t i = 0; i < count; ++i) sum[static_cast<std::size_t>(i)] = widen(first[i]);
    for (const Matrix& term : terms.subspan(1)) {
      const Element* next = at(term);
      for (std::int64_t i = 0; i < count; ++i) sum[static_cast<std::size_t>(i)] += widen(next[i]);
    }
    for (const Matrix& result : results) {
      Element* out = at(result);
      for (std::int64_t i = 0; i < count; ++i) narrow(sum[static_cast<std::size_t>(i)], out[i]);
    }
    begin += count;
  }
}

void add_up(std::span<const Matrix> terms, std::int64_t begin, std::int64_t end,
            std::span<const Matrix> results) {
  if (terms[0].dtype == DType::kBFloat16) {
    add_up<std::uint16_t>(terms, begin, end, results);
  } else {
    add_up<float>(terms, begin, end, results);
  }
}

}  // namespace

struct ThreadGroup::Shared {
  Shared(std::vector<int> of_ranks, std::chrono::milliseconds wait)
      : numbers(std::move(of_ranks)),
        size(static_cast<int>(numbers.size())),
        timeout(wait),
        calls(numbers.size()),
        came(numbers.size()) {}

  int number(std::int64_t rank) const { return numbers[static_cast<std::size_t>(rank)]; }

  const std::vector<int> numbers;  ///< of its ranks, in errors
  const int size;
  const std::chrono::milliseconds timeout;
  std::vector<Call> calls;  ///< of each rank, written by it before it comes to a meeting
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::uint64_t> came;     ///< meetings that each rank has come to
  int arrived = 0;                     ///< ranks at the next
  std::atomic<std::uint64_t> over{0};  ///< meetings that all have come to
  std::atomic<bool> failed{false};
  std::optional<Failure> failure;

  void fail(int number, const std::string& reason) {
    {
      const std::lock_guard lock(mutex);
      if (failure) return;  // the first is the reason
      failure = {number, reason};
      failed = true;
    }
    changed.notify_all();
  }

  /// Returns when all have come. `may_fail`: throws RankError if that is not to be.
  void meet(int rank, bool may_fail) {
    std::uint64_t meeting = 0;
    {
      const std::lock_guard lock(mutex);
      if (failure && may_fail) throw RankError(failure->rank, failure->reason);
      meeting = ++came[static_cast<std::size_t>(rank)];
      if (++arrived == size) {
        arrived = 0;
        over = meeting;
      }
    }
    const auto done = [&] { return over >= meeting || (may_fail && failed); };
    if (over >= meeting) {
      changed.notify_all();
      return;
    }
    for (int i = 0; i < kSpins && !done(); ++i) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock lock(mutex);
    if (may_fail) {
      changed.wait_until(lock, Clock::now() + timeout, done);
    } else {
      changed.wait(lock, done);
    }
    if (over >= meeting) return;
    if (!failure) {
      const auto missing = std::ranges::find_if(came, [&](std::uint64_t n) { return n < meeting; });
      failure = {number(missing - came.begin()),
                 fmt::format("has not come to {} within {} ms",
                             calls[static_cast<std::size_t>(rank)].described(), timeout.count())};
      failed = true;
      changed.notify_all();
    }
    throw RankError(failure->rank, failure->reason);
  }
};

class ThreadGroup::Rank : public Communicator {
 public:
  Rank(Shared& shared, int rank) : shared_(shared), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return shared_.size; }
  int number() const override { return shared_.number(rank_); }

 protected:
  void do_all_reduce(const Matrix& inout) override {
    exchange({"all_reduce", inout, inout, {}, {}, -1}, [&] {
      // A share of the sum each, written to all: nobody else reads or writes it.
      const std::int64_t elements = inout.rows * inout.columns;
      const std::vector<Matrix> all = inputs();
      add_up(all, elements * rank_ / size(), elements * (rank_ + 1) / size(), all);
    });
  }
  void do_all_gather(const Matrix& in, const Matrix& out) override {
    exchange({"all_gather", in, out, {}, {}, -1}, [&] {
      for (int r = 0; r < size(); ++r) copy(call(r).in, out.row_range(r * in.rows, in.rows));
    });
  }
  void do_reduce_scatter(const Matrix& in, const Matrix& out) override {
    exchange({"reduce_scatter", in, out, {}, {}, -1}, [&] {
      std::vector<Matrix> mine = inputs();
      for (Matrix& term : mine) term = term.row_range(rank_ * out.rows, out.rows);
      add_up(mine, 0, out.rows * out.columns, std::span(&out, 1));
    });
  }
  void do_all_to_all_v(const Matrix& in, std::span<const std::int64_t> to, const Matrix& out,
                       std::span<const std::int64_t> from) override {
    exchange({"all_to_all_v", in, out, to, from, -1}, [&] {
      std::int64_t at = 0;
      for (int r = 0; r < size(); ++r) {
        const Call& sender = call(r);
        std::int64_t first = 0;
        for (int before = 0; before < rank_; ++before) first += sender.to[static_cast<std::size_t>(before)];
        const std::int64_t count = from[static_cast<std::size_t>(r)];
        copy(sender.in.row_range(first, count), out.row_range(at, count));
        at += count;
      }
    });
  }
  void do_broadcast(const Matrix& inout, int root) override {
    exchange({"broadcast", inout, inout, {}, {}, root}, [&] { copy(call(root).in, inout); });
  }
  void fail(int number, const std::string& reason) override { shared_.fail(number, reason); }

 private:
  const Call& call(int rank) const { return shared_.calls[static_cast<std::size_t>(rank)]; }
  std::vector<Matrix> inputs() const {
    std::vector<Matrix> out;
    out.reserve(shared_.calls.size());
    for (const Call& of : shared_.calls) out.push_back(of.in);
    return out;
  }

  template <class F>
  void exchange(const Call& mine, F&& take) {
    shared_.calls[static_cast<std::size_t>(rank_)] = mine;
    shared_.meet(rank_, true);
    const std::optional<Failure> wrong = disagreement();
    if (!wrong) take();
    shared_.meet(rank_, false);
    if (!wrong) return;
    shared_.fail(wrong->rank, wrong->reason);
    throw RankError(wrong->rank, wrong->reason);
  }

  // All ranks look at the same calls, and so come to the same answer.
  std::optional<Failure> disagreement() const {
    for (int r = 0; r < size(); ++r) {
      if (!call(r).agrees_with(call(0))) {
        return Failure{shared_.number(r), fmt::format("calls {}, where rank {} calls {}", call(r).described(),
                                                      shared_.number(0), call(0).described())};
      }
    }
    for (int r = 0; r < size() && !call(0).to.empty(); ++r) {
      for (int s = 0; s < size(); ++s) {
        const std::int64_t expected = call(r).from[static_cast<std::size_t>(s)];
        const std::int64_t sent = call(s).to[static_cast<std::size_t>(r)];
        if (expected == sent) continue;
        return Failure{shared_.number(r),
                       fmt::format("expects {} rows of rank {} in all_to_all_v, which sends {}", expected,
                                   shared_.number(s), sent)};
      }
    }
    return std::nullopt;
  }

  Shared& shared_;
  int rank_;
};

ThreadGroup::ThreadGroup(int size, std::chrono::milliseconds timeout) {
  if (size < 1) throw InvalidArgument(fmt::format("size is {}, expected >= 1, the ranks of a group", size));
  std::vector<int> numbers(static_cast<std::size_t>(size));
  std::iota(numbers.begin(), numbers.end(), 0);
  shared_ = std::make_unique<Shared>(std::move(numbers), timeout);
}
ThreadGroup::ThreadGroup(std::vector<int> numbers, std::chrono::milliseconds timeout) {
  if (numbers.empty()) throw InvalidArgument("numbers has no ranks, expected at least 1");
  shared_ = std::make_unique<Shared>(std::move(numbers), timeout);
}
ThreadGroup::~ThreadGroup() = default;

std::unique_ptr<Communicator> ThreadGroup::communicator(int rank) {
  if (rank < 0 || rank >= shared_->size) {
    throw InvalidArgument(fmt::format("rank is {}, expected 0 to {}", rank, shared_->size - 1));
  }
  return std::make_unique<Rank>(*shared_, rank);
}

void ThreadGroup::reset() {
  const std::lock_guard lock(shared_->mutex);
  shared_->failure.reset();
  shared_->failed = false;
  shared_->arrived = 0;
  shared_->over = 0;
  std::ranges::fill(shared_->came, 0);
}

}  // namespace flash_mla::comm
