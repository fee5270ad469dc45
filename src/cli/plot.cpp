#include "cli/plot.h"

#include <fmt/format.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "flash_mla/error.h"

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

// Exit status of a command of the shell.
int run(const std::string& command) {
  std::fflush(nullptr);
  const int status = std::system(command.c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace

std::string why_no_plotting(const std::string& python) {
  constexpr int kNotFound = 127, kNotExecutable = 126;
  const auto imports = [&](const char* module) {
    return run(fmt::format("{} -c 'import {}' >/dev/null 2>&1", shell_quote(python), module));
  };
  const int status = imports("matplotlib");
  if (status == kNotFound || status == kNotExecutable) {
    return fmt::format(
        "--python is \"{}\", which does not run; expected a Python 3 that has matplotlib and the package "
        "flash_mla_kernels",
        python);
  }
  const auto missing = [&](const char* module, const char* package) {
    return fmt::format("\"{}\" cannot import {}; install {} there or name another Python with --python",
                       python, module, package);
  };
  if (status != 0) return missing("matplotlib", "it");
  if (imports("flash_mla_kernels.plot") != 0)
    return missing("flash_mla_kernels.plot", "the package flash_mla_kernels");
  return "";
}

void require_plotting(const std::string& python, const std::string& what) {
  const std::string why = why_no_plotting(python);
  if (!why.empty())
    throw InvalidArgument(fmt::format("{} needs matplotlib and flash_mla_kernels.plot: {}", what, why));
}

void plot(const std::string& python, const std::string& json, const std::string& target) {
  const int status = run(fmt::format("{} -m flash_mla_kernels.plot {} {}", shell_quote(python),
                                     shell_quote(json), shell_quote(target)));
  if (status != 0)
    throw std::runtime_error(
        fmt::format("{} -m flash_mla_kernels.plot ended with status {}", python, status));
}

}  // namespace flash_mla::cli
