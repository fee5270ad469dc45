#pragma once

#include <string>

#include "flash_mla/planner.h"

// What a request may hold. Each throws InvalidArgument that names the key, its value and what was expected.

namespace flash_mla::planner {

[[noreturn]] void bad(const std::string& key, const std::string& value, const std::string& expected);

/// Fills in dp and checks the plan against the model. `key` is what messages call the plan.
Plan check_plan(Plan plan, const Model& model, const std::string& key);

/// Workload, precision and, in mode article, what the article has no formula for. Plans apart.
void check_request(const Request& request);

}  // namespace flash_mla::planner
