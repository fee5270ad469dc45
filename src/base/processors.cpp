#include "base/processors.h"

#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <vector>

namespace flash_mla {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxGroupDepth = 64;

/// A line "HIERARCHY:CONTROLLERS:PATH" of /proc/self/cgroup.
struct Group {
  std::string controllers;
  fs::path path;
};

std::vector<Group> read_groups(const fs::path& root) {
  std::vector<Group> out;
  std::ifstream file(root / "proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == line.npos) continue;
    out.push_back(
        {line.substr(first + 1, second - first - 1), fs::path(line.substr(second + 1)).relative_path()});
  }
  return out;
}

bool has_cpu(const std::string& controllers) {
  return ("," + controllers + ",").find(",cpu,") != std::string::npos;
}

/// The quota that a folder of a control group sets; 0: none.
double quota_of(const fs::path& folder, bool v2, std::string& file_name) {
  double quota = -1, period = 0;
  if (v2) {
    file_name = (folder / "cpu.max").string();
    std::string text;  // "max" or a number
    std::ifstream file(file_name);
    if (!(file >> text >> period) || text == "max") return 0;
    quota = std::atof(text.c_str());
  } else {
    file_name = (folder / "cpu.cfs_quota_us").string();
    std::ifstream(file_name) >> quota;
    std::ifstream(folder / "cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

/// The lowest quota of this process's groups and of those that they are in. In a container the path may be the
/// host's, where there is nothing; the group itself is mounted as the root then.
void read_quota(const fs::path& root, Processors& out) {
  for (const Group& group : read_groups(root)) {
    const bool v2 = group.controllers.empty();
    if (!v2 && !has_cpu(group.controllers)) continue;
    std::vector<const char*> mounts = {"sys/fs/cgroup", "sys/fs/cgroup/unified"};
    if (!v2) mounts = {"sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/cpuacct,cpu"};
    for (const char* mount : mounts) {
      const fs::path top = root / mount;
      fs::path folder = group.path.empty() ? top : top / group.path;
      for (int up = 0; up < kMaxGroupDepth; ++up, folder = folder.parent_path()) {
        std::string name;
        const double quota = quota_of(folder, v2, name);
        if (quota > 0 && (out.quota == 0 || quota < out.quota)) {
          out.quota = quota;
          out.quota_file = name;
        }
        if (folder == top) break;
      }
    }
  }
}

/// More of the processors than this are busy: others compute here.
constexpr double kBusy = 0.2;

}  // namespace

const char* waiting_name(Waiting waiting) {
  switch (waiting) {
    case Waiting::kSpin:
      return "spin";
    case Waiting::kSleep:
      return "sleep";
    case Waiting::kEnvironment:
      return "environment";
  }
  return "";
}

Processors read_processors(const fs::path& root) {
  Processors out;
  out.online = std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
  cpu_set_t set;
  out.usable = sched_getaffinity(0, sizeof set, &set) == 0 ? std::max(1, CPU_COUNT(&set)) : out.online;
  read_quota(root, out);
  std::ifstream(root / "proc/loadavg") >> out.load;
  return out;
}

Threading choose_threading(const Processors& p) {
  Threading out;
  out.waiting = Waiting::kSleep;
  out.threads = p.usable;
  out.why_threads = fmt::format("{} processors usable of {}", p.usable, p.online);
  const bool quota = p.quota > 0 && p.quota < p.usable;
  if (quota) {
    out.threads = std::max(1, static_cast<int>(std::ceil(p.quota)));
    out.why_threads += fmt::format(", {} allows {:.3g}", p.quota_file, p.quota);
  }
  if (quota) {
    out.why_waiting = "a quota would be spent on spinning";
  } else if (p.usable < p.online) {
    out.why_waiting = "others may use the same processors";
  } else if (p.load > kBusy * p.online) {
    out.why_waiting = fmt::format("others use the processors: a load of {:.1f} on {}", p.load, p.online);
  } else {
    out.waiting = Waiting::kSpin;
    out.why_waiting =
        fmt::format("nobody else uses the processors: a load of {:.1f} on {}", p.load, p.online);
  }
  return out;
}

Threading with_environment(Threading threading) {
  if (const char* threads = std::getenv(kThreadsVariable); threads != nullptr && std::atoi(threads) > 0) {
    threading.threads = std::atoi(threads);
    threading.why_threads = fmt::format("{}={}", kThreadsVariable, threads);
  }
  for (const char* name : {kSpinVariable, kWaitVariable}) {
    if (const char* value = std::getenv(name); value != nullptr) {
      threading.waiting = Waiting::kEnvironment;
      threading.why_waiting = fmt::format("{}={}", name, value);
      break;
    }
  }
  return threading;
}

}  // namespace flash_mla
