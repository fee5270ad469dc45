#include "cli/load_progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <memory>

namespace flash_mla::cli {
namespace {

using Clock = std::chrono::steady_clock;

std::string size(double bytes) {
  constexpr double kMiB = 1 << 20, kGiB = 1 << 30;
  return bytes < kGiB ? fmt::format("{:.1f} MiB", bytes / kMiB) : fmt::format("{:.1f} GiB", bytes / kGiB);
}

class Loading {
 public:
  Loading(std::string name, bool verbose)
      : name_(std::move(name)), terminal_(isatty(STDERR_FILENO) == 1), verbose_(verbose) {}

  void show(const LoadProgress& p) {
    const Clock::time_point now = Clock::now();
    const std::string total = fmt::format("{} of weights in {} layers", size(p.total_bytes), p.total_layers);
    if (p.layers == 0) {
      begin_ = drawn_ = now;
      fmt::print(stderr, "{}: loading {}{}", name_, total, terminal_ ? "" : "\n");
    } else if (p.layers == p.total_layers && p.bytes == p.total_bytes) {
      const double seconds = std::chrono::duration<double>(now - begin_).count();
      fmt::print(stderr, "{}{}: loaded {} in {:.1f} s{}\n", terminal_ ? "\r" : "", name_, total, seconds,
                 terminal_ ? "\x1b[K" : "");
    } else if (terminal_ && now - drawn_ >= std::chrono::milliseconds(100)) {
      drawn_ = now;
      fmt::print(stderr, "\r{}: loading {}: {}, layer {}\x1b[K", name_, total, size(p.bytes), p.layers);
    } else if (!terminal_ && verbose_) {
      fmt::print(stderr, "{}: {} of {}, layer {} of {}\n", name_, size(p.bytes), size(p.total_bytes),
                 p.layers, p.total_layers);
    }
    std::fflush(stderr);
  }

 private:
  std::string name_;
  bool terminal_, verbose_;
  Clock::time_point begin_, drawn_;
};

}  // namespace

void add_talk_flags(CLI::App& app, Talk& talk) {
  if (app.get_option_no_throw("--quiet") == nullptr) {
    app.add_flag("--quiet", talk.quiet, "Say nothing about the loading of the model");
  }
  app.add_flag("--verbose", talk.verbose, "Say how far the loading of the model is, layer by layer");
}

void show_loading(EngineOptions& options, const Talk& talk, const std::string& name) {
  if (talk.quiet) return;
  options.on_load = [loading = std::make_shared<Loading>(name, talk.verbose)](const LoadProgress& progress) {
    loading->show(progress);
  };
}

}  // namespace flash_mla::cli
