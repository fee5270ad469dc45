#pragma once

// What is measured of a case on a GPU. Free of CUDA headers.

#include <cstddef>
#include <string>

namespace flash_mla::bench::gpu {

struct CaseRow {
  /// What the library said where it has no kernel for the case: nothing was measured. "" otherwise.
  std::string not_in_build;
  int reps = 0;
  double us = 0;        ///< median, cold L2: what the caller waits for, a launch included
  double us_least = 0;  ///< the quickest
  double graph_us =
      0;  ///< per call of a CUDA graph of 20 back-to-back calls; 0: not measured, for calls of over 5 ms
  double host_us = 0;  ///< what a call takes the host; 0: not measured, for calls of over half a millisecond
  double copy_us = 0;  ///< of cases whose floor is a copy's: a copy of as many bytes, timed as `us`
  double copy_graph_us = 0;  ///< and as graph_us
  std::size_t workspace_bytes = 0;
  bool correct = false;
  std::string failure;  ///< what is wrong first, or ""
  double max_abs_error = 0;

  bool measured() const { return not_in_build.empty(); }
};

}  // namespace flash_mla::bench::gpu
