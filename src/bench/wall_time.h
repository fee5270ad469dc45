#pragma once

// Wall time of the engine's benchmarks.

#include <algorithm>
#include <chrono>
#include <vector>

namespace flash_mla::bench {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// Of an even number the upper of the two in the middle; x is not empty.
inline double upper_median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + std::ssize(x) / 2, x.end());
  return x[x.size() / 2];
}

}  // namespace flash_mla::bench
