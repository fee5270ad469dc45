#include "flash_mla/info.h"

#include <fmt/format.h>

#include <fstream>

#include "kernels/attention/dense_decode/cpu/isa.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"

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
  std::vector<BackendInfo> all{{Backend::kCpu, true, processor_name(), isa.selected + ": " + isa.reason}};
  const std::vector<sm90::Gpu> gpus = sm90::gpus();
  for (std::size_t i = 0; i < gpus.size(); ++i) {
    const sm90::Gpu& g = gpus[i];
    const std::string reason = sm90::reject_reason(g);
    all.push_back({Backend::kSm90, reason.empty(), fmt::format("cuda:{} {}", i, g.name),
                   reason.empty()
                       ? fmt::format("compute capability {}.{}, {} multiprocessors, {:.1f} GiB", g.major,
                                     g.minor, g.sms, static_cast<double>(g.memory_bytes) / (1 << 30))
                       : reason});
  }
  if (gpus.empty()) all.push_back({Backend::kSm90, false, "", sm90::why_no_gpus()});
  return all;
}

}  // namespace flash_mla
