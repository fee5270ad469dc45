#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "server/server.h"

// The figures are counted where they arise, in the engine and the server, under their locks; what is served
// is one consistent snapshot of them. So prometheus-cpp's data model and serializer are used, not its
// registry.

namespace flash_mla::server {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

constexpr int kTokensPerPage = 64;

double share(double part, double whole) { return whole == 0 ? 0 : part / whole; }

class Families {
 public:
  template <typename Value>
  void counter(const char* name, const char* help, Value value) {
    begin(name, help, MetricType::Counter);
    sample().counter.value = static_cast<double>(value);
  }
  template <typename Value>
  void gauge(const char* name, const char* help, Value value) {
    begin(name, help, MetricType::Gauge);
    sample().gauge.value = static_cast<double>(value);
  }
  /// One counter for each value of a label.
  template <class T>
  void counters(const char* name, const char* help, const char* label,
                const std::vector<std::pair<std::string, T>>& values) {
    begin(name, help, MetricType::Counter);
    for (const auto& [key, value] : values) {
      ClientMetric& metric = sample();
      metric.label = {{label, key}};
      metric.counter.value = static_cast<double>(value);
    }
  }
  /// One gauge for each value of a label.
  void gauges(const char* name, const char* help, const char* label,
              const std::vector<std::pair<std::string, double>>& values) {
    begin(name, help, MetricType::Gauge);
    for (const auto& [key, value] : values) {
      ClientMetric& metric = sample();
      metric.label = {{label, key}};
      metric.gauge.value = value;
    }
  }
  template <typename Value>
  void labelled(const char* name, const char* help,
                const std::vector<std::pair<std::string, std::string>>& labels, Value value) {
    begin(name, help, MetricType::Gauge);
    ClientMetric& metric = sample();
    for (const auto& [key, text] : labels) metric.label.push_back({key, text});
    metric.gauge.value = static_cast<double>(value);
  }
  /// Text, as labels of a gauge that is 1.
  void info(const char* name, const char* help,
            const std::vector<std::pair<std::string, std::string>>& labels) {
    labelled(name, help, labels, 1);
  }
  void histogram(const char* name, const char* help, const Histogram& h) {
    begin(name, help, MetricType::Histogram);
    ClientMetric::Histogram& out = sample().histogram;
    std::uint64_t cumulative = 0;
    for (std::size_t i = 0; i < h.counts.size(); ++i) {
      cumulative += static_cast<std::uint64_t>(h.counts[i]);
      out.bucket.push_back(
          {cumulative, i < h.bounds.size() ? h.bounds[i] : std::numeric_limits<double>::infinity()});
    }
    out.sample_count = static_cast<std::uint64_t>(h.total);
    out.sample_sum = h.sum;
  }
  /// One counter for each value of a label.
  template <typename Count>
  void by_tier(const char* name, const char* help, const std::vector<KvTierStats>& tiers,
               Count KvTierStats::*value) {
    begin(name, help, MetricType::Counter);
    for (const KvTierStats& tier : tiers) {
      ClientMetric& metric = sample();
      metric.label = {{"tier", tier.name}};
      metric.counter.value = static_cast<double>(tier.*value);
    }
  }
  std::string text() const { return prometheus::TextSerializer().Serialize(families_); }

 private:
  void begin(const char* name, const char* help, MetricType type) {
    families_.push_back({name, help, type, {}});
  }
  ClientMetric& sample() { return families_.back().metric.emplace_back(); }

