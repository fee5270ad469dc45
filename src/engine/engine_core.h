#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <stop_token>
#include <unordered_map>
#include <vector>

#include "kv/block_manager.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "text/text_decoder.h"
#include "flash_mla/engine.h"
#include "model/model.h"

namespace flash_mla::engine {

/// Generation over tokens: everything of the engine that is not loading files. submit and cancel only leave a
/// note; all work, and every event, happens in step(), under one lock.
class EngineCore {
 public:
  /// `make_decoder` may be empty: events then carry tokens and no text, and stop strings are refused.
  /// Allocates the model's cache. Throws InvalidArgument for options out of range.
  EngineCore(std::unique_ptr<model::Model> model, TextDecoderFactory make_decoder,
             std::vector<std::int32_t> eos_token_ids, const EngineOptions& options);
  ~EngineCore();

  /// A request that has been checked.
  struct Submission {
    std::vector<std::int32_t> prompt;
    SamplingParams sampling;
    EventHandler on_event;
  };

  /// Throws InvalidArgument (or Unsupported) for a request that cannot run.
  void check(const Submission& submission) const;

  /// Takes a checked request. Throws Overloaded past options.max_waiting, if `bounded`.
  RequestId submit(Submission submission, bool bounded = true);
  void cancel(RequestId id);
  bool step();
  void cancel_all();

  /// Blocks until step() has something to do; false if `stop` was requested.
  bool wait_for_work(const std::stop_token& stop);

  EngineStats stats() const;
  std::vector<StepRecord> timeline() const;
  std::int64_t max_length() const { return max_length_; }
  const EngineOptions& options() const { return options_; }

 private:
  struct Generation;
  struct Job;
  struct Flight;
  struct Choice;
  using Clock = std::chrono::steady_clock;

  std::unique_ptr<TextDecoder> new_decoder() const;
  bool take_notes();
  void start(RequestId id, Submission submission, Clock::time_point submitted);
  std::unique_ptr<Flight> launch(StepPlan plan, Clock::time_point begin);
  std::unique_ptr<Flight> launch_ahead(const Flight& flight);
  std::size_t num_logits(const Flight& flight) const;
  void give_up(Flight& flight, const std::string& why);
  void drop_ahead();
  void end_all(Flight& flight, const std::string& why);
  void finish(Flight& flight);
  void land(Flight& flight);
  std::vector<Choice> plan_choices(const Flight& flight);
  void choose(std::vector<Choice>& choices);
  void fork_generations(Job& job);
  void accept(Generation& generation, const Sampled& sampled);
  void end(Generation& generation, FinishReason reason, const std::string& error, GenerationEvent event,
           bool keep_pages = true);
  void send(Job& job, const GenerationEvent& event);
  void drop_finished_jobs();
  void note_started(Job& job);
  void note_state();
  double seconds(Clock::time_point t) const { return std::chrono::duration<double>(t - created_).count(); }
  double decode_utilisation(const StepPlan& plan) const;

  std::unique_ptr<model::Model> model_;
  TextDecoderFactory make_decoder_;
  std::vector<std::int32_t> eos_token_ids_;
  EngineOptions options_;
  BlockManager blocks_;
  Scheduler scheduler_;
  std::int64_t max_length_;
  Clock::time_point created_ = Clock::now();

  std::mutex step_mutex_;  // one step at a time
  std::unordered_map<RequestId, std::unique_ptr<Job>> jobs_;
  std::vector<RequestId> finished_jobs_;
  std::unique_ptr<Flight> flight_;  // launched ahead; at least one of its generations goes on
  std::vector<float> logits_;
  std::vector<std::int32_t> tokens_;  // that the model has chosen
  std::vector<Sampler> samplers_;     // one per thread

  struct Note {
    RequestId id;
    Submission submission;
    Clock::time_point time;
  };
  mutable std::mutex notes_mutex_;  // of what follows
  std::condition_variable_any notes_changed_;
  std::vector<Note> submitted_;
  std::vector<RequestId> cancelled_;
  bool busy_ = false;  // sequences run or wait
  int num_waiting_requests_ = 0;
  RequestId next_id_ = 1;
  std::mt19937_64 seeds_;
  EngineStats stats_;
  std::deque<StepRecord> timeline_;
};

}  // namespace flash_mla::engine
