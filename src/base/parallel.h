#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace flash_mla {

/// As many as OpenMP would use.
inline int default_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

/// Whether `rows` rows times a matrix of that many weights are worth waking a second thread for, that is,
/// take one thread about 40 us: it reads 50 bf16 weights a nanosecond, and up to 4 rows use each for nothing
/// more. Waking is cheap on an idle machine, but on a busy one every barrier may cost a time slice.
inline bool worth_threads(std::int64_t weights, std::int64_t rows) {
  return weights * std::max<std::int64_t>(rows, 4) >= 8'000'000;
}

/// f(i) for i in [0, n) on up to `threads` OpenMP threads, in any order. An exception ends up at the caller.
template <class F>
void parallel_for(std::int64_t n, [[maybe_unused]] int threads, F&& f) {
#if defined(_OPENMP)
  if (threads > 1 && n > 1) {
    std::exception_ptr error;
    // A few pieces per thread, so that uneven ones even out.
    const std::int64_t piece = std::max<std::int64_t>(n / (std::int64_t{8} * threads), 1);
#pragma omp parallel for num_threads(threads) schedule(dynamic, piece)
    for (std::int64_t i = 0; i < n; ++i) {
      try {
        f(i);
      } catch (...) {
#pragma omp critical(flash_mla_parallel_for)
        if (!error) error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  for (std::int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace flash_mla
