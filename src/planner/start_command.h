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

/// What the server is for: all of it, or the prompts or the rest of it where another does the other.
enum class ServerRole { kBoth, kPrefill, kDecode };

/// Of a request whose plans are complete (dp set). Cache and batch are those of the role's plan, of both the decode plan's.
/// HOST:PORT stands for a prefill server's bootstrap port.
StartCommand start_command(const Request& request, ServerRole role = ServerRole::kBoth);

}  // namespace flash_mla::planner
