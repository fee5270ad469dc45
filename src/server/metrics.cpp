#include <fmt/format.h>

#include <iterator>

#include "server/server.h"

namespace flash_mla::server {
namespace {

class Page {
 public:
  template <typename Value>
  void value(const char* name, const char* type, const char* help, Value value) {
    head(name, type, help);
    fmt::format_to(out(), "{} {}\n", name, value);
  }
  void head(const char* name, const char* type, const char* help) {
    fmt::format_to(out(), "# HELP {} {}\n# TYPE {} {}\n", name, help, name, type);
  }
  void labelled(const char* name, const char* label, const char* value, std::int64_t count) {
    fmt::format_to(out(), "{}{{{}=\"{}\"}} {}\n", name, label, value, count);
  }
  void histogram(const char* name, const char* help, const Histogram& h) {
    head(name, "histogram", help);
    std::int64_t cumulative = 0;
    for (std::size_t i = 0; i < h.bounds.size(); ++i) {
      cumulative += h.counts[i];
      fmt::format_to(out(), "{}_bucket{{le=\"{}\"}} {}\n", name, h.bounds[i], cumulative);
    }
    fmt::format_to(out(), "{}_bucket{{le=\"+Inf\"}} {}\n{}_sum {}\n{}_count {}\n", name, h.total, name, h.sum,
                   name, h.total);
  }
  std::string text;

 private:
  std::back_insert_iterator<std::string> out() { return std::back_inserter(text); }
};

double share(double part, double whole) { return whole == 0 ? 0 : part / whole; }

}  // namespace

std::string prometheus_text(const EngineStats& s, const HttpStats& http) {
  Page p;
  p.head("mla_http_responses_total", "counter",
         "HTTP responses by status; 499: the client left before its answer ended.");
  for (const auto& [status, count] : http.responses) {
    p.labelled("mla_http_responses_total", "code", std::to_string(status).c_str(), count);
  }
  p.value("mla_http_connections", "gauge", "Open connections.", http.connections);
  p.value("mla_requests_submitted_total", "counter", "Requests that entered the queue.",
          s.requests_submitted);
  const char* finished = "mla_continuations_finished_total";
  p.head(finished, "counter", "Continuations by how they ended.");
  p.labelled(finished, "reason", "stop", s.finished_stop);
  p.labelled(finished, "reason", "length", s.finished_length);
  p.labelled(finished, "reason", "cancelled", s.cancelled);
  p.labelled(finished, "reason", "error", s.failed);
  p.value("mla_sequences_running", "gauge", "Sequences in the batch.", s.running);
  p.value("mla_sequences_waiting", "gauge", "Sequences in the queue.", s.waiting);
  p.value("mla_prompt_tokens_total", "counter", "Tokens of prompts.", s.prompt_tokens);
  p.value("mla_generated_tokens_total", "counter", "Tokens of continuations.", s.generated_tokens);
  p.value("mla_computed_tokens_total", "counter", "Tokens that went through the model.", s.computed_tokens);
  p.value("mla_prefix_tokens_looked_up_total", "counter", "Prompt tokens looked up in the prefix cache.",
          s.prefix_tokens_looked_up);
  p.value("mla_prefix_tokens_hit_total", "counter", "Prompt tokens found in the prefix cache.",
          s.prefix_tokens_hit);
  p.value("mla_preemptions_total", "counter", "Sequences that lost their pages to earlier ones.",
          s.preemptions);
  p.value("mla_pages_evicted_total", "counter", "Cached pages that were taken for new tokens.",
          s.pages_evicted);
  p.value("mla_steps_total", "counter", "Steps of the engine.", s.steps);
  p.value("mla_step_seconds_total", "counter", "Time spent in steps.", s.step_seconds);
  p.value("mla_cache_pages", "gauge", "Pages of 64 tokens in the cache.", s.pages_total);
  p.value("mla_cache_pages_used", "gauge", "Pages of running sequences.", s.pages_used);
  p.value("mla_cache_pages_cached", "gauge", "Pages kept for prefix reuse only.", s.pages_cached);
  p.value("mla_mem_utilization", "gauge", "Cache bytes of running sequences over all cache bytes.",
          share(s.pages_used, s.pages_total));
  p.value("warps_active_ratio", "gauge",
          "Busy over available workers, by the decode schedule of the last step that decoded.",
          s.schedule_utilisation);
  p.value("cache_hit_rate", "gauge", "Prompt tokens found in the prefix cache over those looked up.",
          share(static_cast<double>(s.prefix_tokens_hit), static_cast<double>(s.prefix_tokens_looked_up)));
  p.histogram("mla_ttft_seconds", "Submission to first token.", s.ttft_seconds);
  p.histogram("mla_tpot_seconds", "Time per token after the first, per continuation.", s.tpot_seconds);
  p.histogram("mla_e2e_seconds", "Submission to the end of a continuation.", s.e2e_seconds);
  return p.text;
}

}  // namespace flash_mla::server
