#pragma once

#include <string>
#include <vector>

#include "flash_mla/planner.h"

namespace flash_mla::planner {

/// How `flash-mla serve` starts what a request plans.
struct StartCommand {
  std::string command;               ///< DIR stands for the model's directory; empty: it cannot
  std::vector<std::string> caveats;  ///< why it cannot; or what will be other than planned
};

/// Of a request whose plans are complete (dp set). Cache and batch are those of the decode plan.
StartCommand start_command(const Request& request);

}  // namespace flash_mla::planner
