#include "base/task_thread.h"

#include <pthread.h>

#include <utility>

namespace flash_mla {

TaskThread::TaskThread(std::string name)
    : thread_([this, name = std::move(name)](const std::stop_token& stop) {
        pthread_setname_np(pthread_self(), name.c_str());
        run(stop);
      }) {}

TaskThread::~TaskThread() {
  thread_.request_stop();
  thread_.join();
}

void TaskThread::post(std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
  }
  changed_.notify_one();
}

std::size_t TaskThread::num_tasks() const {
  const std::lock_guard lock(mutex_);
  return tasks_.size() + (busy_ ? 1 : 0);
}

double TaskThread::busy_seconds() const {
  const std::lock_guard lock(mutex_);
  return busy_ ? std::chrono::duration<double>(Clock::now() - begun_).count() : 0;
}

void TaskThread::run(const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  while (changed_.wait(lock, stop, [&] { return !tasks_.empty(); }) && !stop.stop_requested()) {
    {
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      busy_ = true;
      begun_ = Clock::now();
      lock.unlock();
      task();
    }  // what it held is freed here, without the lock
    lock.lock();
    busy_ = false;
  }
}

}  // namespace flash_mla
