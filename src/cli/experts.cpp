#include <fmt/format.h>

#include <fstream>
#include <memory>
#include <string>

#include "cli/commands.h"
#include "cli/read_text.h"
#include "flash_mla/error.h"
#include "planner/placement.h"

// `flash-mla experts plan`: from how often experts were chosen to which GPU holds which.

namespace flash_mla::cli {
namespace {

struct Options {
  std::string histogram, out;
  planner::PlacementOptions placement;
};

int run_plan(const Options& o) {
  const std::string histogram =
      read_text(o.histogram, "--histogram " + o.histogram, "a histogram (docs/planner.md)");
  const auto layers = planner::read_histogram(histogram, o.histogram);
  const std::string text = planner::plan_placement(layers, o.placement);
  if (o.out.empty()) {
    fmt::print("{}", text);
    return 0;
  }
  std::ofstream file(o.out, std::ios::binary);
  file << text;
  file.close();
  if (!file) throw InvalidArgument(fmt::format("{}: cannot be written", o.out));
  return 0;
}

}  // namespace

void register_experts(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<Options>();
  CLI::App* experts = app.add_subcommand("experts", "Which GPU holds which experts of a mixture");
  experts->require_subcommand(1);
  CLI::App* plan =
      experts->add_subcommand("plan", "A placement by how often each expert was chosen, as JSON");
  plan->add_option("--histogram", o->histogram,
                   "How often each expert of each layer was chosen, JSON (docs/planner.md)")
      ->required();
  plan->add_option("--gpus", o->placement.gpus, "GPUs that share the experts")->required();
  plan->add_option("--copies", o->placement.copies,
                   "Slots besides one for each expert, for the busiest (eplb)")
      ->capture_default_str();
  plan->add_option("--nodes", o->placement.nodes, "Hosts that the GPUs are in")->capture_default_str();
  plan->add_option("--groups", o->placement.groups,
                   "Groups of experts (n_group of config.json), whose experts eplb keeps on one host each")
      ->capture_default_str();
  plan->add_option("--placement", o->placement.rule, "linear, round_robin or eplb")->capture_default_str();
  plan->add_option("-o,--out", o->out, "File for the result instead of standard output");
  plan->callback([o, &exit_code] { exit_code = run_plan(*o); });
}

}  // namespace flash_mla::cli
