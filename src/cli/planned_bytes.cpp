#include "cli/planned_bytes.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <nlohmann/json.hpp>

#include "base/page_size.h"
#include "flash_mla/planner.h"

namespace flash_mla::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Bytes {
  double weights = 0, cache = 0;
};

/// The largest rank's; caches are all alike.
Bytes of_engine(const EngineStats& stats) {
  Bytes out{stats.weight_bytes, static_cast<double>(stats.bytes_per_page) * stats.pages_total};
  if (stats.ranks.empty()) return out;
  out.weights = std::ranges::max_element(stats.ranks, {}, &RankStats::weight_bytes)->weight_bytes;
  out.cache /= static_cast<double>(stats.ranks.size());
  return out;
}

/// Of a card, with `pages` pages of a cache whose rows are of 16 bits or FP8.
Bytes of_planner(const std::filesystem::path& config, const EngineOptions& o, int pages) {
  using Quantize = EngineOptions::Quantize;
  const int ranks = o.tp * o.dp;
  const bool drafts = o.speculative == EngineOptions::Speculative::kMtp;
  const bool fp8 = o.quantize == Quantize::kFp8;
  const Json request = {{"model", config.string()},
                        {"hardware", "h200"},  // bytes are the same on any
                        {"plan", {{"tp", o.tp}, {"dp", o.dp}, {"ep", o.ep > 0 ? o.ep : ranks}}},
                        {"precision",
                         {{"dense", fp8 ? "fp8" : "bf16"},
                          {"moe", fp8                             ? "fp8"
                                  : o.quantize == Quantize::kW4A8 ? "w4a8"
                                                                  : "bf16"},
                          {"scale_group", o.quantize == Quantize::kW4A8 ? 64 : 0},
                          {"kv", o.kv_cache == EngineOptions::KvCache::kFp8 ? "fp8_656" : "bf16"}}},
                        {"workload",
                         {{"batch", pages},
                          {"input", kPageSize - 1},
                          {"output", 1},
                          {"mtp_draft", drafts ? o.draft_tokens : 0}}}};
  const Json result = Json::parse(planner::run_json(request.dump()));
  const Json& resident = result["decode"]["resident_bytes"];
  Bytes out;
  for (const char* part : {"dense_weights", "shared_experts", "routed_experts", "mtp_weights"})
    out.weights += resident.value(part, 0.0);
  out.cache = resident.value("kv_cache", 0.0);
  return out;
}

}  // namespace

std::string planned_bytes(const std::filesystem::path& model_directory, const EngineOptions& options,
                          const EngineStats& stats) {
  constexpr double kMb = 1e6;
  const Bytes engine = of_engine(stats);
  const int ranks = options.tp * options.dp;
  std::string line =
      fmt::format("{:.1f} MB of weights and {:.1f} MB of cache{}", engine.weights / kMb, engine.cache / kMb,
                  ranks > 1 ? fmt::format(" on each of {} ranks", ranks) : "");
  const int pages = stats.pages_total / std::max(options.dp, 1);
  try {
    const Bytes planned = of_planner(model_directory / "config.json", options, pages);
    line += fmt::format("; planner, 16 bits where nothing is quantised: {:.1f} and {:.1f}",
                        planned.weights / kMb, planned.cache / kMb);
  } catch (const std::exception&) {
    // A model that the planner does not know, or limits that are not the engine's: its figures are no matter here.
  }
  return line;
}

}  // namespace flash_mla::cli
