#pragma once

#include <memory>
#include <vector>

#include "flash_mla/engine.h"

namespace flash_mla {

/// Events of any number of requests on their way to somebody's event loop (epoll, asyncio, libuv): the engine's thread
/// leaves them here and makes a file descriptor readable. So nothing of the loop, such as an interpreter's lock, holds up
/// a step.
///
///     flash_mla::EventQueue queue;
///     engine.submit(std::move(request), queue.handler());
///     // once queue.file_descriptor() is readable:
///     for (const flash_mla::GenerationEvent& event : queue.take()) …
class EventQueue {
 public:
  /// Throws std::system_error where the process has no file descriptor left.
  EventQueue();
  ~EventQueue();
  EventQueue(const EventQueue&) = delete;
  EventQueue& operator=(const EventQueue&) = delete;

  /// For Engine::submit. It may outlive the queue, and what comes then goes nowhere.
  EventHandler handler() const;
  /// Readable while there are events; of the queue, and not to be read or closed by others.
  int file_descriptor() const;
  /// What has come since the last call, in its order. Does not wait.
  std::vector<GenerationEvent> take();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace flash_mla
