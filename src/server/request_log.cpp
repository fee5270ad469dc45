#include "server/request_log.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <cstdio>
#include <mutex>
#include <set>

#include "server/api_error.h"
#include "server/limits.h"

namespace flash_mla::server {
namespace {

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
               {"method", r.method}, {"path", r.path.substr(0, kMaxLoggedBytes)},
               {"status", r.status}, {"seconds", seconds.count()}};
  if (r.generates) {
    line["stream"] = r.stream;
    line["choices"] = r.num_choices;
    line["first_event_seconds"] = r.first_event_seconds < 0 ? Json() : Json(r.first_event_seconds);
    line["prompt_tokens"] = r.usage.prompt_tokens;
    line["cached_tokens"] = r.usage.cached_tokens;
    line["completion_tokens"] = r.usage.completion_tokens;
  }
  if (!r.limited_by.empty()) line["limited_by"] = r.limited_by;
  if (!r.error.empty()) line["error"] = r.error.substr(0, kMaxLoggedBytes);
  return dump(line) + "\n";
}

void warn_of_unknown_fields(const std::vector<std::string>& names) {
  static std::mutex mutex;
  static std::set<std::string> warned;
  for (const std::string& name : names) {
    const std::lock_guard lock(mutex);
    if (warned.size() == kMaxWarnings || !warned.insert(name).second) continue;
    const std::string line =
        dump({{"time", now()},
              {"level", "warning"},
              {"field", name},
              {"message", "clients send a field that no API defines; it has no effect"}}) +
        "\n";
    std::fwrite(line.data(), 1, line.size(), stderr);
  }
}

}  // namespace flash_mla::server
