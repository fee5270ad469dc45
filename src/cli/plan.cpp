#include <fmt/format.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cli/commands.h"
#include "cli/plot.h"
#include "cli/read_text.h"
#include "flash_mla/error.h"
#include "flash_mla/planner.h"
#include "planner/placement.h"

// `flash-mla plan`: turns options into a planner request, prints the result, draws the pictures.

namespace flash_mla::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Setting {
  const char* option;
  const char* key;
  const char* help;
};

// One option each for the keys of a request; the planner checks the values.
constexpr Setting kSettings[] = {
    {"--model", "model", "Shipped name (see `plan list`) or a Hugging Face config.json"},
    {"--hardware", "hardware", "Shipped name or a hardware profile"},
    {"--mode", "mode", "exact (default) or article"},
    {"--tp", "tp", "Tensor-parallel cards"},
    {"--ep", "ep", "Expert-parallel cards"},
    {"--dp", "dp", "Data-parallel attention groups (default: ep / tp)"},
    {"--pp", "pp", "Pipeline stages"},
    {"--cp", "cp", "Context-parallel cards"},
    {"--input", "input", "Prompt tokens"},
    {"--output", "output", "Generated tokens"},
    {"--batch", "batch", "Decoding sequences per data-parallel rank"},
    {"--prefill-batch", "prefill_batch", "Prompts per data-parallel rank and prefill pass"},
    {"--chunk", "chunk", "Prompt tokens per prefill chunk (0: whole prompt)"},
    {"--prefix-hit", "prefix_hit", "Share of prompt tokens in the prefix cache"},
    {"--arrival-rate", "arrival_rate", "Requests per second to the deployment"},
    {"--mtp-draft", "mtp_draft", "Draft tokens per step"},
    {"--mtp-acceptance", "mtp_acceptance", "Chance that a draft token is accepted"},
    {"--placement", "placement", "Expert placement: uniform, linear or round_robin"},
    {"--attention", "attention", "Attention arithmetic: bf16 or fp8"},
    {"--dense", "dense", "Weights outside the experts: bf16 or fp8"},
    {"--moe", "moe", "Expert weights: bf16, fp8 or w4a8"},
    {"--kv", "kv", "Cache layout: bf16, fp8_656 or fp8_576"},
    {"--activation", "activation", "Activations: bf16 or fp8"},
    {"--scale-group", "scale_group", "INT4 weights per 2-byte scale (0: not counted)"},
    {"--overlap", "overlap", "none, memory, operators or full"},
    {"--slo-ttft-ms", "ttft_ms", "Service level: time to first token"},
    {"--slo-tpot-ms", "tpot_ms", "Service level: time per output token"},
    {"--price-card-hour", "card_hour", "Price of one card for one hour"},
    {"--price-card", "card_price", "Purchase price per card, its share of the server included"},
    {"--price-years", "years", "Years the purchase is written off over"},
    {"--price-power-w", "power_w", "Watts per card, its share of the server included"},
    {"--price-pue", "pue", "Power usage effectiveness of the site"},
    {"--price-kwh", "electricity_kwh", "Price of a kWh"},
    {"--price-other-hour", "other_hour", "Other cost per card and hour"},
};

struct Options {
  std::string values[std::size(kSettings)];
  std::string request_file, format = "table", plot, python = "python3", out;
  std::vector<std::string> sweep, cases, files, bench, set;
  std::string calibrate_hardware = "h200", dtype = "bf16";
  bool explain = false;
  std::string users, tokens_per_s, experts;
};

/// A number where the text is one, else the text; the planner says what it expected.
Json scalar(const std::string& text) {
  if (text == "true" || text == "false") return text == "true";
  const Json parsed = Json::parse(text, nullptr, false);
  return parsed.is_number() ? parsed : Json(text);
}

