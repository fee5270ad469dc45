#include "bench/load_engine.h"

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace flash_mla::bench {
namespace {

using Clock = std::chrono::steady_clock;

// What a server would read from run_load's body.
Request request_of(const LoadRequest& r) {
  Request out;
  out.prompt_token_ids = r.prompt;
  out.sampling.max_tokens = r.max_tokens;
  out.sampling.temperature = 0;
  out.sampling.ignore_eos = true;
  return out;
}

class Run {
 public:
  Run(Engine& engine, std::vector<LoadRequest>& requests) : engine_(engine), requests_(requests) {}

  double run(int clients, const std::function<void(std::size_t)>& progress) {
    begin_ = Clock::now();
    for (int i = 0; i < clients; ++i) send_next();
    std::unique_lock lock(mutex_);
    while (
        !changed_.wait_for(lock, std::chrono::milliseconds(200), [&] { return done_ == requests_.size(); })) {
      progress(done_);
    }
    progress(done_);
    return finished_;
  }

 private:
  double now() const { return std::chrono::duration<double>(Clock::now() - begin_).count(); }

  // From the first thread, then from the engine's, which may submit in an event.
  void send_next() {
    std::size_t i = 0;
    {
      const std::lock_guard lock(mutex_);
      if (next_ == requests_.size()) return;
      i = next_++;
    }
    requests_[i].begin = now();
    engine_.submit(request_of(requests_[i]), [this, i](const GenerationEvent& e) { take(requests_[i], e); });
  }

  void take(LoadRequest& r, const GenerationEvent& e) {
    const double time = now();
    if (r.first == 0) r.first = time;
    r.last = time;
    if (e.finish == FinishReason::kNone) return;
    r.end = time;
    r.status = 200;
    r.error = e.error;
    r.prompt_tokens = e.usage.prompt_tokens;
    r.completion_tokens = e.usage.completion_tokens;
    send_next();
    const std::lock_guard lock(mutex_);
    finished_ = time;
    if (++done_ == requests_.size()) changed_.notify_all();
  }

  Engine& engine_;
  std::vector<LoadRequest>& requests_;
  Clock::time_point begin_;
  std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::size_t next_ = 0, done_ = 0;
  double finished_ = 0;
};

}  // namespace

double run_load_in_process(Engine& engine, int clients, std::vector<LoadRequest>& requests,
                           const std::function<void(std::size_t)>& progress) {
  return requests.empty() ? 0 : Run(engine, requests).run(clients, progress);
}

}  // namespace flash_mla::bench
