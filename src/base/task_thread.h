#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace flash_mla {

/// A thread that does what others leave for it, in that order.
class TaskThread {
 public:
  /// `name` in lists of threads, at most 15 characters.
  explicit TaskThread(std::string name);
  /// Ends after the task that is under way; the others are dropped.
  ~TaskThread();
  TaskThread(const TaskThread&) = delete;
  TaskThread& operator=(const TaskThread&) = delete;

  /// A task must not throw.
  void post(std::function<void()> task);
  /// Tasks that have not ended.
  std::size_t num_tasks() const;
  /// How long the one under way has been so; 0: there is none.
  double busy_seconds() const;

 private:
  using Clock = std::chrono::steady_clock;

  void run(const std::stop_token& stop);

  mutable std::mutex mutex_;  // of what follows
  std::condition_variable_any changed_;
  std::deque<std::function<void()>> tasks_;
  bool busy_ = false;
  Clock::time_point begun_{};

  std::jthread thread_;
};

}  // namespace flash_mla
