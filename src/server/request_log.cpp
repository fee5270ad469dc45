#include "server/request_log.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include "server/api.h"

namespace flash_mla::server {
namespace {

// More of a path or an error tells nothing, and a log must not grow with what strangers send.
constexpr std::size_t kMostBytes = 200;

std::string now() {
  using std::chrono::system_clock;
  const auto time = system_clock::now();
  const auto ms =
      std::chrono::duration_cast<std::chrono::milliseconds>(time.time_since_epoch()).count() % 1000;
  return fmt::format("{:%Y-%m-%dT%H:%M:%S}.{:03}Z", fmt::gmtime(system_clock::to_time_t(time)), ms);
}

}  // namespace

std::string log_line(const RequestRecord& r) {
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - r.begin;
  Json line = {{"time", now()},      {"request_id", r.id},
               {"method", r.method}, {"path", r.path.substr(0, kMostBytes)},
               {"status", r.status}, {"seconds", seconds.count()}};
  if (r.generates) {
    line["stream"] = r.stream;
    line["choices"] = r.num_choices;
    line["first_event_seconds"] = r.first_event_seconds < 0 ? Json() : Json(r.first_event_seconds);
    line["prompt_tokens"] = r.usage.prompt_tokens;
    line["cached_tokens"] = r.usage.cached_tokens;
    line["completion_tokens"] = r.usage.completion_tokens;
  }
  if (!r.error.empty()) line["error"] = r.error.substr(0, kMostBytes);
  return line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace flash_mla::server
