#pragma once

#include <string>

namespace flash_mla::cli {

/// Throws UsageError, saying what needs it, unless `python` runs and has matplotlib. Call it before a long
/// measurement.
void require_plotting(const std::string& python, const char* what = "the roofline picture");

/// Draws the roofline of the result file `json` into `picture` with bench/plot_roofline.py, which is built
/// into the program. Throws std::runtime_error.
void plot_roofline(const std::string& python, const std::string& json, const std::string& picture);

/// Draws the pictures of the planner's result file `json` into `directory` with python/flash_mla/plot.py,
/// which is built into the program. Throws std::runtime_error.
void plot_plan(const std::string& python, const std::string& json, const std::string& directory);

}  // namespace flash_mla::cli
