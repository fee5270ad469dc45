#pragma once

// What a result was measured on.

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace flash_mla::bench {

struct Machine {
  std::string cpu;
  int online_cpus = 0;
  int usable_cpus = 0;  ///< in this process's affinity mask
  std::size_t l1d_bytes = 0, l2_bytes = 0, l3_bytes = 0;
  std::size_t memory_bytes = 0;
  std::string os;
  std::string compiler;
};
const Machine& machine();

/// Commit of the sources ("-dirty" when they were changed), or "unknown" outside git.
const char* commit();
const char* highway_version();

nlohmann::ordered_json machine_json();

/// The command line of this process, its first word reduced to the program's name.
std::string command_line();

/// {"machine", "commit", "command", "date"}: the head of every result file.
nlohmann::ordered_json report_head();

/// Peak resident memory of this process since the last reset_peak_rss() (or its start, where the kernel
/// does not let it be reset).
std::size_t peak_rss_bytes();
void reset_peak_rss();

/// "32 MiB"
std::string format_bytes(double bytes);

/// Writes pretty-printed JSON and a newline; throws std::runtime_error naming the file.
void write_json(const std::string& path, const nlohmann::ordered_json& json);

}  // namespace flash_mla::bench
