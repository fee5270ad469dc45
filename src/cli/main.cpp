#include <fmt/format.h>

#include <exception>
#include <string>

#include "cli/commands.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"

namespace {

// Exit codes: 1 the work was done and failed, or could not be done; 2 what was asked for is wrong.
constexpr int kFailed = 1;
constexpr int kBadUsage = 2;

}  // namespace

int main(int argc, char** argv) {
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
  flash_mla::cli::register_generate(app, exit_code);
  flash_mla::cli::register_serve(app, exit_code);
  flash_mla::cli::register_loadtest(app, exit_code);
  // CLI11 itself would only say that a command is missing.
  if (argc > 1 && argv[1][0] != '-') {
    std::string names;
    bool known = false;
    for (const CLI::App* sub : app.get_subcommands([](CLI::App*) { return true; })) {
      names += (names.empty() ? "" : ", ") + sub->get_name();
      known = known || sub->get_name() == argv[1];
    }
    if (!known) {
      fmt::print(stderr, "flash-mla: unknown command \"{}\", expected one of: {}\n", argv[1], names);
      return kBadUsage;
    }
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : kBadUsage;
  } catch (const flash_mla::InvalidArgument& e) {
    fmt::print(stderr, "flash-mla: {}\n", e.what());
    return kBadUsage;
  } catch (const std::exception& e) {
    fmt::print(stderr, "flash-mla: {}\n", e.what());
    return kFailed;
  }
  return exit_code;
}
