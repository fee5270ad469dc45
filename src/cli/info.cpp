#include "flash_mla/info.h"

#include <fmt/ranges.h>

#include "cli/commands.h"

namespace flash_mla::cli {
namespace {

void print_info() {
  fmt::print("flash-mla {}\n", version());
  for (const BackendInfo& b : backends()) {
    fmt::print("{:<6} {:<12} {}{}{}\n", backend_name(b.backend), b.available ? "available" : "unavailable",
               b.device, b.device.empty() ? "" : "; ", b.detail);
  }
  const CpuIsaInfo isa = cpu_isa();
  fmt::print("cpu instruction sets: {} (FLASH_MLA_CPU_ISA forces one)\n", fmt::join(isa.available, " "));
}

}  // namespace

void register_info(CLI::App& app, int& exit_code) {
  app.add_subcommand("info", "Backends, instruction sets and versions, and why a backend is not used")
      ->callback([&exit_code] {
        print_info();
        exit_code = 0;
      });
}

}  // namespace flash_mla::cli
