#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/commands.h"
#include "flash_mla/quantize_checkpoint.h"

// `flash-mla quantize`: a checkpoint with weights of fewer bits.

namespace flash_mla::cli {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr double kGiB = 1 << 30;

struct QuantizeOptions {
  std::string model, out;
  bool json = false, quiet = false;
  QuantizeCheckpointOptions quantize;
};

/// A bar on a terminal's stderr; elsewhere a line at each tenth.
class Progress {
 public:
  void show(double done, double total) {
    const double share = total > 0 ? done / total : 1;
    const Clock::time_point now = Clock::now();
    if (done == 0) begin_ = now;
    if (!terminal_) {
      if (share < next_) return;
      next_ += 0.1;
      fmt::print(stderr, "flash-mla quantize: {:.0f}% of {:.2f} GiB\n", 100 * share, total / kGiB);
      return;
    }
    if (done < total && now - drawn_ < std::chrono::milliseconds(100)) return;
    drawn_ = now;
    constexpr int kWidth = 30;
    const int full = static_cast<int>(share * kWidth);
    const double seconds = std::chrono::duration<double>(now - begin_).count();
    fmt::print(stderr, "\r[{}{}] {:3.0f}% of {:.2f} GiB, {:.0f} s left\x1b[K{}", std::string(full, '#'),
               std::string(kWidth - full, '.'), 100 * share, total / kGiB,
               share > 0 ? seconds / share * (1 - share) : 0.0, done < total ? "" : "\n");
    std::fflush(stderr);
  }

 private:
  bool terminal_ = isatty(STDERR_FILENO) == 1;
  double next_ = 0;
  Clock::time_point begin_ = Clock::now(), drawn_ = begin_;
};

void print_report(const QuantizeOptions& o, const QuantizeCheckpointReport& report) {
  if (o.json) {
    Json layers = Json::array();
    for (const QuantizationError& e : report.errors) {
      layers.push_back({{"layers", e.layers}, {"weights", e.weights}, {"relative_error", e.relative}});
      if (e.of_products > 0) layers.back()["relative_error_of_products"] = e.of_products;
    }
    const Json all = {
        {"input_bytes", report.input_bytes}, {"output_bytes", report.output_bytes}, {"errors", layers}};
    fmt::print("{}\n", all.dump(2));
    return;
  }
  const bool products = !o.quantize.calibration.empty();
  fmt::print("{:<28} {:>12}  {:>14}{}\n", "layer", "weights", "relative error",
             products ? "  of products" : "");
  for (const QuantizationError& e : report.errors) {
    fmt::print("{:<28} {:>12}  {:>14.5f}", e.layers, e.weights, e.relative);
    if (products) fmt::print("  {:>11.5f}", e.of_products);
    fmt::print("\n");
  }
  fmt::print("{}: {:.3f} GiB, of {:.3f}\n", o.out, report.output_bytes / kGiB, report.input_bytes / kGiB);
}

int run(QuantizeOptions o) {
  if (!o.quiet) {
    o.quantize.on_progress = [progress = Progress()](double done, double total) mutable {
      progress.show(done, total);
    };
    if (!o.quantize.calibration.empty()) fmt::print(stderr, "flash-mla quantize: running the calibration\n");
  }
  print_report(o, quantize_checkpoint(o.model, o.out, o.quantize));
  return 0;
}

}  // namespace

void register_quantize(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<QuantizeOptions>();
  CLI::App* sub = app.add_subcommand("quantize", "Write a checkpoint with weights of fewer bits");
  sub->add_option("--model", o->model, "Hugging Face directory, quantised or not")
      ->required()
      ->check(CLI::ExistingDirectory);
  sub->add_option("--out", o->out, "Directory to be made")->required();
  using Format = QuantizeCheckpointOptions::Format;
  static const std::map<std::string, Format> formats = {{"fp8", Format::kFp8}, {"w4a8", Format::kW4A8}};
  sub->add_option_function<std::string>(
         "--format", [o](const std::string& name) { o->quantize.format = formats.at(name); },
         "fp8 (e4m3 in blocks of 128 x 128, as DeepSeek-V3) or w4a8 (4 bits in groups of 128, "
         "compressed-tensors)")
      ->required()
      ->check(CLI::IsMember({"fp8", "w4a8"}));
  sub->add_option("--layers", o->quantize.layers,
                  "Of attention, dense, shared, experts, head (default: attention,shared,experts for fp8, "
                  "shared,experts for w4a8)")
      ->delimiter(',')
      ->check(CLI::IsMember({"attention", "dense", "shared", "experts", "head"}));
  sub->add_flag("--ue8m0", o->quantize.power_of_two_scales, "fp8: scales are powers of two");
  sub->add_option("--calibration", o->quantize.calibration,
                  "w4a8: text by whose activations features are scaled first (AWQ)")
      ->check(CLI::ExistingFile);
  sub->add_option("--calibration-tokens", o->quantize.calibration_tokens, "Tokens of it at most")
      ->capture_default_str();
  sub->add_flag("--static-activations", o->quantize.static_activations,
                "w4a8 with --calibration: write a scale for the activations of every product");
  sub->add_option("--shard-size", o->quantize.shard_bytes, "Bytes of a file, e.g. 4GiB")
      ->transform(CLI::AsSizeValue(false));
  sub->add_option("--threads", o->quantize.num_threads, "CPU threads of the calibration (0: all)")
      ->capture_default_str();
  sub->add_flag("--json", o->json, "The report as JSON");
  sub->add_flag("--quiet", o->quiet, "No progress");
  sub->callback([o, &exit_code] { exit_code = run(*o); });
}

}  // namespace flash_mla::cli
