#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "planner/number.h"
#include "planner/read.h"

namespace flash_mla::planner {
namespace {

using Row = std::vector<std::string>;

/// Display width of UTF-8 text: code points, with CJK ones counted twice.
std::size_t width(const std::string& s) {
  std::size_t w = 0;
  for (std::size_t i = 0; i < s.size(); ++i) {
    const auto c = static_cast<unsigned char>(s[i]);
    if ((c & 0xC0) == 0x80) continue;
    w += c >= 0xE3 && c < 0xF0 ? 2 : 1;
  }
  return w;
}

/// Columns padded to their widest entry; the first is left-aligned, the others right-aligned.
std::string columns(const std::vector<Row>& rows, bool left = false) {
  std::vector<std::size_t> widths;
  for (const Row& row : rows) {
    widths.resize(std::max(widths.size(), row.size()), 0);
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], width(row[i]));
  }
  std::string out;
  for (const Row& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string pad(widths[i] - width(row[i]), ' ');
      line += i == 0 || left ? row[i] + pad : pad + row[i];
      if (i + 1 < row.size()) line += "  ";
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

std::string csv_field(const std::string& s) {
  if (s.find_first_of(",\"\n") == std::string::npos) return s;
  std::string out = "\"";
  for (char c : s) {
    if (c == '"') out += '"';
    out += c;
  }
  return out + "\"";
}

std::string csv(const std::vector<Row>& rows) {
  std::string out;
  for (const Row& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (i > 0) out += ',';
      out += csv_field(row[i]);
    }
    out += "\n";
  }
  return out;
}

std::string plain(const Json& v) {
  if (v.is_string()) return v.get<std::string>();
  if (v.is_null()) return "";
  if (v.is_number_float()) return shortest(v.get<double>());
  return v.dump();
}

/// A few significant digits, for people.
std::string shown(const Json& v) {
  if (v.is_boolean()) return v.get<bool>() ? "yes" : "no";
  if (!v.is_number_float()) return plain(v);
  const double x = v.get<double>();
  if (x == std::round(x) && std::abs(x) < 1e7) return fmt::format("{:.0f}", x);
  return significant(x, 4);
}

double value(const Json& v) { return v.get<double>(); }

void kinds_table(std::string& out, const char* title, const char* unit, double scale, const Json& prefill,
                 const Json& decode) {
  std::vector<Row> rows = {{fmt::format("{} ({})", title, unit), "prefill", "decode"}};
  std::vector<std::string> names;
  for (const Json* side : {&prefill, &decode}) {
    for (const auto& [name, v] : side->items()) {
      if (name != "total" && std::find(names.begin(), names.end(), name) == names.end())
        names.push_back(name);
    }
  }
  names.emplace_back("total");
  auto cell = [&](const Json& side, const std::string& name) {
    return side.contains(name) ? significant(value(side[name]) / scale, 4) : std::string("-");
  };
  for (const std::string& name : names)
    rows.push_back({fmt::format("  {}", name), cell(prefill, name), cell(decode, name)});
  out += columns(rows) + "\n";
}

/// A command, or that there is none, and what is to be said of it.
std::string start_lines(const Json& start, const std::string& before) {
  const std::string command = plain(start["command"]);
  std::string out = fmt::format("  {}{}\n", before, command.empty() ? "flash-mla serve cannot" : command);
  for (const Json& caveat : start["caveats"]) out += fmt::format("  ! {}\n", plain(caveat));
  return out;
}

std::string plan_table(const Json& r) {
  const Json& p = r["prefill"];
  const Json& d = r["decode"];
  auto plan_text = [](const Json& side) {
    const Json& x = side["plan"];
    return fmt::format("tp {} ep {} dp {} pp {} cp {} ({} cards)", x["tp"].get<int>(), x["ep"].get<int>(),
                       x["dp"].get<int>(), x["pp"].get<int>(), x["cp"].get<int>(), value(side["cards"]));
  };
  std::string out =
      fmt::format("{} on {}, mode {}\n", plain(r["model"]), plain(r["hardware"]["name"]), plain(r["mode"]));
  const Json& w = r["workload"];
  out += fmt::format("  {} tokens in, {} out, prefix hit {}; prefill: {}, batch {}; decode: {}, batch {}\n",
                     plain(w["input"]), plain(w["output"]), plain(w["prefix_hit"]), plan_text(p),
                     plain(w["prefill_batch"]), plan_text(d), plain(w["batch"]));
  const Json& f = r["precision"];
  out +=
      fmt::format("  attention {}, dense {}, experts {}, cache {}, activations {}\n\n", plain(f["attention"]),
                  plain(f["dense"]), plain(f["moe"]), plain(f["kv"]), plain(f["activation"]));
  out += "Per card and pass (a whole prefill pass, one decode step)\n\n";
  kinds_table(out, "arithmetic", "TFLOP", 1e12, p["flop"], d["flop"]);
  kinds_table(out, "resident", "GB", 1e9, p["resident_bytes"], d["resident_bytes"]);
  kinds_table(out, "moved", "GB", 1e9, p["bytes_moved"], d["bytes_moved"]);
  kinds_table(out, "sent", "GB", 1e9, p["bytes_sent"], d["bytes_sent"]);
  std::vector<Row> times = {{"time (ms)", "prefill", "decode"}};
  for (const auto& [name, v] : p["time_s"].items()) {
    times.push_back({fmt::format("  {}", name), significant(value(v) * 1e3, 4),
                     significant(value(d["time_s"][name]) * 1e3, 4)});
  }
  out += columns(times) + "\n";
  auto percent = [](const Json& v) { return fmt::format("{:.1f} %", 100 * value(v)); };
  out += columns(
      {{"resources", "prefill", "decode"},
       {"  MFU", percent(p["mfu"]), percent(d["mfu"])},
       {"  memory used", percent(p["memory_share"]), percent(d["memory_share"])},
       {"  memory time / compute time", shown(p["memory_over_compute"]), shown(d["memory_over_compute"])},
       {"  communication time / compute time", shown(p["communication_over_compute"]),
        shown(d["communication_over_compute"])},
       {"  bottleneck", plain(p["bottleneck"]), plain(d["bottleneck"])}});
  for (const auto& [name, side] : {std::pair{"prefill", &p}, std::pair{"decode", &d}}) {
    for (const Json& flag : (*side)["flags"]) out += fmt::format("  ! {}: {}\n", name, plain(flag));
  }
  out += "\n";
  std::vector<Row> summary;
  for (const auto& [name, v] : r["summary"].items()) {
    if (v.is_object()) {
      for (const auto& [inner, x] : v.items())
        summary.push_back({fmt::format("{}.{}", name, inner), shown(x)});
    } else {
      summary.push_back({name, shown(v)});
    }
  }
  out += columns(summary);
  if (!r["fits"].get<bool>()) out += fmt::format("\nPROBLEM: {}\n", plain(r["problem"]));
  if (r["fits"].get<bool>() && !r["meets_slo"].get<bool>()) out += "\nThe service levels are not met.\n";
  if (!r["advice"].empty()) {
    out += "\nWhat to change\n";
    for (const Json& a : r["advice"]) {
      out += fmt::format(
          "  {}: {} output tokens/s per card{}, TTFT {} s, TPOT {} ms\n", plain(a["change"]),
          significant(value(a["output_tokens_per_s_card"]), 4),
          a["gain"].is_null() ? std::string() : fmt::format(" ({:+.1f} %)", 100 * value(a["gain"])),
          significant(value(a["ttft_s"]), 4), significant(value(a["tpot_s"]) * 1e3, 4));
    }
  }
  out += "\nStart\n" + start_lines(r["start"], "");
  for (const Json& note : r["notes"]) out += fmt::format("note: {}\n", plain(note));
  if (r.contains("explain")) {
    std::string phase;
    for (const Json& s : r["explain"]) {
      if (plain(s["phase"]) != phase) {
        phase = plain(s["phase"]);
        out += fmt::format("\nEquations, {}\n", phase);
      }
      const int number = s["formula"].get<int>();
      out +=
          fmt::format("{} = {}\n    = {}\n    = {} {}   {}{}\n", plain(s["name"]), plain(s["equation"]),
                      plain(s["substituted"]), significant(value(s["value"]), 10), plain(s["unit"]),
                      plain(s["meaning"]), number > 0 ? fmt::format(" [formula {}]", number) : std::string());
    }
  }
  return out;
}

void flatten(std::vector<Row>& rows, const std::string& path, const Json& v) {
  if (v.is_object()) {
    for (const auto& [key, inner] : v.items())
      flatten(rows, path.empty() ? key : fmt::format("{}.{}", path, key), inner);
  } else if (v.is_array()) {
    for (std::size_t i = 0; i < v.size(); ++i) flatten(rows, fmt::format("{}[{}]", path, i), v[i]);
  } else {
    rows.push_back({path, plain(v)});
  }
}

std::vector<Row> matrix(const Json& rows, bool people, const std::vector<std::string>& keys_wanted) {
  std::vector<std::string> keys = keys_wanted;
  if (keys.empty()) {
    for (const Json& row : rows) {
      for (const auto& [key, v] : row.items()) {
        if (std::find(keys.begin(), keys.end(), key) == keys.end()) keys.push_back(key);
      }
    }
  }
  std::vector<Row> out = {Row(keys.begin(), keys.end())};
  for (const Json& row : rows) {
    Row cells;
    for (const std::string& key : keys) {
      cells.push_back(!row.contains(key) ? (people ? "-" : "") : people ? shown(row[key]) : plain(row[key]));
    }
    out.push_back(std::move(cells));
  }
  return out;
}

std::string rows_table(const Json& r) {
  std::vector<std::string> keys;
  if (r.contains("axes")) {
    for (const Json& axis : r["axes"]) keys.push_back(plain(axis));
  } else {
    keys = {"name", "hardware", "plan", "batch"};
  }
  for (const char* key : {"cards", "users", "ttft_ms", "tpot_ms", "output_tokens_per_s_card", "memory_share",
                          "max_sequences", "mfu", "prefill_bottleneck", "bottleneck"}) {
    keys.emplace_back(key);
  }
  for (const Json& row : r["rows"]) {
    if (row.contains("cost_per_million_output_all_in")) {
      keys.emplace_back("cost_per_million_output_all_in");
      break;
    }
  }
  std::vector<Row> rows = matrix(r["rows"], true, keys);
  rows[0].emplace_back("status");
  for (std::size_t i = 0; i < r["rows"].size(); ++i) {
    const Json& row = r["rows"][i];
    const bool best = !r["best"].is_null() && r["best"].get<std::size_t>() == i;
    rows[i + 1].push_back(row.contains("error")           ? fmt::format("error: {}", plain(row["error"]))
                          : !row["fits"].get<bool>()      ? "does not fit"
                          : !row["meets_slo"].get<bool>() ? "misses the SLO"
                          : best                          ? "BEST"
                                                          : "ok");
  }
  std::string out = columns(rows);
  if (r["best"].is_null()) {
    out += "\nNo plan fits and meets the service levels.\n";
  } else {
    const Json& best = r["rows"][r["best"].get<std::size_t>()];
    std::string name;
    if (best.contains("name")) {
      name = plain(best["name"]);
    } else {
      for (const Json& axis : r["axes"])
        name += fmt::format("{}{}={}", name.empty() ? "" : " ", plain(axis), plain(best[plain(axis)]));
    }
    out +=
        fmt::format("\nBest: {}, {} output tokens/s per card, TTFT {} ms, TPOT {} ms\n", name,
                    shown(best["output_tokens_per_s_card"]), shown(best["ttft_ms"]), shown(best["tpot_ms"]));
  }
  return out;
}

/// The whole answer in a line; then how both sides are started.
std::string deployment_line(const Json& r) {
  const std::string asked = fmt::format("{} users of {}, {} tokens in and {} out", plain(r["users"]),
                                        plain(r["model"]), plain(r["input"]), plain(r["output"]));
  if (r["best"].is_null()) return fmt::format("{}: {}\n", asked, plain(r["problem"]));
  const Json& best = r["best"];
  const auto side = [](const Json& s) {
    const Json& p = s["plan"];
    std::string plan = fmt::format("tp {} ep {} dp {}", plain(p["tp"]), plain(p["ep"]), plain(p["dp"]));
    for (const char* key : {"pp", "cp"}) {
      if (p[key] != 1) plan += fmt::format(" {} {}", key, plain(p[key]));
    }
    const std::int64_t instances = s["instances"].get<std::int64_t>();
    return fmt::format("{} ({}{}, batch {})", shown(s["cards"]),
                       instances == 1 ? "" : fmt::format("{} x ", instances), plan, plain(s["batch"]));
  };
  const std::string price =
      best.contains("per_hour") ? fmt::format(", {} per hour", shown(best["per_hour"])) : std::string();
  std::string out = fmt::format(
      "{}: {} {} cards, {} for decode and {} for prefill: {} tokens/s each, TTFT {} ms{}\n", asked,
      shown(best["cards"]), plain(r["hardware"]), side(best["decode"]), side(best["prefill"]),
      shown(best["tokens_per_s_user"]), significant(value(best["ttft_s"]) * 1e3, 4), price);
  for (const char* name : {"decode", "prefill"})
    out += start_lines(best[name]["start"], fmt::format("{}: ", name));
  return out;
}

std::string tables_table(const Json& r) {
  std::vector<Row> rows = {{"table", "cell", "printed", "unit", "article", "verdict", "exact", "note"}};
  int counts[4] = {};
  for (const Json& c : r["cells"]) {
    const std::string v = plain(c["verdict"]);
    ++counts[v == "match" ? 0 : v == "near" ? 1 : v == "MISMATCH" ? 2 : 3];
    auto number = [](const Json& x) { return x.is_null() ? std::string("-") : significant(value(x), 6); };
    rows.push_back({plain(c["section"]), plain(c["cell"]), plain(c["printed"]), plain(c["unit"]),
                    number(c["article"]), v, number(c["exact"]), plain(c["note"])});
  }
  return columns(rows, true) +
         fmt::format("\n{} match, {} near (within 1 %), {} do not follow, {} with unknown inputs\n",
                     counts[0], counts[1], counts[2], counts[3]);
}

std::string engine_table(const Json& r) {
  std::vector<Row> rows = {
      {"result", "phase", "batch", "tokens", "measured ms", "predicted ms", "error", "left out"}};
  auto percent = [](const Json& row, const char* key) {
    return row.contains(key) ? fmt::format("{:+.1f} %", 100 * value(row[key])) : std::string("-");
  };
  for (const Json& row : r["rows"]) {
    rows.push_back({std::filesystem::path(plain(row["source"])).stem().string(), plain(row["phase"]),
                    plain(row["batch"]), plain(row["tokens"]),
                    fmt::format("{:.3f}", value(row["measured_ms"])),
                    fmt::format("{:.3f}", value(row["predicted_ms"])), percent(row, "error"),
                    percent(row, "held_out_error")});
  }
  std::string out = columns(rows) + "\n";
  for (const auto& [name, what] : {std::pair{"fitted", "fitted on all rows"},
                                   std::pair{"held_out", "each row predicted from the others"}}) {
    if (!r["summary"].contains(name)) continue;
    const Json& s = r["summary"][name];
    out += fmt::format("{}: median error {:.1f} %, largest {:.1f} %\n", what,
                       100 * value(s["median_abs_error"]), 100 * value(s["max_abs_error"]));
  }
  for (const auto& [key, cost] : r["profile"]["engine"].items()) {
    out += fmt::format("{} {:.3g}{}", key == "weights" ? "costs:" : ",", value(cost), " " + key);
  }
  return out + "\n";
}

std::string calibrate_table(const Json& r) {
  if (r["profile"].contains("engine")) return engine_table(r);
  std::vector<Row> rows = {
      {"b", "s_q", "h_q", "s_k", "measured ms", "predicted ms", "error", "held out", "at peak"}};
  auto percent = [](const Json& row, const char* key) {
    return row.contains(key) ? fmt::format("{:+.1f} %", 100 * value(row[key])) : std::string("-");
  };
  for (const Json& row : r["rows"]) {
    rows.push_back({plain(row["b"]), plain(row["s_q"]), plain(row["h_q"]), plain(row["s_k"]),
                    fmt::format("{:.4f}", value(row["measured_ms"])),
                    fmt::format("{:.4f}", value(row["predicted_ms"])), percent(row, "error"),
                    percent(row, "held_out_error"), fmt::format("{:.4f}", value(row["peak_ms"]))});
  }
  std::string out = columns(rows) + "\n";
  for (const auto& [name, what] : {std::pair{"fitted", "fitted on all rows"},
                                   std::pair{"held_out", "each half predicted from the other"},
                                   std::pair{"at_peak", "peaks instead of measured fractions"}}) {
    if (!r["summary"].contains(name)) continue;
    const Json& s = r["summary"][name];
    out += fmt::format("{}: median error {:.1f} %, largest {:.1f} %\n", what,
                       100 * value(s["median_abs_error"]), 100 * value(s["max_abs_error"]));
  }
  const Json& e = r["profile"]["efficiency"];
  out += fmt::format(
      "attention reaches {:.1f} % of the BF16 peak, {:.1f} % of the bandwidth, and {:.1f} us per call\n",
      100 * value(e["attention_compute"]), 100 * value(e["attention_memory"]),
      value(e["attention_launch_us"]));
  return out;
}

std::string list_table(const Json& r) {
  std::string out;
  for (const char* key : {"models", "hardware", "measured"}) {
    out += fmt::format("{}:", key);
    for (const Json& name : r[key]) out += fmt::format(" {}", plain(name));
    out += "\n";
  }
  return out;
}

}  // namespace

std::string render(std::string_view result_json, std::string_view format) {
  const Json r = parse_json(result_json, "result");
  const std::string command = r.is_object() ? r.value("command", "") : "";
  if (command.empty()) throw InvalidArgument("result: no \"command\": expected what run_json returned");
  if (format == "json") return r.dump(2) + "\n";
  if (format == "csv") {
    if (command == "sweep" || command == "compare" || command == "calibrate")
      return csv(matrix(r["rows"], false, {}));
    if (command == "tables") return csv(matrix(r["cells"], false, {}));
    std::vector<Row> rows = {{"key", "value"}};
    flatten(rows, "", r);
    return csv(rows);
  }
  if (format != "table") {
    throw InvalidArgument(fmt::format("format = \"{}\": expected one of table, csv, json", format));
  }
  if (command == "plan") return plan_table(r);
  if (command == "deployment") return deployment_line(r);
  if (command == "tables") return tables_table(r);
  if (command == "calibrate") return calibrate_table(r);
  if (command == "list") return list_table(r);
  return rows_table(r);
}

}  // namespace flash_mla::planner
