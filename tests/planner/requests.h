#pragma once

// Requests that the planner's tests start from.

#include "flash_mla/planner.h"
#include "planner/read.h"

namespace flash_mla::planner {

inline Request parse(const char* text) { return read_request(parse_json(text, "test"), "test"); }

/// DeepSeek-V3 on H20 as in the reference's corrected tables: W4A8 experts, 1-byte cache, FP8 throughout.
inline Request reference_request(std::int64_t ep) {
  Request q = parse(R"({"model": "deepseek-v3", "hardware": "h20", "workload": {"batch": 32},
                        "precision": {"attention": "fp8", "moe": "w4a8", "kv": "fp8_576", "activation": "fp8"}})");
  q.prefill_plan.ep = q.decode_plan.ep = ep;
  return q;
}

inline double kind(const Kinds& kinds, const std::string& name) {
  for (const auto& [key, value] : kinds) {
    if (key == name) return value;
  }
  return 0;
}

}  // namespace flash_mla::planner
