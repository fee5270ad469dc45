#pragma once

// A team of threads that takes tasks one after the other, and after the last of them tasks of a second kind.
// Whoever takes a task, its result is the same.

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels/attention/dense_decode/cpu/isa.h"

namespace flash_mla::cpu {

/// first(thread, i) for i in [0, num_first), then, when all of them are done, second(thread, i) for i in
/// [0, num_second); 0 <= thread < threads. The functions throw nothing.
template <class First, class Second>
void run_team(int threads, std::int64_t num_first, const First& first, std::int64_t num_second,
              const Second& second) {
  check_isa();
#if defined(_OPENMP)
  threads = static_cast<int>(std::min<std::int64_t>(threads, std::max(num_first, num_second)));
  if (threads > 1) {
    // The counters also say to a race detector what OpenMP's own, uninstrumented, synchronisation guarantees.
    std::atomic<std::int64_t> next_first{0}, next_second{0};
    next_first.fetch_add(0, std::memory_order_release);
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      for (std::int64_t i = 0; (i = next_first.fetch_add(1, std::memory_order_acq_rel)) < num_first;) {
        first(thread, i);
      }
      next_second.fetch_add(0, std::memory_order_acq_rel);
#pragma omp barrier
      for (std::int64_t i = 0; (i = next_second.fetch_add(1, std::memory_order_acq_rel)) < num_second;) {
        second(thread, i);
      }
      next_second.fetch_add(0, std::memory_order_acq_rel);
    }
    next_second.load(std::memory_order_acquire);
    return;
  }
#endif
  (void)threads;
  for (std::int64_t i = 0; i < num_first; ++i) first(0, i);
  for (std::int64_t i = 0; i < num_second; ++i) second(0, i);
}

}  // namespace flash_mla::cpu
