#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <stop_token>
#include <vector>

#include "engine/request.h"
#include "engine/statistics.h"

namespace flash_mla::engine {

/// Where other threads leave requests and cancellations for the thread that steps.
class Inbox {
 public:
  /// `max_waiting`: requests that have not been in a step yet; 0: no bound.
  Inbox(int max_waiting, Statistics& statistics) : max_waiting_(max_waiting), statistics_(statistics) {}

  /// Gives the request its id. Throws Overloaded past max_waiting, if `bounded`.
  RequestId submit(std::unique_ptr<ActiveRequest> request, bool bounded);
  /// One of its continuations, or all (-1).
  void cancel(RequestId id, int continuation = -1);

  struct Cancellation {
    RequestId id = 0;
    int continuation = -1;
  };
  struct Contents {
    std::vector<std::unique_ptr<ActiveRequest>> submitted;
    std::vector<Cancellation> cancelled;
    bool empty() const { return submitted.empty() && cancelled.empty(); }
  };
  /// Empties it.
  Contents take();

  /// One of the requests waits no longer: it is in a step, or has ended without.
  void started();
  /// Whether there is work besides what lies here.
  void set_busy(bool busy);
  /// Something besides requests has happened that a step should look at. From any thread.
  void wake();
  /// Blocks until somebody wakes it, or submits or cancels a request, but no longer than that.
  void wait_for_news(std::chrono::milliseconds longest);
  /// Blocks until there is something to do; false if `stop` was requested.
  bool wait_for_work(const std::stop_token& stop);

 private:
  const int max_waiting_;
  Statistics& statistics_;
  std::mutex mutex_;  // of what follows
  std::condition_variable_any changed_;
  Contents contents_;
  bool busy_ = false;
  bool woken_ = false;  // since the contents were last taken
  int num_waiting_ = 0;
  RequestId next_id_ = 1;
};

}  // namespace flash_mla::engine
