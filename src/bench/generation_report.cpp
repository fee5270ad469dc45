#include "bench/generation_report.h"

#include <fmt/format.h>

#include <cstdio>
#include <nlohmann/json.hpp>

namespace flash_mla::bench {
namespace {

double mean(const Histogram& h) { return h.total == 0 ? 0 : h.sum / static_cast<double>(h.total); }

double rate(double part, double whole) { return whole <= 0 ? 0 : part / whole; }

nlohmann::ordered_json to_json(const DraftStats& s) {
  return {{"drafted", s.drafted},
          {"accepted", s.accepted},
          {"acceptance", s.acceptance()},
          {"tokens_per_step", s.tokens_per_step()}};
}

// What the sources that were asked have brought.
std::string draft_summary(const nlohmann::ordered_json& drafts) {
  std::string out;
  for (const auto& [source, s] : drafts.items()) {
    if (s["drafted"] == 0) continue;
    out += fmt::format(", {:.0f}% of {} {} drafts accepted, {:.2f} tokens a step with them",
                       100 * s["acceptance"].get<double>(), s["drafted"].get<std::int64_t>(), source,
                       s["tokens_per_step"].get<double>());
  }
  return out;
}

}  // namespace

nlohmann::ordered_json generation_report(const Engine& engine, double load_seconds, double seconds) {
  const EngineStats s = engine.stats();
  return {{"load_seconds", load_seconds},
          {"seconds", seconds},
          {"prompt_tokens", s.prompt_tokens},
          {"cached_tokens", s.prefix_tokens_hit},
          {"generated_tokens", s.generated_tokens},
          {"ttft_ms", mean(s.ttft_seconds) * 1e3},
          {"tpot_ms", mean(s.tpot_seconds) * 1e3},
          {"tokens_per_second", rate(static_cast<double>(s.generated_tokens), seconds)},
          {"cache_hit_rate",
           rate(static_cast<double>(s.prefix_tokens_hit), static_cast<double>(s.prefix_tokens_looked_up))},
          {"steps", s.steps},
          {"preemptions", s.preemptions},
          {"drafts", {{"ngram", to_json(s.ngram_drafts)}, {"mtp", to_json(s.mtp_drafts)}}},
          {"pages_total", s.pages_total},
          {"bytes_per_page", s.bytes_per_page}};
}

std::string generation_summary(const nlohmann::ordered_json& report) {
  return fmt::format(
      "{} prompt tokens, {} generated in {:.2f} s: TTFT {:.1f} ms, TPOT {:.2f} ms, {:.1f} tokens/s, "
      "cache hit rate {:.0f}%{} (model loaded in {:.2f} s)",
      report["prompt_tokens"].get<std::int64_t>(), report["generated_tokens"].get<std::int64_t>(),
      report["seconds"].get<double>(), report["ttft_ms"].get<double>(), report["tpot_ms"].get<double>(),
      report["tokens_per_second"].get<double>(), 100 * report["cache_hit_rate"].get<double>(),
      draft_summary(report["drafts"]), report["load_seconds"].get<double>());
}

void print_text_of(const GenerationEvent& event) {
  if (event.text.empty()) return;
  fmt::print("{}", event.text);
  std::fflush(stdout);
}

}  // namespace flash_mla::bench
