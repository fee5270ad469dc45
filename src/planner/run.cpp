#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "planner/calibrate.h"
#include "planner/deployment.h"
#include "planner/read.h"
#include "planner/start_command.h"
#include "planner/tables.h"

namespace flash_mla::planner {
namespace {

constexpr std::size_t kMaxPoints = 200000;

Json kinds_json(const Kinds& kinds, double total) {
  Json out = Json::object();
  for (const auto& [name, value] : kinds) out[name] = value;
  out["total"] = total;
  return out;
}

Json plan_json(const Plan& p) {
  return {{"tp", p.tp}, {"ep", p.ep}, {"dp", p.dp}, {"pp", p.pp}, {"cp", p.cp}};
}

Json phase_json(const Phase& p) {
  Json operators = Json::array();
  for (const Operator& o : p.operators) {
    operators.push_back({{"name", o.name},
                         {"flop", o.flop},
                         {"bytes", o.bytes},
                         {"sent", o.sent},
                         {"flop_per_byte", o.bytes > 0 ? o.flop / o.bytes : 0},
                         {"compute_s", o.compute_s},
                         {"memory_s", o.memory_s},
                         {"communication_s", o.communication_s},
                         {"peak_flop_s", o.peak}});
  }
  return {{"plan", plan_json(p.plan)},
          {"cards", p.cards},
          {"flop", kinds_json(p.flop, p.flop_total)},
          {"resident_bytes", kinds_json(p.resident, p.resident_total)},
          {"bytes_moved", kinds_json(p.moved, p.moved_total)},
          {"bytes_sent", kinds_json(p.sent, p.sent_total)},
          {"time_s",
           {{"compute", p.compute_s},
            {"memory", p.memory_s},
            {"communication", p.communication_s},
            {"serial", p.serial_s},
            {"memory_overlapped", p.overlap_s},
            {"operators_overlapped", p.operators_s},
            {"fully_overlapped", p.full_s},
            {"step", p.step_s}}},
          {"mfu", p.mfu},
          {"memory_share", p.memory_share},
          {"memory_over_compute", p.memory_ratio},
          {"communication_over_compute", p.communication_ratio},
          {"bottleneck", p.bottleneck},
          {"flags", p.flags},
          {"operators", operators}};
}

const char* mode_name(Mode mode) { return mode == Mode::kArticle ? "article" : "exact"; }

Json summary_json(const Request& q, const Result& r) {
  Json out = {{"ttft_s", r.ttft_s},
              {"tpot_s", r.tpot_s},
              {"prefill_tokens_per_s_card", r.prefill_tokens_per_s_card},
              {"decode_tokens_per_s_card", r.decode_tokens_per_s_card},
              {"output_tokens_per_s_card", r.tokens_per_s_card},
              {"max_sequences", r.max_sequences},
              {"chunk_knee_tokens", r.chunk_knee},
              {"prefill_cards_per_decode_card", r.pd_ratio}};
  if (q.model.index_num_heads > 0) {
    out["sparse_crossover_tokens"] = {{"decode_flop", r.crossover_decode_flop},
                                      {"decode_bytes", r.crossover_decode_bytes},
                                      {"prefill_flop", r.crossover_prefill_flop}};
  }
  if (q.workload.arrival_rate > 0) {
    out["prefill_cards"] = r.prefill_cards;
    out["decode_cards"] = r.decode_cards;
    out["prefill_wait_s"] = r.prefill_wait_s;
  }
  if (r.card_hour > 0) {
    out["card_hour"] = r.card_hour;
    out["cost_per_million_input"] = r.cost_per_million_input;
    out["cost_per_million_output"] = r.cost_per_million_output;
    out["cost_per_million_output_all_in"] = r.cost_per_million_total;
    if (q.workload.arrival_rate > 0) {
      out["tco_per_hour"] = r.tco_hour;
      out["tco_per_year"] = r.tco_hour * 24 * 365;
    }
  }
  return out;
}

/// Names a sweep, a comparison or the program may set, and where they live in a request.
Json& slot_for(Json& request, const std::string& key, const std::string& source) {
  struct Group {
    const char* name;
    std::vector<std::string> keys;
  };
  static const std::array<Group, 5> kGroups = {
      {{"plan", {"tp", "ep", "dp", "pp", "cp"}},
       {"workload",
        {"input", "output", "batch", "prefill_batch", "chunk", "prefix_hit", "arrival_rate", "mtp_draft",
         "mtp_acceptance", "placement"}},
       {"precision", {"attention", "dense", "moe", "kv", "activation", "scale_group"}},
       {"slo", {"ttft_ms", "tpot_ms"}},
       {"prices", {"card_hour", "card_price", "years", "power_w", "pue", "electricity_kwh", "other_hour"}}}};
  static const std::vector<std::string> kTop = {"model", "hardware", "mode", "overlap", "mhc_fused"};
  if (std::find(kTop.begin(), kTop.end(), key) != kTop.end()) return request[key];
  std::vector<std::string> all = kTop;
  for (const Group& g : kGroups) {
    if (std::find(g.keys.begin(), g.keys.end(), key) != g.keys.end()) {
      if (!request.contains(g.name)) request[g.name] = Json::object();
      return request[g.name][key];
    }
    all.insert(all.end(), g.keys.begin(), g.keys.end());
  }
  throw InvalidArgument(
      fmt::format("{}: unknown key {}: expected one of {}", source, key, fmt::join(all, ", ")));
}

/// Moves the flat keys of "set" to where they belong.
void apply_set(Json& request, const std::string& source) {
  const auto found = request.find("set");
  if (found == request.end()) return;
  const Json set = *found;
  request.erase("set");
  if (!set.is_object())
    throw InvalidArgument(fmt::format("{}: set = {}: expected an object", source, set.dump()));
  for (const auto& [key, value] : set.items()) slot_for(request, key, source) = value;
}

/// Reads a model and a profile once each, however many points a sweep has.
struct Lookup {
  std::vector<std::pair<std::string, Model>> models;
  std::vector<std::pair<std::string, Hardware>> profiles;

