#include "flash_mla/event_queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <system_error>

namespace flash_mla {

struct EventQueue::State {
  State() : file(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (file < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  }
  ~State() { close(file); }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  const int file;
  std::mutex mutex;  // of what follows, and of whether the file is readable
  std::vector<GenerationEvent> events;
  bool closed = false;
};

EventQueue::EventQueue() : state_(std::make_shared<State>()) {}

EventQueue::~EventQueue() {
  const std::lock_guard lock(state_->mutex);
  state_->closed = true;
  state_->events.clear();
}

EventHandler EventQueue::handler() const {
  return [state = state_](const GenerationEvent& event) {
    const std::lock_guard lock(state->mutex);
    if (state->closed) return;
    state->events.push_back(event);
    // The counter is 0 before and cannot overflow.
    if (state->events.size() == 1) eventfd_write(state->file, 1);
  };
}

int EventQueue::file_descriptor() const { return state_->file; }

std::vector<GenerationEvent> EventQueue::take() {
  std::vector<GenerationEvent> events;
  const std::lock_guard lock(state_->mutex);
  if (state_->events.empty()) return events;
  eventfd_t count = 0;
  eventfd_read(state_->file, &count);
  events.swap(state_->events);
  return events;
}

}  // namespace flash_mla
