#include "engine/inbox.h"

#include <fmt/format.h>

#include <utility>

namespace flash_mla::engine {

RequestId Inbox::submit(std::unique_ptr<ActiveRequest> request, bool bounded) {
  RequestId id = 0;
  {
    const std::lock_guard lock(mutex_);
    if (bounded && max_waiting_ > 0 && num_waiting_ >= max_waiting_) {
      throw Overloaded(fmt::format("{} requests wait already, expected fewer than max_waiting, {}",
                                   num_waiting_, max_waiting_));
    }
    id = next_id_++;
    request->id = id;
    request->submitted = Clock::now();
    ++num_waiting_;
    // Before anybody can take it: its figures are never counted out before they are counted in.
    statistics_.submitted(static_cast<std::int64_t>(request->prompt.size()));
    contents_.submitted.push_back(std::move(request));
  }
  changed_.notify_all();
  return id;
}

void Inbox::cancel(RequestId id, int continuation) {
  {
    const std::lock_guard lock(mutex_);
    contents_.cancelled.push_back({id, continuation});
  }
  changed_.notify_all();
}

Inbox::Contents Inbox::take() {
  const std::lock_guard lock(mutex_);
  woken_ = false;
  return std::exchange(contents_, {});
}

void Inbox::wake() {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
  }
  changed_.notify_all();
}

void Inbox::wait_for_news(std::chrono::milliseconds longest) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, longest, [&] { return woken_ || !contents_.empty(); });
}

void Inbox::started() {
  const std::lock_guard lock(mutex_);
  --num_waiting_;
}

void Inbox::set_busy(bool busy) {
  const std::lock_guard lock(mutex_);
  busy_ = busy;
}

bool Inbox::wait_for_work(const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  return changed_.wait(lock, stop, [&] { return busy_ || woken_ || !contents_.empty(); }) &&
         !stop.stop_requested();
}

}  // namespace flash_mla::engine
