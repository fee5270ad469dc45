#include "cpu/isa.h"

namespace flash_mla::cpu {

CpuIsaInfo isa_info() { return {"scalar", "not yet dispatched", {"scalar"}}; }

}  // namespace flash_mla::cpu
