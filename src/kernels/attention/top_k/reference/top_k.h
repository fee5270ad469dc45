#pragma once

#include "flash_mla/top_k.h"

namespace flash_mla::reference {

/// flash_mla::reference::top_k on checked arguments.
void top_k_unchecked(const TopKArgs& args);

}  // namespace flash_mla::reference
