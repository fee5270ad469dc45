#pragma once

#include "planner/read.h"

namespace flash_mla::planner {

/// The fewest cards, and their plan, on which so many users generate at a time, each so fast. `request`:
/// {"command": "deployment", "base": a plan request, "users": N, "tokens_per_s": each user's least, 0 for any}.
/// What the base says of plan.tp, plan.ep and prefill_plan is kept, everything else of a plan is searched; its
/// batch is not looked at. Throws InvalidArgument.
///
/// The result's "best" is null where no plan will do, and "problem" says why.
Json run_deployment(const Json& request);

}  // namespace flash_mla::planner