  std::vector<MetricFamily> families_;
};

// Of a model that several ranks share.
void add_ranks(Families& f, const std::vector<RankStats>& ranks) {
  if (ranks.empty()) return;
  std::vector<std::pair<std::string, double>> step, wait, bytes, exchanges;
  for (const RankStats& rank : ranks) {
    const std::string name = std::to_string(step.size());
    step.emplace_back(name, rank.seconds);
    wait.emplace_back(name, rank.exchange_seconds);
    bytes.emplace_back(name, static_cast<double>(rank.bytes_sent));
    exchanges.emplace_back(name, static_cast<double>(rank.exchanges));
  }
  f.counters("mla_rank_step_seconds_total", "Time that each rank spent in steps.", "rank", step);
  f.counters("mla_rank_exchange_seconds_total",
             "Time of it in exchanges with other ranks, the wait for them included.", "rank", wait);
  f.counters("mla_rank_exchanges_total", "Exchanges of each rank with the others.", "rank", exchanges);
  f.counters("mla_rank_sent_bytes_total", "Bytes that each rank gave to others.", "rank", bytes);
  if (ranks[0].pages_total == 0) return;
  // Ranks with requests of their own, or the first of each group of them.
  const auto by_rank = [&](auto RankStats::*value) {
    std::vector<std::pair<std::string, double>> out;
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      if (ranks[i].pages_total > 0) out.emplace_back(std::to_string(i), static_cast<double>(ranks[i].*value));
    }
    return out;
  };
  f.gauges("mla_rank_sequences_running", "Sequences in each rank's batch.", "rank",
           by_rank(&RankStats::running));
  f.gauges("mla_rank_sequences_waiting", "Sequences in each rank's queue.", "rank",
           by_rank(&RankStats::waiting));
  f.gauges("mla_rank_cache_pages", "Pages in each rank's cache.", "rank", by_rank(&RankStats::pages_total));
  f.gauges("mla_rank_cache_pages_used", "Pages of each rank's running sequences.", "rank",
           by_rank(&RankStats::pages_used));
  f.counters("mla_rank_computed_tokens_total", "Tokens of each rank's sequences that went through the model.",
             "rank", by_rank(&RankStats::computed_tokens));
  f.counters("mla_rank_prefix_tokens_hit_total", "Prompt tokens found in each rank's prefix cache.", "rank",
             by_rank(&RankStats::prefix_tokens_hit));
  f.counters("mla_rank_preemptions_total", "Sequences that lost their pages on each rank.", "rank",
             by_rank(&RankStats::preemptions));
}

// Of a mixture whose choices are counted. GET /experts has every expert's.
void add_experts(Families& f, const std::vector<ExpertCounts>& layers) {
  if (layers.empty()) return;
  std::vector<std::pair<std::string, std::int64_t>> choices, ranks;
  std::vector<std::pair<std::string, double>> hottest;
  for (const ExpertCounts& layer : layers) {
    const std::string name = std::to_string(layer.layer);
    choices.emplace_back(name, layer.total());
    hottest.emplace_back(name, layer.hottest_share());
    for (std::size_t r = 0; r < layer.rank_counts.size(); ++r) {
      if (r == ranks.size()) ranks.emplace_back(std::to_string(r), 0);
      ranks[r].second += layer.rank_counts[r];
    }
  }
  const ExpertBalance balance = balance_of(layers);
  f.counters("mla_expert_choices_total", "Choices of experts by the layer's router, of all tokens.", "layer",
             choices);
  f.counters("mla_rank_expert_choices_total", "Choices of experts that each rank has run, over all layers.",
             "rank", ranks);
  f.gauges("mla_expert_hottest_share", "The layer's choices that went to its most chosen expert, 0 to 1.",
           "layer", hottest);
  f.gauges(
      "mla_expert_balancedness",
      "Choices of the mean over those of the most loaded, each added up over the layers: of experts, and of ranks.",
      "of", {{"experts", balance.experts}, {"ranks", balance.ranks}});
}

/// What gateways that know vLLM read (llm-d's scheduler, its autoscaler): the same figures under vLLM's names.
void add_vllm_names(Families& f, const EngineStats& s, const std::string& model) {
  const std::vector<std::pair<std::string, std::string>> labels = {{"model_name", model}};
  f.labelled("vllm:num_requests_running", "Sequences in the batch.", labels, s.running);
  f.labelled("vllm:num_requests_waiting", "Sequences in the queue.", labels, s.waiting);
  f.labelled("vllm:kv_cache_usage_perc", "Cache pages of running sequences over all, 0 to 1.", labels,
             share(s.pages_used, s.pages_total));
  f.info("vllm:cache_config_info", "Tokens of a page, and pages of the cache.",
         {{"block_size", std::to_string(kTokensPerPage)}, {"num_gpu_blocks", std::to_string(s.pages_total)}});
}

