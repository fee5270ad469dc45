#include "bench/demo.h"

#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <string>

#include "bench/demo_text.h"
#include "cli/commands.h"
#include "cli/plot.h"

namespace flash_mla::cli {
namespace {

struct DemoOptions {
  bool quick = false;
  std::string out = "out", plot, python = "python3", model;
};

bool run_demo(const DemoOptions& o) {
  const std::filesystem::path out = o.out;
  std::filesystem::create_directories(out);
  const std::string json = (out / "roofline.json").string();
  if (!o.plot.empty()) require_plotting(o.python, "the roofline picture");
  const bool right = bench::run_demo(o.quick, json);
  fmt::print("Wrote {}.\n", json);
  if (const std::string why = why_no_plotting(o.python); !why.empty()) {
    fmt::print("No picture: {}.\n", why);
  } else {
    const std::string picture = !o.plot.empty() ? o.plot : (out / "roofline.png").string();
    plot(o.python, json, picture);
    fmt::print("Wrote {}.\n", picture);
  }
  return (o.model.empty() || bench::demo_text(o.model, out / "text.txt")) && right;
}

}  // namespace

void register_demo(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<DemoOptions>();
  CLI::App* sub = app.add_subcommand(
      "demo", "Decode a realistic batch, verify it, and show how close to the machine's limit it ran");
  sub->add_flag("--quick", o->quick, "A small batch, for a first look or a test");
  sub->add_option("--out", o->out, "Folder for roofline.json, roofline.png and text.txt")
      ->capture_default_str();
  sub->add_option("--plot", o->plot, "Write the picture here instead");
  sub->add_option("--model", o->model,
                  "Hugging Face model directory: afterwards, let this model write a text")
      ->check(CLI::ExistingDirectory);
  sub->add_option("--python", o->python, "Python with matplotlib")->capture_default_str();
  sub->callback([o, &exit_code] { exit_code = run_demo(*o) ? 0 : 1; });
}

}  // namespace flash_mla::cli
