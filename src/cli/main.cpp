#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/threads.h"
#include "cli/unknown_flags.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"

namespace {

// Exit codes: 1 the work was done and failed, or could not be done; 2 what was asked for is wrong.
constexpr int kFailed = 1;
constexpr int kBadUsage = 2;

int run(int argc, char** argv) {
  flash_mla::cli::start_with_chosen_threads(argv);
  CLI::App app{"Multi-head latent attention on CPUs and Hopper GPUs", "flash-mla"};
  app.require_subcommand(1);
  app.set_version_flag("--version", flash_mla::version());
  int exit_code = 0;
  flash_mla::cli::register_info(app, exit_code);
  flash_mla::cli::register_demo(app, exit_code);
  flash_mla::cli::register_verify(app, exit_code);
  flash_mla::cli::register_bench(app, exit_code);
  flash_mla::cli::register_bench_engine(app, exit_code);
  flash_mla::cli::register_plan(app, exit_code);
  flash_mla::cli::register_experts(app, exit_code);
  flash_mla::cli::register_generate(app, exit_code);
  flash_mla::cli::register_quantize(app, exit_code);
  flash_mla::cli::register_chat(app, exit_code);
  flash_mla::cli::register_serve(app, exit_code);
  flash_mla::cli::register_loadtest(app, exit_code);
  // CLI11 itself would only say that a command is missing.
  if (argc > 1 && argv[1][0] != '-') {
    std::vector<std::string> names;
    for (const CLI::App* sub : app.get_subcommands([](CLI::App*) { return true; })) {
      names.push_back(sub->get_name());
    }
    if (std::ranges::find(names, argv[1]) == names.end()) {
      const std::string near = flash_mla::cli::nearest(argv[1], names);
      fmt::print(stderr, "flash-mla: unknown command \"{}\"{}, expected one of: {}\n", argv[1],
                 near.empty() ? "" : fmt::format(" (did you mean {}?)", near), fmt::join(names, ", "));
      return kBadUsage;
    }
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    const bool wrong = e.get_exit_code() != 0;
    if (const std::string unknown = flash_mla::cli::unknown_arguments(app, argc, argv);
        wrong && !unknown.empty()) {
      fmt::print(stderr, "{}\n", unknown);
      return kBadUsage;
    }
    return app.exit(e) == 0 ? 0 : kBadUsage;
  } catch (const flash_mla::InvalidArgument& e) {
    fmt::print(stderr, "flash-mla: {}\n", e.what());
    return kBadUsage;
  }
  return exit_code;
}

// What stdio and iostream held back meets a full disk here.
bool output_is_written() {
  const bool lost = std::ferror(stdout) != 0 || !std::cout;
  errno = 0;
  if (std::fflush(stdout) == 0 && std::cout.flush() && !lost) return true;
  std::fprintf(stderr, "flash-mla: the output could not be written in full: %s\n",
               errno != 0 ? std::strerror(errno) : "an earlier write failed");
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  int exit_code = kFailed;
  try {
    exit_code = run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "flash-mla: %s\n", e.what());
  }
  return output_is_written() || exit_code != 0 ? exit_code : kFailed;
}