void add_tiers(Families& f, std::vector<KvTierStats> tiers) {
  if (tiers.empty()) return;
  // Two of a kind are told apart by their place.
  std::map<std::string, int> seen;
  for (KvTierStats& tier : tiers) {
    if (const int before = seen[tier.name]++; before > 0) tier.name += std::to_string(before + 1);
  }
  using T = KvTierStats;
  f.by_tier("mla_kv_tier_tokens_looked_up_total", "Prompt tokens asked for, in whole chunks of 256.", tiers,
            &T::tokens_looked_up);
  f.by_tier("mla_kv_tier_tokens_found_total", "Of which the tier had.", tiers, &T::tokens_found);
  f.by_tier("mla_kv_tier_tokens_loaded_total", "Tokens read from the tier.", tiers, &T::tokens_loaded);
  f.by_tier("mla_kv_tier_tokens_stored_total", "Tokens that the tier took, or knew already.", tiers,
            &T::tokens_stored);
  f.by_tier("mla_kv_tier_tokens_dropped_total", "Tokens not offered, since too much was on its way.", tiers,
            &T::tokens_dropped);
  f.by_tier("mla_kv_tier_loaded_bytes_total", "Bytes read from the tier.", tiers, &T::bytes_loaded);
  f.by_tier("mla_kv_tier_stored_bytes_total", "Bytes that the tier took.", tiers, &T::bytes_stored);
  f.by_tier("mla_kv_tier_look_up_seconds_total", "Time in look-ups.", tiers, &T::look_up_seconds);
  f.by_tier("mla_kv_tier_load_seconds_total", "Time in reads.", tiers, &T::load_seconds);
  f.by_tier("mla_kv_tier_store_seconds_total", "Time in stores.", tiers, &T::store_seconds);
  f.by_tier("mla_kv_tier_failures_total", "Calls that failed, and chunks that were gone, torn or changed.",
            tiers, &T::failures);
}

void add_transfer(Families& f, const TransferStats& t) {
  if (t.role == TransferRole::kNone) return;
  f.info("mla_transfer_info", "What this side of prefill and decode does, and why a room last failed.",
         {{"role", transfer_role_name(t.role)}, {"last_trouble", t.last_trouble}});
  f.counter("mla_transfer_rooms_total", "Requests with a bootstrap room.", t.rooms);
  f.counter("mla_transfer_handed_over_total", "Of which all pages were sent, or came and were loaded.",
            t.handed_over);
  f.counter("mla_transfer_bytes_total", "Bytes of pages sent or received.", t.bytes);
  f.counter("mla_transfer_seconds_total",
            "Prefill: time in writes. Decode: time from asking to the pages' arrival, over all rooms.",
            t.seconds);
  f.counter("mla_transfer_overlapped_seconds_total",
            "Prefill: time in writes while their prompt was still being computed.", t.overlapped_seconds);
  f.gauge("mla_transfer_rooms_open", "Rooms whose pages are awaited.", t.open);
  f.counters("mla_transfer_fallbacks_total",
             "Decode: prompts computed here, by why. Prefill: requests refused, and rooms that were left.",
             "reason", t.fallbacks);
}

}  // namespace

