#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "transfer/page_transport.h"

namespace flash_mla::transfer {

/// Those that can be tested here: NIXL where the variable FLASH_MLA_NIXL names its library, as tests/transfer/run.sh does.
inline std::vector<std::string> testable_transports() {
  std::vector<std::string> out = {"shm"};
  if (std::getenv("FLASH_MLA_NIXL") != nullptr) out.emplace_back("nixl");
  return out;
}

inline std::unique_ptr<PageTransport> make_transport(const std::string& name, std::size_t landing_bytes) {
  return name == "nixl" ? make_nixl_transport(landing_bytes) : make_shared_memory_transport(landing_bytes);
}

}  // namespace flash_mla::transfer
