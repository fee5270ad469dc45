#include "flash_mla/info.h"

#include <fstream>

#include "cpu/isa.h"

namespace flash_mla {
namespace {

std::string processor_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("model name", 0) == 0) {
      const auto colon = line.find(':');
      if (colon != std::string::npos && colon + 2 <= line.size()) return line.substr(colon + 2);
    }
  }
  return "unknown x86-64 processor";
}

}  // namespace

const char* version() { return FLASH_MLA_VERSION; }

CpuIsaInfo cpu_isa() { return cpu::isa_info(); }

std::vector<BackendInfo> backends() {
  const CpuIsaInfo isa = cpu_isa();
  return {
      {Backend::kCpu, true, processor_name(), isa.selected + ": " + isa.reason},
      {Backend::kSm90, false, "", "this build has no sm90 backend"},
  };
}

}  // namespace flash_mla
