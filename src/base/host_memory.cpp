#include "base/host_memory.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

namespace flash_mla {

std::uint64_t host_memory() {
  const std::uint64_t machine =
      static_cast<std::uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  std::uint64_t group = 0;
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    // "max" is no number.
    if (std::ifstream(path) >> group && group > 0) return std::min(machine, group);
  }
  return machine;
}

}  // namespace flash_mla
