#pragma once

// How long an engine's step takes on one card: a sum of what it reads, computes and launches, each with a cost that is
// fitted to `flash-mla bench-engine`.

#include <array>
#include <utility>
#include <vector>

#include "flash_mla/planner.h"
#include "planner/evaluate.h"
#include "planner/read.h"

namespace flash_mla::planner {

/// What multiplies each cost of EngineCosts, in its order: seconds at the card's peaks, and counts.
inline constexpr std::size_t kEngineCosts = 12;
using EngineStep = std::array<double, kEngineCosts>;

/// The factors by the keys that profiles have for them.
inline std::array<std::pair<const char*, double*>, 9> engine_factors(EngineCosts& e) {
  return {{{"weights", &e.weights},
           {"quantised", &e.quantised},
           {"cache", &e.cache},
           {"index", &e.index},
           {"gemm", &e.gemm},
           {"attention", &e.attention},
           {"prompts", &e.prompts},
           {"scores", &e.scores},
           {"activations", &e.activations}}};
}

/// A decode step of `q`, drafts and module included, or the passes that take its prompts in. Weights are those that the
/// engine has: with precision.dense fp8 attention alone is, dense layers and head stay 16-bit, as --quantize fp8 leaves
/// them.
EngineStep engine_step(const Request& q, PhaseKind kind);
double engine_seconds(const EngineStep& step, const EngineCosts& costs);

/// A measured step.
struct EngineRow {
  std::string source;
  bool prefill = false;
  std::int64_t batch = 1, tokens = 0;  ///< cached tokens of each sequence, or of the prompt
  double seconds = 0;
  EngineStep step{};
};
/// The costs that make the squared relative errors least: none below its default. Needs as many rows as there are costs.
EngineCosts fit_engine(const std::vector<EngineRow>& rows);

bool is_engine_bench(const Json& json);
/// Rows of a result of bench-engine.
std::vector<EngineRow> read_engine_bench(const Json& json, const std::string& source,
                                         const Hardware& hardware);
/// The "calibrate" command for these.
Json calibrate_engine(const Hardware& hardware, const Json& bench);

}  // namespace flash_mla::planner