std::pair<std::string, std::string> split_assignment(const std::string& text, const char* option) {
  const std::size_t at = text.find('=');
  if (at == std::string::npos || at == 0 || at + 1 == text.size()) {
    throw InvalidArgument(fmt::format("{} {}: expected key=value", option, text));
  }
  return {text.substr(0, at), text.substr(at + 1)};
}

/// "8,16,32", "1..128" (every integer), "1..128*2" (doubling) or "0..4096+512" (steps), mixed by commas.
Json axis_values(const std::string& text, const std::string& option) {
  Json values = Json::array();
  std::stringstream parts(text);
  std::string part;
  while (std::getline(parts, part, ',')) {
    const std::size_t dots = part.find("..");
    if (dots == std::string::npos) {
      values.push_back(scalar(part));
      continue;
    }
    char op = '+';
    double step = 1;
    std::string last = part.substr(dots + 2);
    if (const std::size_t at = last.find_first_of("+*"); at != std::string::npos) {
      op = last[at];
      const Json s = scalar(last.substr(at + 1));
      step = s.is_number() ? s.get<double>() : 0;
      last.resize(at);
    }
    const Json from = scalar(part.substr(0, dots)), to = scalar(last);
    const bool usable = from.is_number() && to.is_number() && from.get<double>() <= to.get<double>() &&
                        (op == '+' ? step > 0 : step > 1 && from.get<double>() > 0);
    if (!usable) {
      throw InvalidArgument(fmt::format(
          "--sweep {}={}: expected first..last, first..last+step or first..last*factor", option, part));
    }
    constexpr std::size_t kMost = 200000;
    double x = from.get<double>();
    while (x <= to.get<double>() * (1 + 1e-12)) {
      if (values.size() == kMost)
        throw InvalidArgument(fmt::format("--sweep {}={}: more than {} values", option, part, kMost));
      values.push_back(x == std::floor(x) && std::abs(x) < 1e15 ? Json(static_cast<std::int64_t>(x))
                                                                : Json(x));
      x = op == '+' ? x + step : x * step;
    }
  }
  return values;
}

/// How often each expert was chosen, over all layers of a histogram.
std::vector<double> expert_load(const std::string& path) {
  const auto layers = planner::read_histogram(read_text(path, path, "a histogram (docs/planner.md)"), path);
  std::vector<double> out(layers.front().load.size(), 0);
  for (const planner::LayerLoad& layer : layers) {
    for (std::size_t e = 0; e < out.size(); ++e) out[e] += layer.load[e];
  }
  return out;
}

Json read_file(const std::string& path) {
  Json json = Json::parse(read_text(path, path, "a JSON request"), nullptr, false);
  if (!json.is_object())
    throw InvalidArgument(fmt::format("{}: not a JSON object; expected a plan request", path));
  return json;
}

/// The request that file and options describe.
Json base_request(const Options& o) {
  Json request = o.request_file.empty() ? Json::object() : read_file(o.request_file);
  Json set = request.value("set", Json::object());
  for (std::size_t i = 0; i < std::size(kSettings); ++i) {
    if (!o.values[i].empty()) set[kSettings[i].key] = scalar(o.values[i]);
  }
  for (const std::string& text : o.set) {
    const auto [key, value] = split_assignment(text, "--set");
    set[key] = scalar(value);
  }
  if (!set.empty()) request["set"] = set;
  if (!o.experts.empty()) request["workload"]["expert_load"] = expert_load(o.experts);
  return request;
}

void write_file(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file) throw InvalidArgument(fmt::format("{}: cannot be written", path.string()));
}

/// Draws the result; the pictures lie beside the JSON.
void draw(const Options& o, const std::string& result) {
  std::error_code error;
  std::filesystem::create_directories(o.plot, error);
  if (error)
    throw InvalidArgument(fmt::format("--plot {}: {}; expected a directory", o.plot, error.message()));
  const std::filesystem::path json = std::filesystem::path(o.plot) / "plan.json";
  write_file(json, result);
  plot(o.python, json.string(), o.plot);
}

