#pragma once

#include <string>

// Pictures are drawn by the Python package: `python -m flash_mla_kernels.plot`.

namespace flash_mla::cli {

/// Why `python` cannot draw, and what would help; "" when it can.
std::string why_no_plotting(const std::string& python);

/// Throws InvalidArgument, naming `what` needs it, unless `python` can draw. Call it before a long
/// measurement.
void require_plotting(const std::string& python, const std::string& what);

/// Draws the result file `json` to `target`: a benchmark's roofline into that picture, a plan's pictures into
/// that folder. Throws std::runtime_error.
void plot(const std::string& python, const std::string& json, const std::string& target);

}  // namespace flash_mla::cli
