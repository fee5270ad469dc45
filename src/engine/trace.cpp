#include "engine/trace.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace flash_mla::engine {

namespace {

// Whose scheduler it was.
int first_rank(const StepRecord& r) { return r.ranks.empty() ? r.rank : r.ranks.front().rank; }

}  // namespace

std::string chrome_trace(std::span<const StepRecord> steps) {
  using Json = nlohmann::ordered_json;
  constexpr double kMicroseconds = 1e6;
  Json events = Json::array();
  // Ranks side by side, as processes.
  int ranks = 1;
  for (const StepRecord& r : steps) {
    ranks = std::max(ranks, first_rank(r) + 1);
    for (const StepRecord::Rank& rank : r.ranks) ranks = std::max(ranks, rank.rank + 1);
  }
  for (int rank = 0; rank < ranks; ++rank) {
    const std::string name =
        ranks == 1 ? "flash_mla engine" : "flash_mla engine, rank " + std::to_string(rank);
    events.push_back({{"name", "process_name"}, {"ph", "M"}, {"pid", rank + 1}, {"args", {{"name", name}}}});
  }
  for (const StepRecord& r : steps) {
    const int process = first_rank(r) + 1;
    const auto span = [&](const char* name, int thread, double begin, double end) {
      events.push_back({{"name", name},
                        {"ph", "X"},
                        {"pid", process},
                        {"tid", thread},
                        {"ts", begin * kMicroseconds},
                        {"dur", (end - begin) * kMicroseconds},
                        {"args",
                         {{"step", r.step},
                          {"sequences", r.sequences},
                          {"prefill_tokens", r.prefill_tokens},
                          {"decode_tokens", r.decode_tokens},
                          {"preempted", r.preempted}}}});
    };
    span("step", 1, r.begin, r.end);
    span("plan", 2, r.begin, r.planned);
    span("model", 2, r.planned, r.computed);
    span("sample", 2, r.computed, r.end);
    const auto counter = [&](const char* name, const Json& values) {
      events.push_back(
          {{"name", name}, {"ph", "C"}, {"pid", process}, {"ts", r.begin * kMicroseconds}, {"args", values}});
    };
    counter("pages used", {{"pages", r.pages_used}});
    counter("sequences", {{"running", r.sequences}, {"waiting", r.waiting}});
    for (const StepRecord::Rank& rank : r.ranks) {
      events.push_back({{"name", "rank's step"},
                        {"ph", "X"},
                        {"pid", rank.rank + 1},
                        {"tid", 3},
                        {"ts", rank.begin * kMicroseconds},
                        {"dur", (rank.end - rank.begin) * kMicroseconds},
                        {"args", {{"step", r.step}, {"exchange_ms", rank.exchange_seconds * 1e3}}}});
    }
  }
  return Json{{"displayTimeUnit", "ms"}, {"traceEvents", events}}.dump();
}

}  // namespace flash_mla::engine