std::string prometheus_text(const EngineStats& s, const HttpStats& http) {
  Families f;
  std::vector<std::pair<std::string, std::int64_t>> responses;
  for (const auto& [status, count] : http.responses) responses.emplace_back(std::to_string(status), count);
  f.info("mla_build_info", "The program's version, and the model's name in the API.",
         {{"version", http.version}, {"model", http.model}});
  f.gauge("mla_uptime_seconds", "Since the engine was made.", s.seconds);
  f.counters("mla_http_responses_total",
             "HTTP responses by status; 499: the client left before its answer ended.", "code", responses);
  f.gauge("mla_http_connections", "Open connections.", http.connections);
  f.counter("mla_requests_submitted_total", "Requests that entered the queue.", s.requests_submitted);
  f.counters<std::int64_t>("mla_continuations_finished_total", "Continuations by how they ended.", "reason",
                           {{"stop", s.finished_stop},
                            {"length", s.finished_length},
                            {"cancelled", s.cancelled},
                            {"error", s.failed}});
  f.gauge("mla_sequences_running", "Sequences in the batch.", s.running);
  f.gauge("mla_sequences_waiting", "Sequences in the queue.", s.waiting);
  f.counter("mla_prompt_tokens_total", "Tokens of prompts.", s.prompt_tokens);
  f.counter("mla_generated_tokens_total", "Tokens of continuations.", s.generated_tokens);
  f.counter("mla_computed_tokens_total", "Tokens that went through the model.", s.computed_tokens);
  f.counter("mla_prefix_tokens_looked_up_total", "Prompt tokens looked up in the prefix cache.",
            s.prefix_tokens_looked_up);
  f.counter("mla_prefix_tokens_hit_total", "Prompt tokens found in the prefix cache.", s.prefix_tokens_hit);
  f.counter("mla_preemptions_total", "Sequences that lost their pages to earlier ones.", s.preemptions);
  f.counter("mla_pages_evicted_total", "Cached pages that were taken for new tokens.", s.pages_evicted);
  const auto drafts = [&](const char* name, const char* help, std::int64_t DraftStats::*value) {
    f.counters<std::int64_t>(name, help, "source",
                             {{"ngram", s.ngram_drafts.*value}, {"mtp", s.mtp_drafts.*value}});
  };
  drafts("mla_drafted_tokens_total", "Drafts that went through the model, by where they came from.",
         &DraftStats::drafted);
  drafts("mla_accepted_tokens_total", "Drafts that were the tokens the model chose.", &DraftStats::accepted);
  drafts("mla_draft_steps_total", "Steps of a sequence with drafts.", &DraftStats::steps);
  drafts("mla_draft_step_tokens_total", "Tokens that steps with drafts gave.", &DraftStats::tokens);
  f.counter("mla_steps_total", "Steps of the engine.", s.steps);
  f.counter("mla_step_seconds_total", "Time spent in steps.", s.step_seconds);
  add_ranks(f, s.ranks);
  add_experts(f, s.experts);
  f.gauge("mla_cache_pages", "Pages of 64 tokens in the cache.", s.pages_total);
  f.gauge("mla_cache_pages_used", "Pages of running sequences.", s.pages_used);
  f.gauge("mla_cache_pages_cached", "Pages kept for prefix reuse only.", s.pages_cached);
  f.gauge("mla_mem_utilization", "Cache bytes of running sequences over all cache bytes.",
          share(s.pages_used, s.pages_total));
  f.gauge(
      "warps_active_ratio",
      "Balance of the decode schedule of the last step that decoded: blocks of all parts over the number of "
      "parts times those of the busiest. From the plan; not a hardware counter.",
      s.schedule_utilisation);
  f.gauge("cache_hit_rate", "Prompt tokens found in the prefix cache over those looked up.",
          share(static_cast<double>(s.prefix_tokens_hit), static_cast<double>(s.prefix_tokens_looked_up)));
  add_tiers(f, s.kv_tiers);
  add_transfer(f, s.transfer);
  f.histogram("mla_ttft_seconds", "Submission to first token.", s.ttft_seconds);
  f.histogram("mla_tpot_seconds", "Time per token after the first, per continuation.", s.tpot_seconds);
  f.histogram("mla_e2e_seconds", "Submission to the end of a continuation.", s.e2e_seconds);
  add_vllm_names(f, s, http.model);
  return f.text();
}

}  // namespace flash_mla::server