int finish(const Options& o, const std::string& result) {
  const std::string text = planner::render(result, o.format);
  if (o.out.empty()) {
    fmt::print("{}", text);
  } else {
    write_file(o.out, text);
  }
  if (!o.plot.empty()) draw(o, result);
  const Json json = Json::parse(result);
  const bool misfit = json.contains("fits") && !json["fits"].get<bool>();
  if (misfit || (json.contains("best") && json["best"].is_null() && json.contains("problem"))) {
    fmt::print(stderr, "flash-mla plan: {}\n", json["problem"].get<std::string>());
    return 1;
  }
  if (json.contains("meets_slo") && !json["meets_slo"].get<bool>()) {
    fmt::print(stderr, "flash-mla plan: the service levels are not met\n");
    return 1;
  }
  if (json.contains("best") && json["best"].is_null()) {
    fmt::print(stderr, "flash-mla plan: no plan fits and meets the service levels\n");
    return 1;
  }
  return 0;
}

int run_plan(const Options& o) {
  if (!o.plot.empty()) require_plotting(o.python, "--plot");
  Json request = base_request(o);
  if (!o.users.empty()) {
    for (const auto& [flag, used] :
         {std::pair{"--sweep", !o.sweep.empty()}, std::pair{"--explain", o.explain},
          std::pair{"--plot", !o.plot.empty()}}) {
      if (used)
        throw InvalidArgument(fmt::format("--users: expected without {}: it asks for one plan", flag));
    }
    request = {{"command", "deployment"}, {"base", request}, {"users", scalar(o.users)}};
    if (!o.tokens_per_s.empty()) request["tokens_per_s"] = scalar(o.tokens_per_s);
  } else if (!o.tokens_per_s.empty()) {
    throw InvalidArgument(
        "--tokens-per-s: expected together with --users; of one plan --slo-tpot-ms is the same");
  } else if (!o.sweep.empty()) {
    if (o.explain) throw InvalidArgument("--explain: expected a single plan, not a sweep");
    Json axes = Json::object();
    for (const std::string& text : o.sweep) {
      const auto [key, values] = split_assignment(text, "--sweep");
      axes[key] = axis_values(values, key);
    }
    request = {{"command", "sweep"}, {"base", request}, {"axes", axes}};
  } else if (o.explain) {
    request["explain"] = true;
  }
  return finish(o, planner::run_json(request.dump()));
}

int run_compare(const Options& o) {
  if (!o.plot.empty()) require_plotting(o.python, "--plot");
  Json cases = Json::array();
  for (const std::string& file : o.files) {
    Json one = read_file(file);
    if (!one.contains("name")) one["name"] = file;
    cases.push_back(one);
  }
  for (const std::string& text : o.cases) {
    Json one = base_request(o);
    one["name"] = text;
    std::stringstream words(text);
    std::string word;
    while (words >> word) {
      const auto [key, value] = split_assignment(word, "--case");
      one["set"][key] = scalar(value);
    }
    cases.push_back(one);
  }
  if (cases.empty())
    throw InvalidArgument("plan compare: expected request files, or --case \"hardware=h20 ep=8\" options");
  return finish(o, planner::run_json(Json{{"command", "compare"}, {"cases", cases}}.dump()));
}

int run_calibrate(const Options& o) {
  const Json request = {
      {"command", "calibrate"}, {"hardware", o.calibrate_hardware}, {"dtype", o.dtype}, {"bench", o.bench}};
  const std::string result = planner::run_json(request.dump());
  if (!o.out.empty()) write_file(o.out, Json::parse(result)["profile"].dump(2) + "\n");
  fmt::print("{}", planner::render(result, o.format));
  return 0;
}

void add_format(CLI::App* app, Options& o) {
  app->add_option("--format", o.format, "table, json or csv")
      ->check(CLI::IsMember({"table", "json", "csv"}))
      ->capture_default_str();
}

