#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "bench/load_client.h"
#include "flash_mla/engine.h"

namespace flash_mla::bench {

/// As run_load's closed loop, on an engine of this process: what a server's figures are compared with. The
/// engine must have been started.
double run_load_in_process(Engine& engine, int clients, std::vector<LoadRequest>& requests,
                           const std::function<void(std::size_t done)>& progress);

}  // namespace flash_mla::bench
