#include "bench/plot.h"

#include <fmt/format.h>
#include <sys/wait.h>

#include <csignal>
#include <cstdio>
#include <stdexcept>

#include "cli/args.h"
#include "flash_mla_plot_script.h"

namespace flash_mla::cli {
namespace {

std::string shell_quote(const std::string& text) {
  std::string quoted = "'";
  for (const char c : text) {
    if (c == '\'') {
      quoted += "'\\''";
    } else {
      quoted += c;
    }
  }
  return quoted + "'";
}

// Exit status of `command` with `input` on its stdin.
int run(const std::string& command, const char* input) {
  // A child that ends without reading (no such program) must not end this process.
  const auto previous = std::signal(SIGPIPE, SIG_IGN);
  std::fflush(nullptr);
  FILE* pipe = popen(command.c_str(), "w");
  if (pipe == nullptr) throw std::runtime_error("cannot start a shell");
  std::fputs(input, pipe);
  const int status = pclose(pipe);
  std::signal(SIGPIPE, previous);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace

void require_plotting(const std::string& python, const char* what) {
  const int status = run(shell_quote(python) + " - 2>/dev/null", "import matplotlib");
  if (status == 0) return;
  constexpr int kNotFound = 127, kNotExecutable = 126;
  if (status == kNotFound || status == kNotExecutable) {
    throw UsageError(fmt::format(
        "--python is \"{}\", which does not run; expected a Python 3 that has matplotlib", python));
  }
  throw UsageError(
      fmt::format("{} needs matplotlib, which \"{}\" cannot import; install it there or "
                  "name another Python with "
                  "--python",
                  what, python));
}

void plot_plan(const std::string& python, const std::string& json, const std::string& directory) {
  const std::string command =
      fmt::format("{} - {} {}", shell_quote(python), shell_quote(json), shell_quote(directory));
  const int status = run(command, kPlanPlotScript);
  if (status != 0) throw std::runtime_error(fmt::format("the plot script ended with status {}", status));
}

void plot_roofline(const std::string& python, const std::string& json, const std::string& picture) {
  const std::string command =
      fmt::format("{} - {} {}", shell_quote(python), shell_quote(json), shell_quote(picture));
  const int status = run(command, kPlotScript);
  if (status != 0) throw std::runtime_error(fmt::format("the plot script ended with status {}", status));
}

}  // namespace flash_mla::cli
