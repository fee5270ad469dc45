#pragma once

// The random cases of `flash-mla verify`.

#include <cstdint>
#include <functional>
#include <string>

#include "bench/compare.h"
#include "bench/problem.h"

namespace flash_mla::bench {

struct VerifyCase {
  ProblemSpec problem;
  int threads = 1;
  int num_parts = 0;           ///< 0: one per thread
  int fixed_split_blocks = 0;  ///< > 0: batch-invariant mode
};

/// Case `index` of `seed`: a function of these two numbers alone.
VerifyCase make_verify_case(std::uint64_t seed, std::int64_t index);

/// "b=3 s_q=1 h_q=16 ...", for a reader.
std::string describe(const VerifyCase& c);

/// Runs `decode` on the case's problem and compares with the fp64 reference.
using DecodeFunction = std::function<void(const VerifyCase&, const Problem&)>;
Comparison run_verify_case(const VerifyCase& c, const DecodeFunction& decode);

/// dense_decode of the library as the case asks for it.
void library_decode(const VerifyCase& c, const Problem& problem);

struct VerifyOptions {
  std::uint64_t seed = 0;
  std::int64_t cases = 200;
  std::int64_t only_case = -1;  ///< >= 0: this one alone
  bool verbose = false;
  bool quiet = false;
};

/// Runs the cases, prints each failure with the command that repeats it, and a summary line. Returns the
/// number of failures.
std::int64_t run_verify(const VerifyOptions& options, const DecodeFunction& decode);

}  // namespace flash_mla::bench
