#include "flash_mla/info.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstdlib>

#include "bench/machine.h"
#include "bench/table.h"
#include "cli/commands.h"
#include "cli/threads.h"
#include "flash_mla/schedule.h"

namespace flash_mla::cli {
namespace {

std::string waiting(const Threading& threading) {
  switch (threading.waiting) {
    case Waiting::kSpin:
      return "spin";
    case Waiting::kSleep:
      return "sleep at once";
    case Waiting::kEnvironment:
      break;
  }
  return "as the environment says";
}

void print_info() {
  fmt::print("flash-mla {}, commit {}\n", version(), bench::commit());
  const bench::Machine& m = bench::machine();
  fmt::print("built with {}, Highway {}\n\nbackends\n", m.compiler, bench::highway_version());
  for (const BackendInfo& b : backends()) {
    fmt::print("  {:<6}{:<13}{}{}{}\n", backend_name(b.backend), b.available ? "available" : "unavailable",
               b.device, b.device.empty() ? "" : "; ", b.detail);
  }
  const CpuIsaInfo isa = cpu_isa();
  const char* forced = std::getenv("FLASH_MLA_CPU_ISA");
  fmt::print("\ncpu\n");
  fmt::print("  instruction set    {} ({})\n", isa.selected, isa.reason);
  fmt::print("  available          {}, best first\n", fmt::join(isa.available, ", "));
  fmt::print("  FLASH_MLA_CPU_ISA  {}\n", forced == nullptr || *forced == '\0'
                                              ? std::string("not set; one of the available names forces it")
                                              : fmt::format("\"{}\"", forced));
  const Threading& threading = chosen_threads();
  fmt::print("  threads            {} by default ({})\n", cpu_schedule_options().num_parts,
             threading.why_threads);
  fmt::print("  waiting threads    {} ({})\n", waiting(threading), threading.why_waiting);
  const auto size = [](std::size_t bytes) {
    return bytes == 0 ? std::string("unknown") : bench::format_bytes(static_cast<double>(bytes));
  };
  fmt::print("  caches             L1d {}, L2 {}, L3 {}\n", size(m.l1d_bytes), size(m.l2_bytes),
             size(m.l3_bytes));
  fmt::print("  memory             {}\n", size(m.memory_bytes));
  fmt::print("  system             {}\n", m.os);
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
