#include "bench/machine.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <malloc.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "flash_mla/info.h"
#include "flash_mla_commit.h"

namespace flash_mla::bench {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// "32768K" as sysfs writes it.
std::size_t parse_size(const std::string& text) {
  std::size_t used = 0;
  try {
    const std::size_t number = std::stoull(text, &used);
    const char unit = used < text.size() ? text[used] : ' ';
    return number * (unit == 'K' ? 1024 : unit == 'M' ? 1024 * 1024 : 1);
  } catch (const std::exception&) {
    return 0;
  }
}

void read_caches(Machine& m) {
  for (int i = 0; i < 8; ++i) {
    const std::string dir = fmt::format("/sys/devices/system/cpu/cpu0/cache/index{}/", i);
    const std::string level = first_line(dir + "level");
    if (level.empty()) break;
    const std::size_t size = parse_size(first_line(dir + "size"));
    if (level == "1" && first_line(dir + "type") == "Data") m.l1d_bytes = size;
    if (level == "2") m.l2_bytes = size;
    if (level == "3") m.l3_bytes = size;
  }
}

Machine read_machine() {
  Machine m;
  for (const BackendInfo& b : backends()) {
    if (b.backend == Backend::kCpu) m.cpu = b.device;
  }
  m.online_cpus = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  cpu_set_t set;
  m.usable_cpus = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : m.online_cpus;
  read_caches(m);
  m.memory_bytes =
      static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  utsname name{};
  if (uname(&name) == 0) m.os = fmt::format("{} {} {}", name.sysname, name.release, name.machine);
#if defined(__clang__)
  m.compiler = "clang " __clang_version__;
#else
  m.compiler = "gcc " __VERSION__;
#endif
  return m;
}

}  // namespace

const Machine& machine() {
  static const Machine kMachine = read_machine();
  return kMachine;
}

const char* commit() { return FLASH_MLA_COMMIT; }
const char* highway_version() { return FLASH_MLA_HIGHWAY_VERSION; }

nlohmann::ordered_json machine_json() {
  const Machine& m = machine();
  return {{"cpu", m.cpu},
          {"online_cpus", m.online_cpus},
          {"usable_cpus", m.usable_cpus},
          {"l1d_bytes", m.l1d_bytes},
          {"l2_bytes", m.l2_bytes},
          {"l3_bytes", m.l3_bytes},
          {"memory_bytes", m.memory_bytes},
          {"os", m.os},
          {"isa", cpu_isa().selected},
          {"version", version()},
          {"compiler", m.compiler},
          {"highway", highway_version()}};
}

std::string command_line() {
  std::ifstream in("/proc/self/cmdline", std::ios::binary);
  const std::string raw((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  std::string line;
  for (std::size_t at = 0; at < raw.size();) {
    const std::size_t end = std::min(raw.find('\0', at), raw.size());
    std::string word = raw.substr(at, end - at);
    if (line.empty()) {
      word = word.substr(word.find_last_of('/') + 1);
    } else {
      line += ' ';
    }
    line += word;
    at = end + 1;
  }
  return line;
}

nlohmann::ordered_json report_head() {
  return {{"machine", machine_json()},
          {"commit", commit()},
          {"command", command_line()},
          {"date", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)))}};
}

std::size_t peak_rss_bytes() {
  std::ifstream in("/proc/self/status");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::stoull(line.substr(6)) * 1024;
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::size_t>(usage.ru_maxrss) * 1024;
}

void reset_peak_rss() {
  malloc_trim(0);  // so that memory freed earlier does not count
  std::ofstream("/proc/self/clear_refs") << "5";
}

std::string format_bytes(double bytes) {
  if (bytes >= 1024.0 * 1024 * 1024) return fmt::format("{:.1f} GiB", bytes / (1024.0 * 1024 * 1024));
  if (bytes >= 1024.0 * 1024) return fmt::format("{:.1f} MiB", bytes / (1024.0 * 1024));
  return fmt::format("{:.1f} KiB", bytes / 1024);
}

void write_json(const std::string& path, const nlohmann::ordered_json& json) {
  std::ofstream out(path);
  out << json.dump(2) << '\n';
  if (!out.flush()) throw std::runtime_error(fmt::format("cannot write {}: {}", path, std::strerror(errno)));
}

}  // namespace flash_mla::bench