  Request read(Json request, const std::string& source) {
    const Json model = request.contains("model") ? request["model"] : Json("deepseek-v3");
    const Json hardware = request.contains("hardware") ? request["hardware"] : Json("h20");
    const Model& m = get(models, model, [](const Json& v) { return find_model(v, "model"); });
    const Hardware& h = get(profiles, hardware, [](const Json& v) { return find_hardware(v, "hardware"); });
    return read_request(request, source, &m, &h);
  }

 private:
  template <class T, class F>
  static const T& get(std::vector<std::pair<std::string, T>>& known, const Json& value, F find) {
    const std::string key = value.dump();
    for (const auto& [name, item] : known) {
      if (name == key) return item;
    }
    return known.emplace_back(key, find(value)).second;
  }
};

Json row_json(const Request& q, const Result& r) {
  Json row = {{"fits", r.fits},
              {"meets_slo", r.meets_slo},
              {"cards", r.decode.cards},
              {"users", q.workload.batch * r.decode.plan.dp},
              {"ttft_ms", r.ttft_s * 1e3},
              {"tpot_ms", r.tpot_s * 1e3},
              {"output_tokens_per_s_card", r.tokens_per_s_card},
              {"prefill_tokens_per_s_card", r.prefill_tokens_per_s_card},
              {"decode_tokens_per_s_card", r.decode_tokens_per_s_card},
              {"memory_share", r.decode.memory_share},
              {"max_sequences", r.max_sequences},
              {"mfu", r.decode.mfu},
              {"compute_ms", r.decode.compute_s * 1e3},
              {"memory_ms", r.decode.memory_s * 1e3},
              {"communication_ms", r.decode.communication_s * 1e3},
              {"prefill_compute_ms", r.prefill.compute_s * 1e3},
              {"prefill_memory_ms", r.prefill.memory_s * 1e3},
              {"prefill_communication_ms", r.prefill.communication_s * 1e3},
              {"prefill_bottleneck", r.prefill.bottleneck},
              {"bottleneck", r.decode.bottleneck},
              {"prefill_cards_per_decode_card", r.pd_ratio}};
  if (r.card_hour > 0) row["cost_per_million_output_all_in"] = r.cost_per_million_total;
  if (!r.fits) row["problem"] = r.problem;
  return row;
}

/// Index of the best row that fits and meets the service levels: cheapest when every such row has a price,
/// else most output tokens per second and card; -1 if there is none.
int best_row(const Json& rows) {
  constexpr const char* kCost = "cost_per_million_output_all_in";
  bool priced = true;
  for (const Json& row : rows) {
    if (row.value("meets_slo", false) && !row.contains(kCost)) priced = false;
  }
  int best = -1;
  double best_value = 0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (!rows[i].value("meets_slo", false)) continue;
    const double value =
        priced ? -rows[i][kCost].get<double>() : rows[i]["output_tokens_per_s_card"].get<double>();
    if (best < 0 || value > best_value) best = static_cast<int>(i), best_value = value;
  }
  return best;
}

/// Changes of one setting, evaluated, the most useful first.
Json advice(const Request& q, const Result& now) {
  struct Change {
    std::string text;
    Request request;
  };
  std::vector<Change> changes;
  auto both = [&](const std::string& text, auto edit) {
    Change c{text, q};
    edit(c.request);
    changes.push_back(std::move(c));
  };
  for (const auto& [factor, word] : {std::pair{2.0, "double"}, std::pair{0.5, "halve"}}) {
    auto scaled = [f = factor](std::int64_t v) {
      return std::max<std::int64_t>(1, static_cast<std::int64_t>(static_cast<double>(v) * f));
    };
    both(fmt::format("{} ep to {}", word, scaled(now.decode.plan.ep)), [&](Request& r) {
      for (Plan* p : {&r.prefill_plan, &r.decode_plan}) p->ep = scaled(p->ep), p->dp = 0;
    });
    both(fmt::format("{} tp to {}", word, scaled(now.decode.plan.tp)), [&](Request& r) {
      for (Plan* p : {&r.prefill_plan, &r.decode_plan}) p->tp = scaled(p->tp), p->dp = 0;
    });
    both(fmt::format("{} batch to {}", word, scaled(q.workload.batch)),
         [&](Request& r) { r.workload.batch = scaled(r.workload.batch); });
    both(fmt::format("{} prefill_batch to {}", word, scaled(q.workload.prefill_batch)),
         [&](Request& r) { r.workload.prefill_batch = scaled(r.workload.prefill_batch); });
  }
  if (!now.fits) {
    // One doubling may not be enough: the smallest EP degree that fits, if any does.
    for (std::int64_t ep = 4 * now.decode.plan.ep; ep <= q.model.num_routed_experts; ep *= 2) {
      Request r = q;
      for (Plan* p : {&r.prefill_plan, &r.decode_plan}) p->ep = ep, p->dp = 0;
      if (q.model.num_routed_experts % ep != 0 || !evaluate(r).fits) continue;
      both(fmt::format("raise ep to {}, the least that fits", ep), [&](Request& target) { target = r; });
      break;
    }
  }
  if (now.max_sequences >= 1) {
    const auto most = static_cast<std::int64_t>(now.max_sequences);
    both(fmt::format("set batch to {}, the most that fit", most),
         [&](Request& r) { r.workload.batch = most; });
  }
  if (q.precision.moe != "w4a8")
    both("store the experts as w4a8", [](Request& r) { r.precision.moe = "w4a8"; });
  if (q.precision.kv == "bf16")
    both("store the cache as fp8_656", [](Request& r) { r.precision.kv = "fp8_656"; });
  Json out = Json::array();
  for (const Change& c : changes) {
    try {
      const Result r = evaluate(c.request);
      if (!r.fits || (now.meets_slo && !r.meets_slo)) continue;
      const bool repairs = !now.fits || (!now.meets_slo && r.meets_slo);
      const double gain = r.tokens_per_s_card / now.tokens_per_s_card - 1;
      if (!repairs && gain < 0.01) continue;
      out.push_back({{"change", c.text},
                     {"output_tokens_per_s_card", r.tokens_per_s_card},
                     {"gain", now.fits ? Json(gain) : Json(nullptr)},
                     {"ttft_s", r.ttft_s},
                     {"tpot_s", r.tpot_s},
                     {"meets_slo", r.meets_slo}});
    } catch (const InvalidArgument&) {
      // A change that this model or mode does not allow is not advice.
    }
  }
  std::sort(out.begin(), out.end(), [](const Json& a, const Json& b) {
    return a["output_tokens_per_s_card"].get<double>() > b["output_tokens_per_s_card"].get<double>();
  });
  while (out.size() > 4) out.erase(out.size() - 1);
  return out;
}

/// How the engine is started so. The plans are those that were evaluated, in which nothing is left open.
Json start_json(Request q, const Result& r) {
  q.prefill_plan = r.prefill.plan;
  q.decode_plan = r.decode.plan;
  const StartCommand start = start_command(q);
  return {{"command", start.command}, {"caveats", start.caveats}};
}

Json run_plan(Json request, const std::string& source) {
  apply_set(request, source);
  const Request q = read_request(request, source, nullptr, nullptr);
  const bool with_steps = request.value("explain", false);
  const Result r = evaluate(q, with_steps);
  Json out = {{"command", "plan"},
              {"mode", mode_name(q.mode)},
              {"model", q.model.name},
              {"hardware",
               {{"name", q.hardware.name},
                {"peak_bf16_flop_s", q.hardware.peak_bf16},
                {"peak_fp8_flop_s", q.hardware.peak_fp8},
                {"memory_bytes", q.hardware.memory_bytes},
                {"memory_bandwidth_bytes_s", q.hardware.memory_bandwidth}}},
              {"precision",
               {{"attention", q.precision.attention},
                {"dense", q.precision.dense},
                {"moe", q.precision.moe},
                {"kv", q.precision.kv},
                {"activation", q.precision.activation}}},
              {"workload",
               {{"input", q.workload.input},
                {"output", q.workload.output},
                {"batch", q.workload.batch},
                {"prefill_batch", q.workload.prefill_batch},
                {"prefix_hit", q.workload.prefix_hit}}},
              {"overlap", q.overlap},
              {"fits", r.fits},
              {"problem", r.problem},
              {"meets_slo", r.meets_slo},
              {"summary", summary_json(q, r)},
              {"prefill", phase_json(r.prefill)},
              {"decode", phase_json(r.decode)},
              {"advice", advice(q, r)},
              {"start", start_json(q, r)},
              {"notes", r.notes}};
  if (with_steps) {
    Json steps = Json::array();
    for (const Step& s : r.steps) {
      steps.push_back({{"phase", s.phase},
                       {"formula", s.article_number},
                       {"name", s.name},
                       {"equation", s.text},
                       {"substituted", s.substituted},
                       {"value", s.value},
                       {"unit", s.unit},
                       {"meaning", s.meaning}});
    }
    out["explain"] = steps;
  }
  return out;
}

Json finish_rows(Json out, Json rows) {
  bool any = false;
  for (const Json& row : rows) any = any || !row.contains("error");
  if (!any) throw InvalidArgument(rows[0]["error"].get<std::string>());
  const int best = best_row(rows);
  out["best"] = best >= 0 ? Json(best) : Json(nullptr);
  out["rows"] = std::move(rows);
  return out;
}

Json run_sweep(const Json& request) {
  ObjectReader r(request, "request");
  r.text("command", "sweep");
  static const Json kEmpty = Json::object();
  Json base = r.has("base") ? *r.find("base") : kEmpty;
  if (!base.is_object()) r.fail("base", base.dump(), "an object: a plan request");
  apply_set(base, "request: base");
  if (!r.has("axes") || !r.find("axes")->is_object() || r.find("axes")->empty()) {
    r.fail("axes", r.has("axes") ? r.find("axes")->dump() : "(missing)", "an object of key: array of values");
  }
  const Json axes = *r.find("axes");
  r.finish();
  std::vector<std::pair<std::string, Json>> dims;
  std::size_t points = 1;
  for (const auto& [key, values] : axes.items()) {
    if (!values.is_array() || values.empty()) r.fail("axes." + key, values.dump(), "an array of values");
    Json probe = Json::object();
    slot_for(probe, key, "request: axes");
    dims.emplace_back(key, values);
    points *= values.size();
    if (points > kMaxPoints) {
      r.fail("axes", fmt::format("more than {} plans", kMaxPoints),
             fmt::format("at most {} plans", kMaxPoints));
    }
  }
  Lookup lookup;
  Json rows = Json::array();
  rows.get_ref<Json::array_t&>().reserve(points);
  Slo slo;
  for (std::size_t i = 0; i < points; ++i) {
    Json one = base;
    Json row = Json::object();
    std::size_t rest = i;
    for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {  // the last axis varies fastest
      slot_for(one, dim->first, "request: axes") = dim->second[rest % dim->second.size()];
      rest /= dim->second.size();
    }
    for (const auto& dim : dims) row[dim.first] = slot_for(one, dim.first, "request: axes");
    try {
      const Request q = lookup.read(std::move(one), "request");
      slo = q.slo;
      row.update(row_json(q, evaluate(q)));
    } catch (const InvalidArgument& e) {
      row["error"] = e.what();
    }
    rows.push_back(std::move(row));
  }
  std::vector<std::string> names;
  names.reserve(dims.size());
  for (const auto& dim : dims) names.push_back(dim.first);
  return finish_rows({{"command", "sweep"},
                      {"axes", names},
                      {"slo", {{"ttft_ms", slo.ttft_s * 1e3}, {"tpot_ms", slo.tpot_s * 1e3}}}},
                     std::move(rows));
}

Json run_compare(const Json& request) {
  ObjectReader r(request, "request");
  r.text("command", "compare");
  const Json* cases = r.has("cases") ? r.find("cases") : nullptr;
  if (cases == nullptr || !cases->is_array() || cases->empty()) {
    r.fail("cases", cases == nullptr ? "(missing)" : cases->dump(), "an array of plan requests");
  }
  r.finish();
  Lookup lookup;
  Json rows = Json::array();
  for (std::size_t i = 0; i < cases->size(); ++i) {
    const std::string source = fmt::format("cases[{}]", i);
    Json row = Json::object();
    Json one = (*cases)[i];
    if (!one.is_object()) r.fail(source, one.dump(), "an object");
    apply_set(one, source);
    row["name"] = one.contains("name") ? one["name"] : Json(fmt::format("case {}", i + 1));
    try {
      const Request q = lookup.read(one, source);
      row["hardware"] = q.hardware.name;
      const Result result = evaluate(q);
      row["plan"] =
          fmt::format("tp{} ep{} dp{}", result.decode.plan.tp, result.decode.plan.ep, result.decode.plan.dp);
      row["batch"] = q.workload.batch;
      row.update(row_json(q, result));
    } catch (const InvalidArgument& e) {
      row["error"] = e.what();
    }
    rows.push_back(std::move(row));
  }
  return finish_rows({{"command", "compare"}}, std::move(rows));
}

Json run_tables() {
  Json cells = Json::array();
  for (const TableCell& c : article_tables()) {
    cells.push_back({{"section", c.section},
                     {"cell", c.name},
                     {"printed", c.printed},
                     {"unit", c.unit},
                     {"article", c.article ? Json(*c.article) : Json(nullptr)},
                     {"verdict", c.verdict},
                     {"exact", c.exact ? Json(*c.exact) : Json(nullptr)},
                     {"article_equation", c.article_text},
                     {"article_substituted", c.article_substituted},
                     {"exact_equation", c.exact_text},
                     {"exact_substituted", c.exact_substituted},
                     {"note", c.note}});
  }
  return {{"command", "tables"}, {"cells", cells}};
}

Json run_list() {
  Json out = {{"command", "list"},
              {"models", Json::array()},
              {"hardware", Json::array()},
              {"measured", Json::array()}};
  for (const DataFile& file : data_files()) {
    const std::size_t slash = file.path.find('/');
    const std::string folder(file.path.substr(0, slash));
    out[folder].push_back(file.path.substr(slash + 1, file.path.size() - slash - 6));
  }
  return out;
}

}  // namespace

std::string run_json(std::string_view text) {
  const Json request = parse_json(text, "request");
  if (!request.is_object()) throw InvalidArgument("request: top level: expected a JSON object");
  ObjectReader r(request, "request");
  const std::string command =
      r.choice("command", "plan", {"plan", "sweep", "compare", "deployment", "calibrate", "tables", "list"});
  if (command == "deployment") {
    Json one = request;
    if (one.contains("base") && one["base"].is_object()) apply_set(one["base"], "request: base");
    return run_deployment(one).dump();
  }
  if (command == "sweep") return run_sweep(request).dump();
  if (command == "compare") return run_compare(request).dump();
  if (command == "calibrate") return run_calibrate(request).dump();
  if (command == "tables") return run_tables().dump();
  if (command == "list") return run_list().dump();
  return run_plan(request, "request").dump();
}

}  // namespace flash_mla::planner
