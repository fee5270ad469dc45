#pragma once

#include <string_view>

namespace flash_mla::cli {

/// python/flash_mla/plot.py, compiled in so that `plan --plot` needs no installed package.
extern const std::string_view kPlotScript;

}  // namespace flash_mla::cli
