#include <fmt/format.h>

#include <exception>

#include "cli/commands.h"
#include "flash_mla/info.h"

int main(int argc, char** argv) {
  CLI::App app{"Multi-head latent attention on CPUs and Hopper GPUs", "flash-mla"};
  app.require_subcommand(1);
  app.set_version_flag("--version", flash_mla::version());
  int exit_code = 0;
  flash_mla::cli::register_info(app, exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e);
  } catch (const std::exception& e) {
    fmt::print(stderr, "flash-mla: {}\n", e.what());
    return 1;
  }
  return exit_code;
}
