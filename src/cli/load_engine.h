#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "bench/load_client.h"
#include "flash_mla/engine.h"

namespace flash_mla::cli {

/// As run_load's closed loop, on an engine of this process: what a server's figures are compared with. The
/// engine must have been started. `model_name` is what the requests' bodies say.
double run_load_in_process(Engine& engine, const std::string& model_name, int clients,
                           std::vector<LoadRequest>& requests,
                           const std::function<void(std::size_t done)>& progress);

}  // namespace flash_mla::cli
