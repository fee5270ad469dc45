#pragma once

#include <filesystem>
#include <string>

// How many threads should compute here, and whether those that wait should spin. OpenMP's own answers are wrong where
// processors are shared: it does not know of a container's quota, and its waiting threads spin for milliseconds on
// processors that somebody else could use.

namespace flash_mla {

/// What this process may use, and what else uses it.
struct Processors {
  int online = 1;
  int usable = 1;          ///< in this process's affinity mask
  double quota = 0;        ///< processors that its control groups allow on average; 0: no limit
  std::string quota_file;  ///< where that is written
  double load = 0;  ///< threads that ran or wanted to in the last minute, on average, in the whole machine
};

/// Of this machine. `root` stands before the paths of /proc and /sys, for tests.
Processors read_processors(const std::filesystem::path& root = "/");

/// What a thread does until the others are there.
enum class Waiting {
  kSpin,         ///< looks for milliseconds, then sleeps: libgomp's own way
  kSleep,        ///< sleeps at once
  kEnvironment,  ///< what the user has set
};
/// "spin", "sleep", "environment".
const char* waiting_name(Waiting waiting);

/// How to compute, and why.
struct Threading {
  int threads = 1;
  Waiting waiting = Waiting::kSpin;
  std::string why_threads, why_waiting;
};

/// Threads: one for every usable processor, but no more than the quota, rounded up. They sleep where others use the
/// processors too: a quota, an affinity mask, or more than a fifth of them busy already.
Threading choose_threading(const Processors& processors);

/// libgomp's variables that decide the same.
inline constexpr const char *kThreadsVariable = "OMP_NUM_THREADS", *kSpinVariable = "GOMP_SPINCOUNT",
                            *kWaitVariable = "OMP_WAIT_POLICY";

/// The same with what the user's environment says in its place.
Threading with_environment(Threading threading);

}  // namespace flash_mla
