#include "engine/trace.h"

#include <nlohmann/json.hpp>

namespace flash_mla::engine {

std::string chrome_trace(std::span<const StepRecord> steps) {
  using Json = nlohmann::ordered_json;
  constexpr double kMicroseconds = 1e6;
  Json events = Json::array();
  events.push_back(
      {{"name", "process_name"}, {"ph", "M"}, {"pid", 1}, {"args", {{"name", "flash_mla engine"}}}});
  for (const StepRecord& r : steps) {
    const auto span = [&](const char* name, int thread, double begin, double end) {
      events.push_back({{"name", name},
                        {"ph", "X"},
                        {"pid", 1},
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
          {{"name", name}, {"ph", "C"}, {"pid", 1}, {"ts", r.begin * kMicroseconds}, {"args", values}});
    };
    counter("pages used", {{"pages", r.pages_used}});
    counter("sequences", {{"running", r.sequences}, {"waiting", r.waiting}});
  }
  return Json{{"displayTimeUnit", "ms"}, {"traceEvents", events}}.dump();
}

}  // namespace flash_mla::engine
