#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "base/matrix.h"

namespace flash_mla::comm {

/// A rank cannot go on, and so none of its group can. The message names it and says why.
class RankError : public std::runtime_error {
 public:
  RankError(int rank, std::string reason);
  int rank() const { return rank_; }  ///< which one it is
  const std::string& reason() const { return reason_; }

 private:
  int rank_;
  std::string reason_;
};

/// What a rank has exchanged since it was made.
struct Traffic {
  std::int64_t calls = 0;
  std::int64_t bytes = 0;  ///< that it gave to others
  double seconds = 0;      ///< in calls, the wait for others included
};

/// One rank's door to the others of its group, all of which make the same calls in the same order; a call is queued
/// like the other calls of a device. Matrices lie in the device's memory and may be windows; sums are of float32 or
/// bfloat16, in float32 and in the order of the ranks, rounded once.
///
/// Every call throws InvalidArgument, before anybody is waited for, where its own arguments do not go together, and
/// RankError where a rank has failed, does not come in time, or asks for something else. After a RankError the group
/// is of no use.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// What errors call this rank: rank(), unless the group is part of a larger one.
  virtual int number() const { return rank(); }

  /// inout = the sum of all ranks' inout, of one shape.
  void all_reduce(const Matrix& inout);
  /// Rows [r * in.rows, (r + 1) * in.rows) of out = rank r's in; all have the same number of rows. `in` may be its own
  /// place in `out`.
  void all_gather(const Matrix& in, const Matrix& out);
  /// out = rows [rank * out.rows, (rank + 1) * out.rows) of the sum of all ranks' in.
  void reduce_scatter(const Matrix& in, const Matrix& out);
  /// Sends to[r] rows of `in` to rank r, in the order of the ranks; out = from[r] rows of rank r, in that order.
  void all_to_all_v(const Matrix& in, std::span<const std::int64_t> to, const Matrix& out,
                    std::span<const std::int64_t> from);
  /// inout = that of rank `root`.
  void broadcast(const Matrix& inout, int root);

  /// This rank gives up: calls of all others throw RankError with its number() and `reason`, those that wait already too.
  void fail(const std::string& reason) { fail(number(), reason); }
  /// The same because of another, of this group or not. The first reason of a group stays.
  void fail(const RankError& error) { fail(error.rank(), error.reason()); }

  const Traffic& traffic() const { return traffic_; }

 protected:
  virtual void do_all_reduce(const Matrix& inout) = 0;
  virtual void do_all_gather(const Matrix& in, const Matrix& out) = 0;
  virtual void do_reduce_scatter(const Matrix& in, const Matrix& out) = 0;
  virtual void do_all_to_all_v(const Matrix& in, std::span<const std::int64_t> to, const Matrix& out,
                               std::span<const std::int64_t> from) = 0;
  virtual void do_broadcast(const Matrix& inout, int root) = 0;
  virtual void fail(int number, const std::string& reason) = 0;

 private:
  template <class F>
  void count(std::int64_t bytes, F&& call);

  Traffic traffic_;
};

/// How long a rank waits for the others, unless it is told otherwise. The first step of a model may make kernels.
inline constexpr std::chrono::milliseconds kTimeout{60'000};

}  // namespace flash_mla::comm
