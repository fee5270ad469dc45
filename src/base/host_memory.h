#pragma once

#include <cstdint>

namespace flash_mla {

/// Bytes of memory that this process may take, as far as the kernel says: all of the machine's, or what its
/// control group may have.
std::uint64_t host_memory();

}  // namespace flash_mla
