#pragma once

// What the reports of both benchmarks on a GPU begin and end with.

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "bench/gpu/bench.h"

namespace flash_mla::bench {

/// report_head() with the GPU and how it was timed.
nlohmann::ordered_json gpu_report(const gpu::Device& device, const char* protocol);

nlohmann::ordered_json to_json(const gpu::Limits& limits);

/// "limits of this process: read 4650 GB/s, ..."
std::string limits_line(const gpu::Limits& limits);

}  // namespace flash_mla::bench
