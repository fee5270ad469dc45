#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "engine/trace.h"
#include "flash_mla/engine.h"

namespace flash_mla {

void Histogram::add(double value) {
  const auto bucket = std::lower_bound(bounds.begin(), bounds.end(), value) - bounds.begin();
  counts.resize(bounds.size() + 1);
  ++counts[static_cast<std::size_t>(bucket)];
  sum += value;
  ++total;
}

double Histogram::quantile(double q) const {
  if (total == 0) return 0;
  const double wanted = std::clamp(q, 0.0, 1.0) * static_cast<double>(total);
  double below = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const auto count = static_cast<double>(counts[i]);
    if (count > 0 && below + count >= wanted) {
      if (i == bounds.size()) break;  // past the last bound nothing more is known
      const double low = i == 0 ? 0 : bounds[i - 1];
      return low + (bounds[i] - low) * (wanted - below) / count;
    }
    below += count;
  }
  return bounds.empty() ? 0 : bounds.back();
}

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kError:
      return "error";
  }
  throw std::logic_error("unknown finish reason");
}

namespace engine {

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

}  // namespace engine
}  // namespace flash_mla