void add_settings(CLI::App* app, Options& o) {
  for (std::size_t i = 0; i < std::size(kSettings); ++i) {
    app->add_option(kSettings[i].option, o.values[i], kSettings[i].help)->group("Request");
  }
  app->add_option(
         "--experts", o.experts,
         "How often experts were chosen (workload.expert_load): a histogram, or what experts plan wrote")
      ->group("Request");
  app->add_option("--request", o.request_file, "JSON request that the options change")->group("Request");
  app->add_option("--set", o.set, "key=value for any other key")->group("Request")->expected(1, -1);
  add_format(app, o);
  app->add_option("--plot", o.plot, "Directory for pictures (and plan.json); needs a Python with matplotlib");
  app->add_option("--python", o.python, "Python that draws the pictures")->capture_default_str();
  app->add_option("-o,--out", o.out, "File for the result instead of standard output");
}

}  // namespace

void register_plan(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* plan = app.add_subcommand(
      "plan", "What a model needs of compute, memory, bandwidth and links, and what limits it");
  plan->require_subcommand(0, 1);
  add_settings(plan, *options);
  plan->add_option("--users", options->users,
                   "Answer in one line: the cards and the plan for that many users who generate at a time");
  plan->add_option("--tokens-per-s", options->tokens_per_s, "What each of them gets at least");
  plan->add_flag("--explain", options->explain, "Print every equation with its numbers");
  plan->add_option("--sweep", options->sweep,
                   "key=values to vary: ep=8,16,32 batch=1..128 input=1024..65536*2")
      ->expected(1, -1);

  CLI::App* compare =
      plan->add_subcommand("compare", "Plans or cards side by side, and the best under the service levels");
  auto compare_options = std::make_shared<Options>();
  add_settings(compare, *compare_options);
  compare->add_option("files", compare_options->files, "JSON requests");
  compare->add_option("--case", compare_options->cases, "A case: \"hardware=h200 ep=16 batch=64\"")
      ->expected(1, -1);

  CLI::App* calibrate = plan->add_subcommand("calibrate", "Measured efficiencies from benchmark results");
  calibrate->add_option("--hardware", options->calibrate_hardware, "Profile the measurements belong to")
      ->capture_default_str();
  calibrate->add_option("--bench", options->bench, "Benchmark JSON, or a shipped measurement's name")
      ->required()
      ->expected(1, -1);
  calibrate->add_option("--dtype", options->dtype, "Rows to use: bf16 or fp8")->capture_default_str();
  calibrate->add_option("-o,--out", options->out, "File for the calibrated hardware profile");
  add_format(calibrate, *options);

  CLI::App* tables =
      plan->add_subcommand("tables", "The source article's tables: printed, recomputed, corrected");
  add_format(tables, *options);
  CLI::App* list = plan->add_subcommand("list", "Shipped models, hardware profiles and measurements");
  add_format(list, *options);

  plan->callback([=, &exit_code] {
    if (const auto used = plan->get_subcommands(); !used.empty()) {
      for (const CLI::Option* option : plan->get_options()) {
        if (option->count() == 0) continue;
        throw InvalidArgument(
            fmt::format("{0} stands before {1}, which would not see it; expected plan {1} {0} ...",
                        option->get_name(), used.front()->get_name()));
      }
    }
    if (compare->parsed()) {
      exit_code = run_compare(*compare_options);
    } else if (calibrate->parsed()) {
      exit_code = run_calibrate(*options);
    } else if (tables->parsed()) {
      exit_code = finish(*options, planner::run_json(R"({"command": "tables"})"));
    } else if (list->parsed()) {
      exit_code = finish(*options, planner::run_json(R"({"command": "list"})"));
    } else {
      exit_code = run_plan(*options);
    }
  });
}

}  // namespace flash_mla::cli
