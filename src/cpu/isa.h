#pragma once

#include "flash_mla/info.h"

namespace flash_mla::cpu {

CpuIsaInfo isa_info();

}  // namespace flash_mla::cpu
